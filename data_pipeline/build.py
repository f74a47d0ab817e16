"""Builds a TFDS dataset of TFRecord shards from trajectories.

python -m data_pipeline.build --input train=train.jsonl --input validation=validation.jsonl \
    --tokenizer DIR --output DIR [--chat-template chatml] [--max-length 1024] [--too-long error|drop|window] \
    [--skip-bad] [--beam --runner RUNNER ...]

Equal trajectories are stored once, with their number as a weight: dropping them would change the estimated values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError, SplitError, listed
from data_pipeline.metadata import Metadata, check_output, shard_of, verify
from data_pipeline.output import staged_directory, write_errors
from data_pipeline.records import Rows, SplitRecords, TooLong, check_not_empty, sizes_of, split_metadata
from data_pipeline.splits import Inputs, parse_inputs
from data_pipeline.terminal import safe_output
from data_pipeline.trajectory import count_rows, read_numbered

__all__ = ["Metadata", "build", "verify"]


def build(
    inputs: Inputs,
    encoder: Encoder,
    output: str | PathLike[str],
    *,
    max_length: int | None,
    too_long: TooLong = "error",
    shards: int = 4,
    progress: Callable[[int, int], None] | None = None,
    skip_bad: Callable[[DataError], None] | None = None,
) -> Metadata:
    """Encodes trajectories and writes the dataset directory `output`, completely or not at all.

    Args:
      inputs: JSON Lines files by split. Rows of files under None go to the split they name, or to "train".
      encoder: encodes every conversation; its fingerprint is stored with the shards.
      output: a directory that is absent or empty, or an earlier dataset, which is replaced.
      max_length: most tokens of a trajectory; None for no bound.
      too_long: what happens to a longer trajectory. "error" raises, "drop" leaves it out, and "window" cuts it after
        the last step that fits, whose reward becomes the return from there on (its Monte Carlo value).
      shards: TFRecord files per split; fewer if the smallest split has fewer trajectories.
      progress: called with (rows done, all rows).
      skip_bad: called with the error of every bad row, which is then left out and counted as `skipped`. Without it the
        first error is raised. A task in two splits is always an error.

    Returns:
      The content of metadata.json.

    Raises:
      DataError: names the row, or the directory that cannot be written.
    """
    output = Path(output)
    # First, because encoding may take hours.
    check_output(output)
    paths = [path for files in inputs.values() for path in files]
    # Counting reads every file once more, so it is left out if no progress is shown.
    total = sum(map(count_rows, paths)) if progress else 0
    rows = Rows(encoder, max_length, too_long)
    done = skipped = 0

    def bad(error: DataError) -> None:
        nonlocal done, skipped
        # A leak is no fault of its row: leaving that out would hide the wrong split of all others.
        if skip_bad is None or isinstance(error, SplitError):
            raise error
        skip_bad(error)
        done, skipped = done + 1, skipped + 1

    for split, files in inputs.items():
        for path in files:
            for where, trajectory in read_numbered(path, skip_bad=bad):
                try:
                    rows.add(trajectory, split, where)
                    done += 1
                except DataError as error:
                    bad(error)
                if progress:
                    progress(done, total)
    check_not_empty({name: (split.counts, len(split.records)) for name, split in rows.splits.items()}, inputs)
    settings = {"max_length": max_length, "too_long": too_long, "skipped": skipped}
    return _write(rows.splits, encoder, output, shards=shards, **settings)


def _write(
    splits: Mapping[str, SplitRecords], encoder: Encoder, output: Path, *, shards: int, **settings: Any
) -> Metadata:
    # It imports TensorFlow, which takes seconds: bad rows are reported before.
    from data_pipeline import shards as shards_lib

    with write_errors(output, "the dataset cannot be written"), staged_directory(output, overwrite=True) as staging:
        records = {name: split.records for name, split in splits.items()}
        shards_lib.write(records, staging, shards=shards)
        metadata = Metadata(
            tokenizer=encoder.fingerprint,
            pad_id=encoder.pad_id,
            **settings,
            splits={name: split_metadata(split.counts, sizes_of(split.records)) for name, split in splits.items()},
            shards={file.name: shard_of(file) for file in sorted(staging.glob("*.tfrecord*"))},
        )
        metadata.save(staging)
    return metadata


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.build", description="Builds a dataset of TFRecord shards from trajectories."
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="[SPLIT=]FILE",
        help="JSON Lines, may be repeated; without SPLIT every row goes to the split it names, or to train",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="directory with tokenizer.json and a chat template"
    )
    parser.add_argument(
        "--chat-template", default="own", metavar="TEMPLATE", help="own (default), chatml, llama3, or a file"
    )
    parser.add_argument(
        "--reasoning", choices=("keep", "drop"), default="keep", help="whether to encode what the model thought"
    )
    parser.add_argument(
        "--special-tokens",
        choices=("error", "break"),
        default="error",
        help="special tokens in the text of messages: an error, or broken up so that they are text",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="dataset directory to write")
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="most tokens of a trajectory (default: no bound)"
    )
    parser.add_argument("--too-long", choices=("error", "drop", "window"), default="error")
    parser.add_argument("--shards", type=int, default=4, metavar="N", help="files per split (default: 4)")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out; they are shown and counted")
    parser.add_argument(
        "--beam",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="run as an Apache Beam pipeline; all options after it go to the pipeline, such as --runner RUNNER",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints the counts of every split. Returns 0, 2 for bad input, or 130 for Ctrl-C."""
    with safe_output():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = _arguments(arguments)
    bad: list[DataError] = []
    settings = {
        "max_length": options.max_length,
        "too_long": options.too_long,
        "shards": options.shards,
        "skip_bad": bad.append if options.skip_bad else None,
    }
    try:
        inputs = parse_inputs(options.input)
        choices = {"reasoning": options.reasoning, "special_tokens": options.special_tokens}
        encoder = Encoder.load(options.tokenizer, options.chat_template, **choices)
        if options.beam is None:
            metadata = _with_bar(inputs, encoder, options.output, settings)
        else:
            metadata = _with_beam(inputs, encoder, options.output, settings, options.beam)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    for split, counts in metadata.splits.items():
        print(
            f"{split}: {counts.rows} rows, {counts.trajectories} trajectories, {counts.tokens} tokens "
            f"({counts.merged} merged, {counts.errors} errors, {counts.dropped} dropped, {counts.windowed} cut)"
        )
    if lines := listed(bad, total=metadata.skipped):
        print("\n".join(["left out, " + lines[0], *lines[1:]]), file=sys.stderr)
    return 0


def _with_bar(inputs: Inputs, encoder: Encoder, output: str, settings: dict[str, Any]) -> Metadata:
    from tqdm import tqdm

    with tqdm(unit=" rows", desc="build") as bar:

        def progress(done: int, total: int) -> None:
            # The rows are counted within `build`, after the bar was made.
            bar.total = total
            bar.update(done - bar.n)

        return build(inputs, encoder, output, progress=progress, **settings)


def _with_beam(
    inputs: Inputs, encoder: Encoder, output: str, settings: dict[str, Any], pipeline: Sequence[str]
) -> Metadata:
    try:
        from data_pipeline import beam_build
    except ModuleNotFoundError as error:
        # A missing dependency of Beam is another problem, which this advice would hide.
        if error.name != "apache_beam":
            raise
        raise DataError(
            "--beam needs Apache Beam, which requires older packages than requirements.txt has: install the "
            "project's `beam` extra in a separate environment (docs/your-trajectories.md)"
        ) from None
    return beam_build.build(inputs, encoder, output, options=pipeline, **settings)


if __name__ == "__main__":
    sys.exit(main())
