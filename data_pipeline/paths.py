"""What a command writes must not be what it reads, nor another of its outputs. Checked before any work."""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.output import companions

# Names of the files that are read from a directory of a model, a tokenizer, a dataset or a run.
_READ_IN_DIRECTORIES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "metadata.json",
    "metrics.jsonl",
    "recipe.json",
    "results.json",
    "reward_model.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)
# Folders of a run and of a training output in which models are.
_READ_FOLDERS = ("checkpoints", "model", "model-files", "reward_models", "seed-*")
# Bytes of a file name on Linux, less those that `companions` add.
_LONGEST_NAME = 255 - len("..partial.json.tmp")


class Named(NamedTuple):
    """A path of a command, and what the command calls it: "input", "--json"."""

    name: str
    path: Path

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


def check_paths(reads: Iterable[Named], writes: Iterable[Named]) -> None:
    """Checks the paths of a command. Links are followed, and names of one file are one file.

    Args:
      reads: files and directories. One that does not exist may be the name of something else, and is left to its
        reader.
      writes: files and directories that may exist. A directory is replaced as a whole.

    Raises DataError if an output, or a path that its writer uses next to it, is an input or another output; if a
      directory that is replaced holds an input; or if an output cannot have its name.
    """
    reads, writes = [read for read in reads if os.path.lexists(read.path)], list(writes)
    for output in writes:
        _check_name(output)
        for read in reads:
            _check_pair(output, read)
    for one, other in itertools.combinations(writes, 2):
        if clash := next((path for path in _touched(one) if any(_same(path, used) for used in _touched(other))), None):
            what = "are the same" if clash in (one.path, other.path) else f"both use {clash}"
            raise DataError(f"{one} and {other} {what}; name another file")
        for outer, inner in ((one, other), (other, one)):
            if _holds(outer.path, inner.path):
                raise DataError(f"{outer}: holds {inner}, which is written too; name another directory")


def _check_pair(output: Named, read: Named) -> None:
    for path in _touched(output):
        if _same(path, read.path):
            if path == output.path:
                raise DataError(f"{output}: is the {read}, and would replace it; name another file")
            raise DataError(f"{output}: is written by way of {path.name}, which is the {read}; name another file")
    if _holds(output.path, read.path):
        raise DataError(f"{output}: holds the {read}, and would replace it; name another directory")
    # A file of another name may be put next to what is read: a report next to its model.
    if _holds(read.path, output.path) and _is_read(output.path, read.path):
        raise DataError(f"{output}: is a file of the {read}, which is read; name another file")


def _check_name(output: Named) -> None:
    length = len(os.fsencode(output.path.name))
    if output.path.name in ("", ".."):
        raise DataError(f"{output}: is a directory, and has no name of its own; name another path")
    if length > _LONGEST_NAME:
        raise DataError(
            f"{output.name} {output.path.name[:40]}...: {length} bytes, at most {_LONGEST_NAME}; shorten it"
        )
    if output.path.exists() and not (output.path.is_file() or output.path.is_dir()):
        raise DataError(f"{output}: is a device or a pipe; name a file")


def _touched(output: Named) -> list[Path]:
    return [output.path, *companions(output.path)]


def _same(path: Path, other: Path) -> bool:
    """Whether both name one file, through links of any kind, or would do so once they exist."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)


def _holds(directory: Path, path: Path) -> bool:
    """Whether a path is below another."""
    outer, inner = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    return outer != inner and inner.is_relative_to(outer)


def _is_read(path: Path, directory: Path) -> bool:
    """Whether a path below a directory is one of those that are read there."""
    *folders, name = Path(os.path.realpath(path)).relative_to(os.path.realpath(directory)).parts
    # Below the folder in which a user works, any folder of another name is not its model's.
    if folders and not _matches(folders[0], _READ_FOLDERS):
        return False
    # The files of a checkpoint have names of their own.
    return ("checkpoints" in folders and path.exists()) or _matches(name, _READ_IN_DIRECTORIES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
