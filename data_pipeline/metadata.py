"""metadata.json of a dataset directory, and the check of its shards against it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from data_pipeline.errors import DataError

FILE = "metadata.json"
# Files in which TFDS describes a dataset.
_DESCRIPTIONS = ("dataset_info.json", "features.json")
FORMAT = "jaxprm-trajectories"
VERSION = 1
# Lower bounds of the bins of length histograms. They are part of the format: metadata.json stores counts only.
LENGTH_EDGES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TFRecord file as it was written."""

    bytes: int
    sha256: str


class SplitMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counts of one split. rows = errors + dropped + merged + trajectories; the weights sum to merged + trajectories.

    Of the rows read, `errors` ended in an error, `dropped` were too long and left out, `windowed` too long and cut, and
    `merged` equal to an earlier row. `trajectories` of `tasks` different tasks are stored, with `steps` and `tokens` in
    all, and at most `longest` tokens and `most_steps` steps each. `lengths[i]` trajectories have
    LENGTH_EDGES[i] <= tokens < LENGTH_EDGES[i + 1]. `mean_return` is the mean over rows, so trajectories are weighted;
    None if no row has an outcome. `without_outcome` rows have step labels only, `pairs` compare actions in one state;
    both are absent where there are none.
    """

    rows: int
    errors: int
    dropped: int
    windowed: int
    merged: int
    trajectories: int
    tasks: int
    steps: int
    tokens: int
    longest: int
    most_steps: int
    mean_return: float | None
    lengths: list[int]
    without_outcome: int | msgspec.UnsetType = msgspec.UNSET
    pairs: int | msgspec.UnsetType = msgspec.UNSET


class Metadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of metadata.json. `skipped` is the number of bad rows that were left out; no split counts them."""

    format: Literal["jaxprm-trajectories"] = FORMAT
    version: Literal[1] = VERSION
    tokenizer: str
    pad_id: int
    max_length: int | None
    too_long: Literal["error", "drop", "window"]
    # With a default, because datasets built before this field existed are still read.
    skipped: int = 0
    splits: dict[str, SplitMetadata]
    shards: dict[str, Shard]

    @property
    def fingerprint(self) -> str:
        """sha256 over all shards."""
        return fingerprint(self.shards)

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> Metadata:
        """Reads metadata.json. Raises DataError if it is missing or malformed."""
        file = Path(directory) / FILE
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except OSError as error:
            raise DataError(f"{directory}: not a dataset, {FILE} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise DataError(f"{file}: not the metadata of a dataset: {error}; build it again") from None

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes metadata.json into a directory."""
        (Path(directory) / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def check_output(output: Path) -> None:
    """Raises DataError unless a dataset may be written to `output`: it is absent, empty, or a dataset and no more."""
    if output.is_dir():
        if (output / FILE).is_file():
            # Raises if another program wrote this metadata.json.
            ours = {FILE, *_DESCRIPTIONS, *Metadata.load(output).shards}
            if others := sorted({path.name for path in output.iterdir()} - ours):
                raise DataError(f"{output}: holds {others[0]}, which is no part of the dataset; move it away")
        elif any(output.iterdir()):
            raise DataError(f"{output}: not empty and not a dataset; name another directory or empty this one")
    elif output.exists():
        raise DataError(f"{output}: a file; name a directory")


def fingerprint(shards: Mapping[str, Shard]) -> str:
    """sha256 over the shards' names and digests: equal for equal data."""
    lines = [f"{name} {shards[name].sha256}" for name in sorted(shards)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """Number of trajectories by the lower bound of their length bin; empty bins are left out."""
    counts = np.histogram(lengths, [*LENGTH_EDGES, np.inf])[0]
    return {str(edge): int(count) for edge, count in zip(LENGTH_EDGES, counts, strict=True) if count}


def length_range(low: str) -> str:
    """A bin of `length_histogram` as text, such as "64 to 127"."""
    following = LENGTH_EDGES.index(int(low)) + 1
    return f"{low} to {LENGTH_EDGES[following] - 1}" if following < len(LENGTH_EDGES) else f"{low} and more"


def shard_of(file: Path) -> Shard:
    """Size and digest of a file."""
    with file.open("rb") as stream:
        return Shard(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def verify(directory: str | PathLike[str]) -> Metadata:
    """Reads every shard once and compares it with metadata.json.

    Raises DataError that names the first broken file, and the offset where it ends or its first broken record begins.
    """
    metadata = Metadata.load(directory)
    for _, error in broken_shards(directory, metadata):
        raise error
    return metadata


def broken_shards(directory: str | PathLike[str], metadata: Metadata) -> Iterator[tuple[str, DataError]]:
    """Names of the shards that are missing or changed, each with its error. Reads all shards."""
    for name, recorded in sorted(metadata.shards.items()):
        file = Path(directory) / name
        # A name with a folder in it would read files outside of the dataset.
        if Path(name).name != name or not file.is_file():
            problem = "is missing"
        elif (current := shard_of(file)).bytes < recorded.bytes:
            problem = f"is truncated: it ends at offset {current.bytes}, {recorded.bytes} bytes were written"
        elif current.bytes > recorded.bytes:
            problem = f"is longer than it was: {current.bytes} bytes, {recorded.bytes} were written"
        elif current.sha256 != recorded.sha256:
            problem = f"is corrupt {_first_broken_record(file)}"
        else:
            continue
        yield name, DataError(f"{file}: the shard {problem}; build the dataset again")


def _first_broken_record(file: Path) -> str:
    import tensorflow as tf  # takes six seconds to import, so only when a shard is broken

    try:
        for _ in tf.data.TFRecordDataset(str(file)):
            pass
    except tf.errors.DataLossError as error:
        # TensorFlow gives the offset in the text of the message only.
        offset = re.search(r"record at (\d+)", error.message)
        if offset:
            return f"at offset {offset.group(1)}"
    return "(every record is intact, but they are not those that were written)"
