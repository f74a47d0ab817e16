"""Training and validation split by group, decided by a hash: the same whatever other rows there are.

And the notation for files of splits on every command line: `train=FILE`, or `FILE` whose rows name their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from data_pipeline.errors import DataError, SplitError

Inputs = Mapping[str | None, Sequence[str | PathLike[str]]]

VALIDATION_SHARE = 0.1


def split_of(group: str, *, validation_share: float, seed: int = 0) -> str:
    """ "train" or "validation", the latter for about `validation_share` of all groups."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode(errors="surrogatepass")).digest()
    return "validation" if int.from_bytes(digest[:8]) < validation_share * 2**64 else "train"


def check_share(share: float) -> float:
    """Raises DataError unless a share leaves something on both sides."""
    if not 0.0 < share < 1.0:
        raise DataError(f"validation share {share:g} is not between 0 and 1; 0.1 puts a tenth of the tasks aside")
    return share


def parse_inputs(arguments: Sequence[str]) -> dict[str | None, list[str]]:
    """Files by split of `SPLIT=FILE` and `FILE`; a file of that whole name comes first."""
    inputs: dict[str | None, list[str]] = {}
    for argument in arguments:
        split, equals, path = argument.partition("=")
        named = equals and split.isidentifier() and not Path(argument).exists()
        inputs.setdefault(split if named else None, []).append(path if named else argument)
    return inputs


def named_split(named: str | None, given: str | None, row: str) -> str | None:
    """The split a row names or its file was given for, None without either. Raises DataError where they differ."""
    if given is not None and named not in (None, given):
        raise DataError(f"{row}: its split is {named!r}, but the file was given for {given!r}")
    split = given or named
    if split is not None and (not split.isidentifier() or split == "all"):
        raise DataError(f"{row}: {split!r} cannot name a split; use train, validation or test")
    return split


class Splits:
    """Which split each task is in: a task in two would let what is measured leak into what is learnt."""

    def __init__(self) -> None:
        self._split_of_task: dict[bytes, str] = {}

    def add(self, task: str, split: str) -> None:
        """Raises SplitError where the task is in another split already."""
        key = hashlib.blake2b(task.encode(errors="surrogatepass"), digest_size=12).digest()
        known = self._split_of_task.setdefault(key, split)
        if known != split:
            raise SplitError(in_two_splits(task, known, split))


def in_two_splits(task: str, known: str, split: str) -> str:
    return f"task {task} is in {known} and in {split}; split by task"
