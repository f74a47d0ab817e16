"""The build as an Apache Beam pipeline, on any runner: the shards are those of the local build, byte for byte.

Rows are encoded wherever there is room, and equal ones merged into the first of them. A row's place, its file and line,
is its order: where the shards of a split begin is found from counts of places, and each shard is sorted by itself. No
worker holds more than a shard, and the process that starts the pipeline some forty bytes a trajectory.

This is the one module that imports Apache Beam.
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
from data_pipeline.metadata import FILE, Metadata, Shard, check_output, shard_of
from data_pipeline.output import staged_directory, write_errors
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
from data_pipeline.splits import Inputs, in_two_splits
from data_pipeline.trajectory import numbered, parse_line

# A place is the number of a file, and in its lowest bits the line. Places are counted by blocks of lines.
LINE_BITS = 40
BLOCK_BITS = 12
_SUMMARY, _WRITTEN = "summary", ".written"

Key = tuple[str, int]  # a split, and a block or a shard of it
Placed = tuple[int, dict[str, Any]]  # a record with its place


class _Summary(msgspec.Struct):
    """What is known of the rows: counts by split, in the order of their first rows, and what is wrong with some."""

    counts: list[tuple[str, RowCounts]]
    bad: int
    first_bad: list[tuple[int, str]]
    leak: list[tuple[int, str]]


class _Written(msgspec.Struct):
    """A shard as it was written: `size` in bytes of records, the arrays of `Sizes` as bytes of 64-bit numbers."""

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
        integers = (np.frombuffer(one, np.int64) for one in (self.lengths, self.steps, self.weights))
        return Sizes(*integers, np.frombuffer(self.returns, np.float64), self.tasks)


class _Layout(NamedTuple):
    """How many records of a split lie before each block, and the ranks at which its shards begin and the last ends."""

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
    """As `data_pipeline.build.build`, with the same arguments, result and errors but for what follows.

    Args:
      inputs, output: where Beam's file systems find them (`gs://...`); local paths for runners on this machine.
        An output elsewhere than in a local directory must not be there yet.
      skip_bad: called with the first errors alone; how many there are is the metadata's `skipped`.
      options: of the pipeline (`--runner=...`).
    """
    files = [(split, str(path)) for split, paths in inputs.items() for path in paths]
    for _, path in files:
        if not FileSystems.exists(path):
            raise DataError(f"{path}: cannot be read: no such file")
    local = FileSystems.get_scheme(output) is None
    if local:
        output = str(Path(output).absolute())
        check_output(Path(output))
    elif FileSystems.match([f"{output}/*"])[0].metadata_list:
        raise DataError(f"{output}: not empty; name another directory or empty this one")
    staged = staged_directory(output, overwrite=True) if local else _staged_remotely(output)
    with write_errors(output, "the dataset cannot be written"), staged as staging:
        folder = str(staging)
        _run(files, encoder, folder, Preparing(max_length, too_long, shards), options)
        summary = msgspec.msgpack.decode(_read(FileSystems.join(folder, _SUMMARY)), type=_Summary)
        _raise_or_pass(summary, skip_bad)
        settings = {"max_length": max_length, "too_long": too_long, "skipped": summary.bad}
        return _describe(folder, summary, inputs, encoder, settings)


@contextmanager
def _staged_remotely(output: str) -> Iterator[str]:
    """As `staged_directory`, on any of Beam's file systems: files are moved one by one, metadata.json last."""
    parent, name = FileSystems.split(output)
    staging = FileSystems.join(parent, f".{name}.building")
    try:
        _remove(staging)  # of a build that was killed
        FileSystems.mkdirs(staging)
        yield staging
        _move(staging, output)
    finally:
        _remove(staging)


class Preparing(NamedTuple):
    max_length: int | None
    too_long: TooLong
    shards: int


def _run(
    files: list[tuple[str | None, str]], encoder: Encoder, folder: str, settings: Preparing, options: Sequence[str]
) -> None:
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    except ValueError as error:  # a runner that there is not
        raise DataError(f"--beam {' '.join(options)}: {' '.join(str(error).split())}") from None
    prepare = _Prepare(encoder.tokenizer, encoder.source, settings)
    with pipeline:
        prepared = (
            pipeline
            | "Files" >> beam.Create(list(enumerate(files)))
            | "Read" >> beam.FlatMap(_rows)
            | "Spread" >> beam.Reshuffle()
            | "Prepare" >> beam.ParDo(prepare).with_outputs("tasks", "counts", "bad", main="records")
        )
        merged = (
            prepared.records
            | "Merge" >> beam.CombinePerKey(_merge)
            | "Place" >> beam.Map(lambda found: (found[0][0], found[1]))
        )
        _summarize(pipeline, prepared, FileSystems.join(folder, _SUMMARY))
        _write(merged, folder, settings.shards)


def _rows(numbered_file: tuple[int, tuple[str | None, str]]) -> Iterator[tuple[int, str | None, str, bytes]]:
    """Place, split, "path:line" and text of every row of a file."""
    index, (split, path) = numbered_file
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        for number, line in numbered(file):
            yield index << LINE_BITS | number, split, f"{path}:{number}", line


