"""Splits: by a hash of the group, by name, and in the `SPLIT=FILE` notation of every command line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from data_pipeline.errors import DataError, SplitError

Inputs = Mapping[str | None, Sequence[str | PathLike[str]]]

VALIDATION_SHARE = 0.1


def split_of(group: str, *, validation_share: float, seed: int = 0) -> str:
    """ "train" or "validation", the latter for about `validation_share` of all groups.

    A hash decides, so the split of a group does not depend on other rows or on their order.
    """
    # surrogatepass: a Python text may hold lone surrogates, which UTF-8 alone refuses.
    digest = hashlib.sha256(f"{seed}\0{group}".encode(errors="surrogatepass")).digest()
    # The first 64 bits are a uniform number below 2**64. A larger share moves groups from train to validation only.
    return "validation" if int.from_bytes(digest[:8]) < validation_share * 2**64 else "train"


def check_share(share: float) -> float:
    """The share itself. Raises DataError unless 0 < share < 1."""
    if not 0.0 < share < 1.0:
        raise DataError(f"validation share {share:g} is not between 0 and 1; 0.1 holds out a tenth of the tasks")
    return share


def parse_inputs(arguments: Sequence[str]) -> dict[str | None, list[str]]:
    """Files by split, from arguments `SPLIT=FILE`, or `FILE` under None for files whose rows name their split."""
    inputs: dict[str | None, list[str]] = {}
    for argument in arguments:
        split, equals, path = argument.partition("=")
        # An existing file whose name looks like SPLIT=FILE is that file.
        named = equals and split.isidentifier() and not Path(argument).exists()
        inputs.setdefault(split if named else None, []).append(path if named else argument)
    return inputs


def named_split(row_split: str | None, file_split: str | None, row: str) -> str | None:
    """The split of a row by name: that of its file, else its own, else None.

    Raises DataError if the two differ or the name is not allowed.
    """
    if file_split is not None and row_split not in (None, file_split):
        raise DataError(f"{row}: its split is {row_split!r}, but the file was given for {file_split!r}")
    split = file_split or row_split
    # TFDS reads "all" as all splits together. Other characters would not survive in the name of a shard.
    if split is not None and (not split.isidentifier() or split == "all"):
        raise DataError(f"{row}: {split!r} cannot name a split; use train, validation or test")
    return split


class Splits:
    """The split of every task. A task in two splits would leak evaluation data into training."""

    def __init__(self) -> None:
        self._split_of_task: dict[bytes, str] = {}

    def add(self, task: str, split: str) -> None:
        """Records the split of a task. Raises SplitError if the task is already in another split."""
        # Digests bound the memory: a task may be named by a whole prompt.
        key = hashlib.blake2b(task.encode(errors="surrogatepass"), digest_size=12).digest()
        first_split = self._split_of_task.setdefault(key, split)
        if first_split != split:
            raise SplitError(in_two_splits(task, first_split, split))


def in_two_splits(task: str, first_split: str, split: str) -> str:
    """Message of a SplitError."""
    return f"task {task} is in {first_split} and in {split}; split by task"
