"""The build as an Apache Beam pipeline, on any runner. The shards are those of the local build, byte for byte.

Rows are encoded on any worker, and equal ones are merged into the first of them. A row's rank is a number made of its
file and line, and defines the order of the records. The first rank of every shard is computed from counts of ranks,
and each shard is sorted on its own. A worker holds at most one shard, and the process that starts the pipeline about
forty bytes per trajectory.

This is the only module that imports Apache Beam.
"""

from __future__ import annotations

import tempfile
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import msgspec
import numpy as np
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsList, AsSingleton, TaggedOutput

from data_pipeline import shards as shards_lib
from data_pipeline.encode import Encoder
from data_pipeline.errors import MOST_LISTED, DataError, SplitError
from data_pipeline.locks import locked
from data_pipeline.metadata import FILE, Metadata, Shard, check_output, shard_of
from data_pipeline.output import backup_of, staged_directory, staging_of, write_errors
from data_pipeline.paths import Named, check_paths
from data_pipeline.preferences import parse_row
from data_pipeline.records import (
    Preparation,
    RowCounts,
    Sizes,
    TooLong,
    check_not_empty,
    identity,
    record_of,
    sizes_of,
    split_metadata,
    split_of_row,
)
from data_pipeline.source import check_lines
from data_pipeline.splits import Inputs, in_two_splits
from data_pipeline.trajectory import numbered

# A rank is the number of a file, and in its LINE_BITS lowest bits the line. Ranks are counted by blocks of
# 2**BLOCK_BITS lines, because every worker reads the table of counts.
LINE_BITS = 40
BLOCK_BITS = 12
_SUMMARY, _WRITTEN = "summary", ".written"

Key = tuple[str, int]  # a split, and a block or a shard of it
Ranked = tuple[int, dict[str, Any]]  # a record with its rank


class _Summary(msgspec.Struct):
    """Row counts by split, in the order of their first rows; the number of bad rows, the first of them; the first leak.

    Errors are pairs of rank and message.
    """

    counts: list[tuple[str, RowCounts]]
    bad: int
    first_bad: list[tuple[int, str]]
    leak: list[tuple[int, str]]


class _Written(msgspec.Struct):
    """Description of a written shard: `size` in bytes of records, the arrays of `Sizes` as bytes of 64-bit numbers."""

    split: str
    index: int
    name: str
    shard: Shard
    size: int
    lengths: bytes
    steps: bytes
    weights: bytes
    returns: bytes
    tasks: list[bytes]

    @property
    def sizes(self) -> Sizes:
        integers = (np.frombuffer(field, np.int64) for field in (self.lengths, self.steps, self.weights))
        return Sizes(*integers, np.frombuffer(self.returns, np.float64), self.tasks)


class _Layout(NamedTuple):
    """Number of records of the split before each block, and by split the indices where its shards start and end."""

    before: dict[Key, int]
    cuts: dict[str, list[int]]


def build(
    inputs: Inputs,
    encoder: Encoder,
    output: str,
    *,
    max_length: int | None,
    too_long: TooLong = "error",
    shards: int = 4,
    skip_bad: Callable[[DataError], None] | None = None,
    options: Sequence[str] = (),
) -> Metadata:
    """As `data_pipeline.build.build`, with these differences.

    Args:
      inputs: plain JSON Lines. Any other form is an error.
      inputs, output: paths in Beam's file systems (`gs://...`), or local ones for runners on this machine. An output
        that is not local must be absent or empty.
      skip_bad: called with the first MOST_LISTED errors only; the metadata's `skipped` counts all of them.
      options: of the pipeline (`--runner=...`).
    """
    files = [(split, str(path)) for split, paths in inputs.items() for path in paths]
    for _, path in files:
        # Checked here, because an error within the pipeline comes with the runner's own traceback.
        if not FileSystems.exists(path):
            raise DataError(f"{path}: cannot be read: no such file")
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            check_lines(file, path)
    local = FileSystems.get_scheme(output) is None
    if local:
        output = str(Path(output).absolute())
        check_paths([Named("input", Path(path)) for _, path in files], [Named("output", Path(output))])
    elif FileSystems.match([f"{output}/*"])[0].metadata_list:
        raise DataError(f"{output}: not empty; name another directory or empty this one")
    staged = _staged_locally(Path(output)) if local else _staged_remotely(output)
    with write_errors(output, "the dataset cannot be written"), staged as staging:
        folder = str(staging)
        _run(files, encoder, folder, _Settings(max_length, too_long, shards), options)
        summary = msgspec.msgpack.decode(_read(FileSystems.join(folder, _SUMMARY)), type=_Summary)
        _raise_or_pass(summary, skip_bad)
        settings = {"max_length": max_length, "too_long": too_long, "skipped": summary.bad}
        return _describe(folder, summary, inputs, encoder, settings)