class _Prepare(beam.DoFn):
    """Rows to ((split, identity), (place, record)); and their tasks, counts and errors."""

    def __init__(self, tokenizer: Any, source: str, settings: Preparing):
        self._tokenizer, self._source, self._settings = tokenizer, source, settings

    def setup(self) -> None:
        self._encoder = Encoder(self._tokenizer, source=self._source)

    def start_bundle(self) -> None:
        # It remembers what it encoded: for a bundle, not for as long as a worker lives.
        self._preparation = Preparation(self._encoder, self._settings.max_length, self._settings.too_long)

    def process(self, row: tuple[int, str | None, str, bytes]) -> Iterator[Any]:
        place, given, where, line = row
        try:
            trajectory = parse_line(line, where=where)
            name = f"{where} ({trajectory.id})"
            split = split_of_row(trajectory, given, name)
            yield TaggedOutput("tasks", (trajectory.task_id, {split: (place, name)}))
            yield TaggedOutput(
                "counts", (split, (place, RowCounts()))
            )  # the split is there, whatever becomes of the row
            prepared = self._preparation.prepare(trajectory, name)
        except DataError as error:
            yield TaggedOutput("bad", (place, str(error)))
            return
        yield TaggedOutput("counts", (split, (place, prepared.counts)))
        if prepared.steps is not None:
            yield (split, identity(trajectory, prepared.steps)), (place, record_of(trajectory, prepared.steps))


def _merge(found: Iterable[Placed]) -> Placed:
    """The first of equal trajectories, with the weight of all."""
    first: Placed | None = None
    weight = 0
    for placed in found:
        weight += placed[1]["weight"]
        if first is None or placed[0] < first[0]:
            first = placed
    return first[0], {**first[1], "weight": weight}


def _summarize(pipeline: beam.Pipeline, prepared: Any, path: str) -> None:
    counts = prepared.counts | "Count rows" >> beam.CombinePerKey(_add_counts)
    leaks = prepared.tasks | "First rows" >> beam.CombinePerKey(_first_rows) | "Leaks" >> beam.FlatMap(_leaks)
    parts = {
        "counts": AsList(counts),
        "bad": AsSingleton(prepared.bad | "Count bad" >> beam.combiners.Count.Globally()),
        "first_bad": AsSingleton(prepared.bad | "First bad" >> beam.combiners.Top.Smallest(MOST_LISTED)),
        "leak": AsSingleton(leaks | "First leak" >> beam.combiners.Top.Smallest(1)),
    }
    pipeline | "Summary" >> beam.Create([path]) | "Summarize" >> beam.Map(_store_summary, **parts)


def _add_counts(found: Iterable[tuple[int, RowCounts]]) -> tuple[int, RowCounts]:
    first, total = 1 << 62, RowCounts()
    for place, counts in found:
        first, total = min(first, place), total + counts
    return first, total


