"""What a dataset directory says of itself, and the check that its shards are the ones that were written."""

from __future__ import annotations

import hashlib
import re
from os import PathLike
from pathlib import Path
from typing import Literal

import msgspec

from data_pipeline.errors import DataError

FILE = "metadata.json"
FORMAT = "jaxprm-trajectories"
VERSION = 1
LENGTH_EDGES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TFRecord file as it was written."""

    bytes: int
    sha256: str


class SplitMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counts of one split. rows = errors + dropped + merged + trajectories; the weights sum to merged + trajectories.

    Of the rows read, `errors` ended in an error, `dropped` were too long, `windowed` too long and cut, `merged` equal
    to one before. What is stored is `trajectories` of `tasks` with `steps` and `tokens`, the longest `longest` tokens
    or `most_steps` steps. `lengths[i]` trajectories have LENGTH_EDGES[i] <= tokens < LENGTH_EDGES[i + 1].
    `mean_return` is over rows, so with weights.
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
    mean_return: float
    lengths: list[int]


class Metadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """metadata.json of a dataset directory. `skipped` bad rows were left out and are in no split's counts."""

    format: Literal["jaxprm-trajectories"] = FORMAT
    version: Literal[1] = VERSION
    tokenizer: str
    pad_id: int
    max_length: int | None
    too_long: Literal["error", "drop", "window"]
    skipped: int = 0
    splits: dict[str, SplitMetadata]
    shards: dict[str, Shard]

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards: equal for equal data."""
        lines = [f"{name} {self.shards[name].sha256}" for name in sorted(self.shards)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> Metadata:
        file = Path(directory) / FILE
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except OSError as error:
            raise DataError(f"{directory}: not a dataset, {FILE} cannot be read: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise DataError(f"{file}: not the metadata of a dataset: {error}; build it again") from None

    def save(self, directory: str | PathLike[str]) -> None:
        (Path(directory) / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def shard_of(file: Path) -> Shard:
    with file.open("rb") as stream:
        return Shard(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def verify(directory: str | PathLike[str]) -> Metadata:
    """Reads every shard once and compares it with what was written.

    Raises DataError naming the file and its size, or the offset of the first broken record.
    """
    metadata = Metadata.load(directory)
    for name, recorded in sorted(metadata.shards.items()):
        file = Path(directory) / name
        if Path(name).name != name or not file.is_file():
            raise DataError(f"{file}: the shard is missing; build the dataset again")
        found = shard_of(file)
        if found.bytes != recorded.bytes:
            change = "truncated" if found.bytes < recorded.bytes else "longer than it was"
            raise DataError(
                f"{file}: the shard is {change}: {found.bytes} bytes, {recorded.bytes} were written; "
                "build the dataset again"
            )
        if found.sha256 != recorded.sha256:
            raise DataError(f"{file}: the shard is corrupt {_first_broken_record(file)}; build the dataset again")
    return metadata


def _first_broken_record(file: Path) -> str:
    import tensorflow as tf  # six seconds to import, needed only for bad news

    try:
        for _ in tf.data.TFRecordDataset(str(file)):
            pass
    except tf.errors.DataLossError as error:
        offset = re.search(r"record at (\d+)", error.message)
        if offset:
            return f"at offset {offset.group(1)}"
    return "(every record is whole, but they are not those that were written)"
