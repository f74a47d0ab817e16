"""Encoded trajectories in TFRecord shards, written and read by TensorFlow Datasets (TFDS)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data_pipeline import typed_json
from data_pipeline.errors import DataError, shown
from data_pipeline.metadata import FILE, Metadata, broken_shards, fingerprint, verify

_TOKEN_FIELDS = {"tokens": np.int32}
_STEP_FIELDS = {
    "read_positions": np.int32,
    "state_positions": np.int32,
    "rewards": np.float32,
    "step_labels": np.float32,
}
_SCALARS = {"weight": np.int64, "outcome": np.float32}
_TEXTS = ("id", "task")
_NAME = "trajectories"
_CLASSES = "tensorflow_datasets.core.features."


def features() -> tfds.features.FeaturesDict:
    """The TFDS features of a record."""
    ragged = {**_TOKEN_FIELDS, **_STEP_FIELDS}
    arrays = {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in ragged.items()}
    return tfds.features.FeaturesDict(arrays | _SCALARS | {name: tfds.features.Text() for name in _TEXTS})


def write(splits: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path, *, shards: int) -> None:
    """Writes the records of every split into a directory, in order.

    Args:
      splits: records by split, as `data_pipeline.records.record_of` makes them.
      shards: files per split; fewer if the smallest split has fewer records.

    Raises:
      OSError: a file cannot be written.
    """
    # TFDS refuses a shard without records.
    count = max(1, min(shards, *map(len, splits.values())))
    described = {}
    for split, records in splits.items():
        cuts = boundaries(len(records), count)
        sizes = [
            write_shard(records[first:last], directory / shard_name(split, index, count))
            for index, (first, last) in enumerate(pairwise(cuts))
        ]
        described[split] = [last - first for first, last in pairwise(cuts)], sum(sizes)
    describe(directory, described)


def shard_name(split: str, index: int, count: int) -> str:
    """File name of a shard, by the rules of TFDS."""
    return f"{_NAME}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def boundaries(records: int, shards: int) -> list[int]:
    """Index of the first record of every shard, and the end of the last: `shards` + 1 numbers."""
    return [round(records * index / shards) for index in range(shards + 1)]


def write_shard(records: Iterable[Mapping[str, Any]], file: Path) -> int:
    """Writes a TFRecord file; returns the bytes of its records. Raises OSError if it cannot be written."""
    import tensorflow as tf

    form, size = features(), 0
    try:
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                # Otherwise fields are in the order of a hash table, which differs between versions of protobuf.
                example = tf.train.Example.FromString(form.serialize_example(record))
                text = example.SerializeToString(deterministic=True)
                writer.write(text)
                size += len(text)
    except tf.errors.OpError as error:
        raise OSError(" ".join(str(error).split())) from error
    return size


def describe(directory: Path, splits: Mapping[str, tuple[Sequence[int], int]]) -> None:
    """Writes the files in which TFDS describes a dataset.

    splits: by split, the number of records of each shard, and the bytes of all records.
    """
    identity = tfds.core.DatasetIdentity(
        name=_NAME, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=__name__
    )
    # Without shuffling: a trajectory's index in its split is its position in the input.
    info = tfds.core.DatasetInfo(builder=identity, features=features(), disable_shuffling=True)
    info.set_file_format("tfrecord")
    infos = []
    for name, (lengths, size) in splits.items():
        template = tfds.core.ShardedFileTemplate(
            split=name, dataset_name=_NAME, data_dir=directory, filetype_suffix="tfrecord"
        )
        infos.append(
            tfds.core.SplitInfo(name=name, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
        )
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(directory)


class ShardSplit(NamedTuple):
    """A split in memory: N trajectories, concatenated to T tokens and S steps.

    Trajectory n has tokens[token_starts[n]:token_starts[n + 1]] and steps step_starts[n] to step_starts[n + 1].
    Positions count from the trajectory's first token. Missing labels and outcomes are NaN.
    """

    ids: list[str]
    tasks: list[str]
    weights: np.ndarray  # [N] float32, number of equal trajectories that were merged into this one
    outcomes: np.ndarray  # [N] float32
    tokens: np.ndarray  # [T] int32
    token_starts: np.ndarray  # [N + 1] int64
    step_starts: np.ndarray  # [N + 1] int64
    read_positions: np.ndarray  # [S] int32
    state_positions: np.ndarray  # [S] int32
    rewards: np.ndarray  # [S] float32
    step_labels: np.ndarray  # [S] float32

    @property
    def lengths(self) -> np.ndarray:
        """Tokens by trajectory, [N]."""
        return np.diff(self.token_starts)

    @property
    def step_counts(self) -> np.ndarray:
        """Steps by trajectory, [N]."""
        return np.diff(self.step_starts)


class Skipped(NamedTuple):
    """Shards of a split that are left out because they are broken, and the trajectories in them."""

    shards: int
    trajectories: int


class Dataset:
    """An opened dataset directory. A split is read when it is first used, and stays in memory.

    `broken` shards are left out and never read.
    """

    def __init__(self, directory: Path, metadata: Metadata, broken: Mapping[str, DataError] | None = None):
        self.directory = directory
        self.metadata = metadata
        self.broken = broken or {}
        self._splits: dict[str, ShardSplit] = {}

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        with _broken_files(self.directory):
            _check_classes(self.directory / "features.json")
            return tfds.builder_from_directory(str(self.directory))

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards that are read. It changes when a shard is left out."""
        return fingerprint({name: shard for name, shard in self.metadata.shards.items() if name not in self.broken})

    def skipped(self, name: str) -> Skipped:
        """Shards and trajectories that are left out of a split."""
        if not self.broken:
            return Skipped(0, 0)
        files = self._files(name)
        return Skipped(
            sum(file in self.broken for file in files),
            sum(count for file, count in files.items() if file in self.broken),
        )

    def _files(self, name: str) -> dict[str, int]:
        """Number of records by file of a split, in order."""
        builder = self._builder
        with _broken_files(self.directory):
            info = builder.info.splits[name]
            files = dict(zip(info.filenames, info.shard_lengths, strict=True))
        # TFDS reads the files of dataset_info.json, and only those of metadata.json have a checksum.
        recorded = {file for file in self.metadata.shards if file.startswith(f"{_NAME}-{name}.")}
        if files.keys() != recorded:
            raise DataError(
                f"{self.directory}: dataset_info.json and {FILE} name other shards of split {name}; "
                "build the dataset again"
            )
        return files

    def split(self, name: str) -> ShardSplit:
        """A split by name. Raises DataError if there is none, or if all of its shards are broken."""
        if name not in self.metadata.splits:
            raise DataError(f"{self.directory}: no split {name!r}, only {', '.join(sorted(self.metadata.splits))}")
        if name not in self._splits:
            self._splits[name] = self._read(name)
        return self._splits[name]

    def _read(self, name: str) -> ShardSplit:
        # One file after the other, which keeps the order of the records.
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        files = self._files(name)
        # The name of a split stands for all of its files, so the intact ones are listed only if some are broken.
        kept = [index for index, file in enumerate(files) if file not in self.broken]
        if not kept:
            raise DataError(f"{self.directory}: no shard of split {name} is intact; build the dataset again")
        parts = [tfds.core.ReadInstruction(name, from_=index, to=index + 1, unit="shard") for index in kept]
        instruction = name if len(kept) == len(files) else functools.reduce(operator.add, parts)
        columns: dict[str, list[np.ndarray]] = {}
        with _broken_files(self.directory):
            records = self._builder.as_dataset(split=instruction, shuffle_files=False, read_config=config)
            # Ragged batches are converted a thousand records at a time, not one by one.
            for batch in records.ragged_batch(1024):
                for field, value in batch.items():
                    if field in _TOKEN_FIELDS or field in _STEP_FIELDS:
                        columns.setdefault(field, []).append(value.flat_values.numpy())
                        columns.setdefault(f"{field} lengths", []).append(value.row_lengths().numpy())
                    else:
                        columns.setdefault(field, []).append(value.numpy())
            arrays = {field: np.concatenate(parts) for field, parts in columns.items()}
            split = ShardSplit(
                ids=[id.decode() for id in arrays["id"]],
                tasks=[task.decode() for task in arrays["task"]],
                weights=arrays["weight"].astype(np.float32),
                outcomes=arrays["outcome"],
                token_starts=_starts(arrays["tokens lengths"]),
                step_starts=_starts(arrays["read_positions lengths"]),
                tokens=arrays["tokens"],
                **{field: arrays[field] for field in _STEP_FIELDS},
            )
        expected = self.metadata.splits[name].trajectories - self.skipped(name).trajectories
        if len(split.ids) != expected:
            raise DataError(f"{self.directory}: split {name} has {len(split.ids)} records, not {expected}")
        return split