class _Settings(NamedTuple):
    """Arguments of `build` that workers need."""

    max_length: int | None
    too_long: TooLong
    shards: int


def _run(
    files: list[tuple[str | None, str]], encoder: Encoder, folder: str, settings: _Settings, options: Sequence[str]
) -> None:
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    except ValueError as error:  # such as an unknown runner
        raise DataError(f"--beam {' '.join(options)}: {' '.join(str(error).split())}") from None
    # Workers get the tokenizer and make an Encoder of it: an Encoder has locks, which cannot be pickled.
    prepare = _Prepare(encoder.tokenizer, encoder.source, settings, encoder.choices)
    with pipeline:
        prepared = (
            pipeline
            | "Files" >> beam.Create(list(enumerate(files)))
            | "Read" >> beam.FlatMap(_rows)
            # Otherwise Beam fuses the steps around it, and one worker also encodes all rows of a file.
            | "Spread" >> beam.Reshuffle()
            | "Prepare" >> beam.ParDo(prepare).with_outputs("tasks", "counts", "bad", main="records")
        )
        merged = (
            prepared.records
            | "Merge" >> beam.CombinePerKey(_merge)
            | "By split" >> beam.Map(lambda merged: (merged[0][0], merged[1]))
        )
        _summarize(pipeline, prepared, FileSystems.join(folder, _SUMMARY))
        _write(merged, folder, settings.shards)


def _rows(numbered_file: tuple[int, tuple[str | None, str]]) -> Iterator[tuple[int, str | None, str, bytes]]:
    """Rank, split, "path:line" and text of every row of a file."""
    index, (split, path) = numbered_file
    # Beam decompresses by file name, the local build does not.
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        for number, line in numbered(file):
            yield index << LINE_BITS | number, split, f"{path}:{number}", line


class _Prepare(beam.DoFn):
    """Rows to ((split, identity), (rank, record)), with tagged outputs for their tasks, counts and errors."""

    def __init__(self, tokenizer: Any, source: str, settings: _Settings, choices: dict[str, Any]):
        self._tokenizer, self._source, self._settings, self._choices = tokenizer, source, settings, choices

    def setup(self) -> None:
        self._encoder = Encoder(self._tokenizer, source=self._source, **self._choices)

    def start_bundle(self) -> None:
        # It caches conversations without a bound, so it lives as long as a bundle, not as a worker.
        self._preparation = Preparation(self._encoder, self._settings.max_length, self._settings.too_long)

    def process(self, row: tuple[int, str | None, str, bytes]) -> Iterator[Any]:
        rank, file_split, where, line = row
        try:
            trajectory = parse_row(line, where=where)
            name = f"{where} ({trajectory.id})"
            split = split_of_row(trajectory, file_split, name)
            # Before the row is prepared, as in the local build: a leak is found even in a row that is bad.
            yield TaggedOutput("tasks", (trajectory.task_id, {split: (rank, name)}))
            # A split is listed even if all of its rows are bad.
            yield TaggedOutput("counts", (split, (rank, RowCounts())))
            prepared = self._preparation.prepare(trajectory, name)
        except DataError as error:
            # An output and not an exception: the error to raise is the one of lowest rank, which no worker knows.
            yield TaggedOutput("bad", (rank, str(error)))
            return
        yield TaggedOutput("counts", (split, (rank, prepared.counts)))
        if prepared.steps is not None:
            yield (split, identity(trajectory, prepared.steps)), (rank, record_of(trajectory, prepared.steps))


def _merge(equal: Iterable[Ranked]) -> Ranked:
    """The first of equal trajectories, with the weight of all."""
    # Beam may combine parts and then their results, so neither order nor grouping may matter.
    first: Ranked | None = None
    weight = 0
    for ranked in equal:
        weight += ranked[1]["weight"]
        if first is None or ranked[0] < first[0]:
            first = ranked
    # A new record: Beam's elements must not be changed.
    return first[0], {**first[1], "weight": weight}


def _summarize(pipeline: beam.Pipeline, prepared: Any, path: str) -> None:
    """Stores the `_Summary` of the rows at `path`."""
    # The results of a pipeline reach the process that started it only through files.
    counts = prepared.counts | "Count rows" >> beam.CombinePerKey(_add_counts)
    leaks = prepared.tasks | "First rows" >> beam.CombinePerKey(_first_rows) | "Leaks" >> beam.FlatMap(_leaks)
    parts = {
        "counts": AsList(counts),
        "bad": AsSingleton(prepared.bad | "Count bad" >> beam.combiners.Count.Globally()),
        "first_bad": AsSingleton(prepared.bad | "First bad" >> beam.combiners.Top.Smallest(MOST_LISTED)),
        "leak": AsSingleton(leaks | "First leak" >> beam.combiners.Top.Smallest(1)),
    }
    # A single element with the results as side inputs: it waits for all of them.
    pipeline | "Summary" >> beam.Create([path]) | "Summarize" >> beam.Map(_store_summary, **parts)


