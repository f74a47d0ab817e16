"""Files that survive a kill: complete or absent, appended to and resumed, fingerprinted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline import typed_json
from data_pipeline.errors import DataError
from data_pipeline.locks import locked
from data_pipeline.output import partial_of, staged_file, sync_folder
from jaxprm.errors import UserError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def write_atomic(path: Path, text: str) -> None:
    """Replaces the content of a file; after a kill or an error it holds `text` or what it held before."""
    with staged_file(path, overwrite=True) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON as `write_atomic` does."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def line(value: dict) -> str:
    """An object as a line of JSON Lines."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSON Lines file that jaxprm wrote. Raises UserError that names a malformed line."""
    with path.open("rb") as file:
        yield from _objects(file, path)


def complete_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file whose writer may have been killed; cuts a torn end off the file.

    Raises UserError if an earlier line is malformed: an interrupted write can only damage the end.
    """
    if not path.exists():
        return []
    with path.open("r+b") as file:
        return _cut_torn_end(file, path)


@contextmanager
def appending(path: Path) -> Iterator:
    """A function that appends objects as lines, each batch flushed to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered: what was appended is in the file, and survives a kill, when the call returns.
    with path.open("ab", buffering=0) as file:
        yield lambda objects: write_all(file, "".join(map(line, objects)).encode())


class ResumableLines:
    """A JSON Lines file that is written over several runs, by one process at a time.

    Lines are appended to PATH.partial, and PATH appears when all are there. A context manager: PATH is locked from
    entering to leaving.

    Args:
      staging: staging paths next to PATH that the caller uses, as in `data_pipeline.locks.locked`.

    Raises:
      UserError: on entering, when another process holds the lock; it names the file and the process.
    """

    def __init__(self, path: Path, *, staging: Sequence[Path] = ()):
        self.path, self.partial, self._staging = path, partial_of(path), staging

    def __enter__(self) -> ResumableLines:
        with ExitStack() as stack:
            with user_errors():
                stack.enter_context(locked(self.path, staging=self._staging))
            # Unbuffered: after a failed write, closing must not try to write the same bytes again.
            self._file = stack.enter_context(self.partial.open("a+b", buffering=0))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing to resume from. If the file was renamed to PATH, there is none of this name.
        if self.is_empty():
            self.partial.unlink(missing_ok=True)
        self._held.close()

    def is_finished(self) -> bool:
        """Whether PATH exists. A PATH.partial next to it, left by a kill at the very end, is then removed."""
        if not self.path.exists():
            return False
        self.partial.unlink(missing_ok=True)
        return True

    def is_empty(self) -> bool:
        """Whether no byte was written yet."""
        return os.fstat(self._file.fileno()).st_size == 0

    def read(self) -> list[dict]:
        """The objects written so far; cuts a torn end. Raises UserError if an earlier line is malformed."""
        return _cut_torn_end(self._file, self.partial)

    def raw_lines(self) -> Iterator[bytes]:
        """The lines written so far with their line ends, one at a time; a torn last line has none."""
        self._file.seek(0)
        # The descriptor stays open: more is appended to it.
        with open(self._file.fileno(), "rb", closefd=False) as buffered:
            yield from buffered

    def truncate(self, size: int) -> None:
        """Cuts off what follows the first `size` bytes."""
        self._file.truncate(size)

    def append(self, objects: Iterable[dict]) -> None:
        """Appends a line for each object. They are in the file, and survive a kill, when this returns."""
        self.append_bytes("".join(map(line, objects)).encode())

    def append_bytes(self, lines: bytes) -> None:
        """Appends lines that are encoded already."""
        write_all(self._file, lines)

    def finish(self, objects: Iterable[dict] | None = None) -> None:
        """Makes PATH of `objects` in their order, or of the lines as they were appended."""
        if objects is None:
            os.fsync(self._file.fileno())
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
            return
        with staged_file(self.path, overwrite=True) as file:
            for value in objects:
                file.write(line(value).encode())
        # A kill before this leaves both files; `is_finished` then removes the partial one.
        self.partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes what was written, so that the next run starts from the beginning."""
        self.truncate(0)
        self.partial.unlink()


def write_all(file: BinaryIO, data: bytes) -> None:
    """Writes all bytes to an unbuffered file, which may accept only a part at a time when the disk is nearly full."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]


@contextmanager
def user_errors() -> Iterator[None]:
    """Raises a DataError of the block as a UserError of the same text."""
    try:
        yield
    except DataError as error:
        raise UserError(str(error)) from error.__cause__


def sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def without_nan(value: Any) -> Any:
    """The value with null for every number that is not finite, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _objects(lines: Iterable[bytes], path: Path) -> Iterator[dict]:
    for number, text in enumerate(lines, start=1):
        try:
            yield _object(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error}); fix the line, or remove the file") from None


def _object(text: bytes) -> dict:
    """The object of a line. Raises ValueError if it is none."""
    try:
        # Given bytes, json.loads would accept halves of surrogate pairs, as it does where they are escaped.
        value = json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _SURROGATE.search(text):
        typed_json.check(value)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return value


def _cut_torn_end(file: BinaryIO, path: Path) -> list[dict]:
    """The objects of an open file, up to its last valid line; what follows that is cut off, and reported.

    A kill tears the last line. A power failure may leave zeros or other bytes in place of several.
    Raises UserError for a malformed line before a valid one.
    """
    file.seek(0)
    content = file.read()
    # Bytes are split only at line feeds and carriage returns, which JSON escapes within texts.
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    while lines and not _is_object(lines[-1]):
        lines.pop()
    end = sum(map(len, lines))
    if end < len(content):
        file.truncate(end)
        if b"\n" in content[end:]:
            damaged = content.count(b"\n", end)
            print(f"{path}: cut {damaged} damaged lines off its end; they are made again", file=sys.stderr)
    return list(_objects(lines, path))


def _is_object(text: bytes) -> bool:
    try:
        _object(text)
    except ValueError:
        return False
    return True