def open_dataset(
    directory: str | PathLike[str], *, encoder_fingerprint: str | None = None, skip_bad: bool = False
) -> Dataset:
    """Verifies the shards of a dataset directory and opens it. A split is read when it is first used.

    Args:
      directory: a directory that `data_pipeline.build` wrote.
      encoder_fingerprint: `Encoder.fingerprint` of the model's tokenizer. A dataset of another tokenizer is refused.
      skip_bad: leaves missing, truncated and corrupt shards out instead of raising. They are in `Dataset.broken`, and
        every epoch is planned without them.

    Raises:
      DataError: a shard is missing, truncated or corrupt, or the dataset was built with another tokenizer.
    """
    metadata = Metadata.load(directory) if skip_bad else verify(directory)
    broken = dict(broken_shards(directory, metadata)) if skip_bad else {}
    if encoder_fingerprint is not None and encoder_fingerprint != metadata.tokenizer:
        raise DataError(
            f"{directory}: built with tokenizer {metadata.tokenizer[:12]}, the model's is {encoder_fingerprint[:12]}; "
            "build the dataset again with the model's tokenizer"
        )
    return Dataset(Path(directory), metadata, broken)


@contextmanager
def _broken_files(directory: Path) -> Iterator[None]:
    """Raises what TFDS and TensorFlow raise for broken files as a DataError. The shards have been verified before."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # features.json and dataset_info.json are parsed by TFDS, which raises anything
        reason = shown(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        raise DataError(
            f"{directory}: features.json or dataset_info.json cannot be read ({reason}); build the dataset again"
        ) from error


def _check_classes(features: Path) -> None:
    """Raises DataError if features.json names a class that is none of TFDS, which would import its module."""
    nodes: list[Any] = [typed_json.read(features, dict[str, Any], fix="build the dataset again")]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            name = node.get("pythonClassName", _CLASSES)
            if not isinstance(name, str) or not name.startswith(_CLASSES):
                raise DataError(
                    f"{features}: pythonClassName = {shown(name)}: must start with {_CLASSES}; build the dataset again"
                )
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