def _add_counts(ranked_counts: Iterable[tuple[int, RowCounts]]) -> tuple[int, RowCounts]:
    # Above every rank.
    first, total = 1 << 62, RowCounts()
    for rank, counts in ranked_counts:
        first, total = min(first, rank), total + counts
    return first, total


def _first_rows(partial_results: Iterable[dict[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    """The first row of a task, by split."""
    first: dict[str, tuple[int, str]] = {}
    for rows in partial_results:
        for split, row in rows.items():
            first[split] = min(row, first.get(split, row))
    return first


def _leaks(task_rows: tuple[str, dict[str, tuple[int, str]]]) -> Iterator[tuple[int, str]]:
    """The first row of a task in a second split, if there is one."""
    task, rows = task_rows
    (_, first_split), *others = sorted((row, split) for split, row in rows.items())
    for (rank, name), split in others[:1]:
        yield rank, f"{name}: {in_two_splits(task, first_split, split)}"


def _store_summary(path: str, counts: list, bad: int, first_bad: list, leak: list) -> None:
    # By the rank of the first row: Beam gives them in no order.
    in_order = [(split, total) for split, (_, total) in sorted(counts, key=lambda item: item[1][0])]
    _store(path, msgspec.msgpack.encode(_Summary(in_order, bad, first_bad, leak)))


def _write(merged: beam.PCollection, folder: str, shards: int) -> None:
    """Writes (split, (rank, record)) as shards."""
    ranks = merged | "Blocks" >> beam.Map(lambda item: ((item[0], item[1][0] >> BLOCK_BITS), item[1][0]))
    layout = AsSingleton(
        ranks
        | "Count blocks" >> beam.combiners.Count.PerKey()
        | "All blocks" >> beam.combiners.ToList()
        | "Lay out" >> beam.Map(_layout, shards)
    )
    # The counts give the index of each shard's first record; its block is sorted to find the rank at this index.
    starts = AsSingleton(
        ranks
        | "Group blocks" >> beam.GroupByKey()
        | "Find shards" >> beam.FlatMap(_starts, layout)
        | "All shards" >> beam.combiners.ToList()
        | "Sort shards" >> beam.Map(_sorted_by_split)
    )
    (
        merged
        | "Choose shard" >> beam.Map(_with_shard, starts)
        | "Group shards" >> beam.GroupByKey()
        | "Write shard" >> beam.Map(_write_shard, layout, folder)
    )


def _layout(blocks: list[tuple[Key, int]], shards: int) -> _Layout:
    totals: Counter[str] = Counter()
    before = {}
    # Sorted, because Beam gives them in no order.
    for (split, block), count in sorted(blocks):
        before[split, block] = totals[split]
        totals[split] += count
    count = max(1, min([shards, *totals.values()]))
    return _Layout(before, {split: shards_lib.boundaries(total, count) for split, total in totals.items()})


def _starts(block: tuple[Key, Iterable[int]], layout: _Layout) -> Iterator[Key]:
    """The split and the first rank of every shard that starts in a block."""
    key, ranks = block[0], sorted(block[1])
    # The last cut is the end of the split.
    for cut in layout.cuts[key[0]][:-1]:
        if 0 <= cut - layout.before[key] < len(ranks):
            yield key[0], ranks[cut - layout.before[key]]


def _sorted_by_split(starts: list[Key]) -> dict[str, list[int]]:
    by_split: dict[str, list[int]] = {}
    for split, rank in sorted(starts):
        by_split.setdefault(split, []).append(rank)
    return by_split


def _with_shard(item: tuple[str, Ranked], starts: dict[str, list[int]]) -> tuple[Key, Ranked]:
    split, ranked = item
    return (split, bisect_right(starts[split], ranked[0]) - 1), ranked


def _write_shard(shard: tuple[Key, Iterable[Ranked]], layout: _Layout, folder: str) -> None:
    """Writes a shard and, next to it, its description: a `_Written` in a file that `_describe` reads and removes."""
    (split, index), ranked = shard
    records = [record for _, record in sorted(ranked, key=itemgetter(0))]
    name = shards_lib.shard_name(split, index, len(layout.cuts[split]) - 1)
    with tempfile.TemporaryDirectory() as here:
        # Local first: the digest is computed from the file, and `_store` makes the copy appear complete.
        file = Path(here) / name
        size = shards_lib.write_shard(records, file)
        _copy(file, FileSystems.join(folder, name))
        sizes = sizes_of(records)
        arrays = {field: getattr(sizes, field).tobytes() for field in ("lengths", "steps", "weights", "returns")}
        written = _Written(split, index, name, shard_of(file), size, **arrays, tasks=sizes.tasks)
    _store(FileSystems.join(folder, name + _WRITTEN), msgspec.msgpack.encode(written))


def _raise_or_pass(summary: _Summary, skip_bad: Callable[[DataError], None] | None) -> None:
    """Raises the error at which the local build would stop; without one, passes bad rows to `skip_bad`."""
    # A leak comes before a bad row of the same rank: the local build checks the split first.
    leaks = [(rank, 0, SplitError(message)) for rank, message in summary.leak]
    bad = [(rank, 1, DataError(message)) for rank, message in summary.first_bad]
    if fatal := sorted(leaks if skip_bad else [*leaks, *bad], key=itemgetter(0, 1)):
        raise fatal[0][2]
    for _, _, error in bad:
        skip_bad(error)


def _describe(folder: str, summary: _Summary, inputs: Inputs, encoder: Encoder, settings: dict[str, Any]) -> Metadata:
    """Adds metadata.json and the files of TFDS to the shards, and removes the descriptions and the summary."""
    paths = [file.path for file in FileSystems.match([FileSystems.join(folder, "*" + _WRITTEN)])[0].metadata_list]
    shards = [msgspec.msgpack.decode(_read(path), type=_Written) for path in paths]
    # Splits in the order of their first rows, and shards by name: so are they in the metadata of the local build.
    written = {
        split: sorted((shard for shard in shards if shard.split == split), key=lambda shard: shard.index)
        for split, _ in summary.counts
    }
    totals = {split: sum(len(shard.tasks) for shard in parts) for split, parts in written.items()}
    check_not_empty({split: (counts, totals[split]) for split, counts in summary.counts}, inputs)
    splits = {}
    for split, counts in summary.counts:
        *arrays, tasks = zip(*(shard.sizes for shard in written[split]), strict=True)
        splits[split] = split_metadata(counts, Sizes(*map(np.concatenate, arrays), [t for part in tasks for t in part]))
    metadata = Metadata(
        tokenizer=encoder.fingerprint,
        pad_id=encoder.pad_id,
        **settings,
        splits=splits,
        shards={shard.name: shard.shard for shard in sorted(shards, key=lambda shard: shard.name)},
    )
    with tempfile.TemporaryDirectory() as here:
        lengths = {
            split: ([len(shard.tasks) for shard in parts], sum(shard.size for shard in parts))
            for split, parts in written.items()
        }
        shards_lib.describe(Path(here), lengths)
        metadata.save(here)
        for file in Path(here).iterdir():
            _copy(file, FileSystems.join(folder, file.name))
    FileSystems.delete([*paths, FileSystems.join(folder, _SUMMARY)])
    return metadata


@contextmanager
def _staged_locally(output: Path) -> Iterator[Path]:
    with locked(output, staging=(staging_of(output), backup_of(output))):
        check_output(output)
        with staged_directory(output, overwrite=True) as staging:
            yield staging


@contextmanager
def _staged_remotely(output: str) -> Iterator[str]:
    """As `staged_directory`, on any of Beam's file systems: files are moved one by one, metadata.json last.

    Object stores have no locks.
    """
    parent, name = FileSystems.split(output)
    staging = FileSystems.join(parent, f".{name}.building")
    try:
        _remove(staging)  # of a build that was killed
        FileSystems.mkdirs(staging)
        yield staging
        _move(staging, output)
    finally:
        _remove(staging)


def _read(path: str) -> bytes:
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        return file.read()


def _store(path: str, content: bytes) -> None:
    """Writes a file that is complete or absent."""
    # A unique staging path, because a runner may do the same work twice, and at the same time.
    staging = f"{path}.{uuid.uuid4().hex}"
    with FileSystems.create(staging, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write(content)
    FileSystems.rename([staging], [path])


def _copy(file: Path, path: str) -> None:
    _store(path, file.read_bytes())


def _move(folder: str, output: str) -> None:
    """Moves the files of a folder, metadata.json last, because it makes the folder a dataset."""
    paths = [file.path for file in FileSystems.match([FileSystems.join(folder, "*")])[0].metadata_list]
    names = sorted((FileSystems.split(path)[1] for path in paths), key=lambda name: name == FILE)
    FileSystems.mkdirs(output)
    for name in names:
        FileSystems.rename([FileSystems.join(folder, name)], [FileSystems.join(output, name)])


def _remove(folder: str) -> None:
    # Object stores have no folders, only files with a common prefix.
    if FileSystems.exists(folder) or FileSystems.match([FileSystems.join(folder, "*")])[0].metadata_list:
        FileSystems.delete([folder])