def _first_rows(found: Iterable[dict[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    """By split, the first row of a task."""
    first: dict[str, tuple[int, str]] = {}
    for rows in found:
        for split, row in rows.items():
            first[split] = min(row, first.get(split, row))
    return first


def _leaks(found: tuple[str, dict[str, tuple[int, str]]]) -> Iterator[tuple[int, str]]:
    """The first row of a task in a second split, where there is one."""
    task, rows = found
    (_, known), *others = sorted((row, split) for split, row in rows.items())
    for (place, name), split in others[:1]:
        yield place, f"{name}: {in_two_splits(task, known, split)}"


def _store_summary(path: str, counts: list, bad: int, first_bad: list, leak: list) -> None:
    in_order = [(split, found) for split, (_, found) in sorted(counts, key=lambda one: one[1][0])]
    _store(path, msgspec.msgpack.encode(_Summary(in_order, bad, first_bad, leak)))


def _write(merged: beam.PCollection, folder: str, shards: int) -> None:
    """Writes (split, (place, record)) as shards."""
    places = merged | "Blocks" >> beam.Map(lambda one: ((one[0], one[1][0] >> BLOCK_BITS), one[1][0]))
    layout = AsSingleton(
        places
        | "Count blocks" >> beam.combiners.Count.PerKey()
        | "All blocks" >> beam.combiners.ToList()
        | "Lay out" >> beam.Map(_layout, shards)
    )
    begins = AsSingleton(
        places
        | "Group blocks" >> beam.GroupByKey()
        | "Find shards" >> beam.FlatMap(_begins, layout)
        | "All shards" >> beam.combiners.ToList()
        | "Sort shards" >> beam.Map(_sorted_by_split)
    )
    (
        merged
        | "Choose shard" >> beam.Map(_with_shard, begins)
        | "Group shards" >> beam.GroupByKey()
        | "Write shard" >> beam.Map(_write_shard, layout, folder)
    )


def _layout(blocks: list[tuple[Key, int]], shards: int) -> _Layout:
    totals: Counter[str] = Counter()
    before = {}
    for (split, block), count in sorted(blocks):
        before[split, block] = totals[split]
        totals[split] += count
    count = max(1, min([shards, *totals.values()]))
    return _Layout(before, {split: shards_lib.boundaries(total, count) for split, total in totals.items()})


def _begins(block: tuple[Key, Iterable[int]], layout: _Layout) -> Iterator[Key]:
    """The split and the first place of every shard that begins in a block."""
    key, places = block[0], sorted(block[1])
    for cut in layout.cuts[key[0]][:-1]:
        if 0 <= cut - layout.before[key] < len(places):
            yield key[0], places[cut - layout.before[key]]


def _sorted_by_split(begins: list[Key]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for split, place in sorted(begins):
        found.setdefault(split, []).append(place)
    return found


def _with_shard(one: tuple[str, Placed], begins: dict[str, list[int]]) -> tuple[Key, Placed]:
    split, placed = one
    return (split, bisect_right(begins[split], placed[0]) - 1), placed


def _write_shard(shard: tuple[Key, Iterable[Placed]], layout: _Layout, folder: str) -> None:
    (split, index), found = shard
    records = [record for _, record in sorted(found, key=itemgetter(0))]
    name = shards_lib.shard_name(split, index, len(layout.cuts[split]) - 1)
    with tempfile.TemporaryDirectory() as here:
        file = Path(here) / name
        size = shards_lib.write_shard(records, file)
        _copy(file, FileSystems.join(folder, name))
        sizes = sizes_of(records)
        arrays = {field: getattr(sizes, field).tobytes() for field in ("lengths", "steps", "weights", "returns")}
        written = _Written(split, index, name, shard_of(file), size, **arrays, tasks=sizes.tasks)
    _store(FileSystems.join(folder, name + _WRITTEN), msgspec.msgpack.encode(written))


def _raise_or_pass(summary: _Summary, skip_bad: Callable[[DataError], None] | None) -> None:
    """Raises the first error of a row that the local build would stop at; others are given to `skip_bad`."""
    leaks = [(place, 0, SplitError(message)) for place, message in summary.leak]
    bad = [(place, 1, DataError(message)) for place, message in summary.first_bad]
    if fatal := sorted(leaks if skip_bad else [*leaks, *bad], key=itemgetter(0, 1)):
        raise fatal[0][2]
    for _, _, error in bad:
        skip_bad(error)


def _describe(folder: str, summary: _Summary, inputs: Inputs, encoder: Encoder, settings: dict[str, Any]) -> Metadata:
    """Adds metadata.json and TFDS's files to the shards, and takes away what lies beside them."""
    paths = [one.path for one in FileSystems.match([FileSystems.join(folder, "*" + _WRITTEN)])[0].metadata_list]
    found = [msgspec.msgpack.decode(_read(path), type=_Written) for path in paths]
    written = {
        split: sorted((one for one in found if one.split == split), key=lambda one: one.index)
        for split, _ in summary.counts
    }
    totals = {split: sum(len(one.tasks) for one in written[split]) for split in written}
    check_not_empty({split: (counts, totals[split]) for split, counts in summary.counts}, inputs)
    splits = {}
    for split, counts in summary.counts:
        *arrays, tasks = zip(*(one.sizes for one in written[split]), strict=True)
        splits[split] = split_metadata(counts, Sizes(*map(np.concatenate, arrays), [t for part in tasks for t in part]))
    metadata = Metadata(
        tokenizer=encoder.fingerprint,
        pad_id=encoder.pad_id,
        **settings,
        splits=splits,
        shards={one.name: one.shard for one in sorted(found, key=lambda one: one.name)},
    )
    with tempfile.TemporaryDirectory() as here:
        lengths = {
            split: ([len(one.tasks) for one in parts], sum(one.size for one in parts))
            for split, parts in written.items()
        }
        shards_lib.describe(Path(here), lengths)
        metadata.save(here)
        for file in Path(here).iterdir():
            _copy(file, FileSystems.join(folder, file.name))
    FileSystems.delete([*paths, FileSystems.join(folder, _SUMMARY)])
    return metadata


def _read(path: str) -> bytes:
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        return file.read()


def _store(path: str, content: bytes) -> None:
    """A file that is there whole, or not at all: a runner may try a thing twice, and at the same time."""
    beside = f"{path}.{uuid.uuid4().hex}"
    with FileSystems.create(beside, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write(content)
    FileSystems.rename([beside], [path])


def _copy(file: Path, path: str) -> None:
    _store(path, file.read_bytes())


def _move(folder: str, output: str) -> None:
    """Moves the files of a folder, the one that makes it a dataset last."""
    paths = [one.path for one in FileSystems.match([FileSystems.join(folder, "*")])[0].metadata_list]
    names = sorted((FileSystems.split(path)[1] for path in paths), key=lambda name: name == FILE)
    FileSystems.mkdirs(output)
    for name in names:
        FileSystems.rename([FileSystems.join(folder, name)], [FileSystems.join(output, name)])


def _remove(folder: str) -> None:
    if FileSystems.exists(folder) or FileSystems.match([FileSystems.join(folder, "*")])[0].metadata_list:
        FileSystems.delete([folder])
