"""Files that survive a kill: complete or absent, appended to and resumed, fingerprinted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.output import staged_file
from jaxprm.errors import UserError


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
    """The objects of a JSON Lines file whose writer may have been killed; cuts a torn last line off the file.

    Raises UserError if an earlier line is malformed: an interrupted write can only damage the last one.
    """
    if not path.exists():
        return []
    with path.open("r+b") as file:
        return list(_objects(_cut_torn_line(file), path))


@contextmanager
def appending(path: Path) -> Iterator:
    """A function that appends objects as lines, each batch flushed to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered: what was appended is in the file, and survives a kill, when the call returns.
    with path.open("ab", buffering=0) as file:
        yield lambda objects: write_all(file, "".join(map(line, objects)).encode())


class ResumableLines:
    """A JSON Lines file that is written over several runs, by one process at a time.

    Lines are appended to PATH.partial, and PATH appears when all are there. A context manager: an exclusive lock on
    PATH.partial is held from entering to leaving.

    Raises:
      UserError: on entering, when another process holds the lock; it names the file and the process.
    """

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> ResumableLines:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self.partial)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

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
        """The objects written so far; cuts a torn last line. Raises UserError if an earlier line is malformed."""
        return list(_objects(_cut_torn_line(self._file), self.partial))

    def raw_lines(self) -> Iterator[bytes]:
        """The lines written so far with their line ends, one at a time; a torn last line has none."""
        self._file.seek(0)
        # The descriptor stays open: closing it would release the lock.
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
            return
        with staged_file(self.path, overwrite=True) as file:
            for value in objects:
                file.write(line(value).encode())
        # A kill before this leaves both files; `is_finished` then removes the partial one.
        self.partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes what was written, so that the next run starts from the beginning."""
        self.partial.unlink()


def write_all(file: BinaryIO, data: bytes) -> None:
    """Writes all bytes to an unbuffered file, which may accept only a part at a time when the disk is nearly full."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]


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
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); fix the line, or remove the file") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: not a JSON object; fix the line, or remove the file")
        yield value


def _cut_torn_line(file: BinaryIO) -> list[bytes]:
    """The complete lines of an open file; what follows the last line end is cut off."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        file.truncate(end)
    # Bytes are split only at line feeds and carriage returns, which JSON escapes within texts.
    return content[:end].splitlines()


def _open_locked(path: Path) -> BinaryIO:
    """The file opened for reading and appending, unbuffered, with an exclusive lock that closing it releases."""
    while True:
        # Unbuffered: after a failed write, closing must not try to write the same bytes again.
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _lock_holder(file)
            file.close()
            raise UserError(
                f"{path}: {holder} is writing this file; wait until it ends, or name another output"
            ) from None
        except OSError:
            return file  # a file system without locks
        # The former holder may have renamed or removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _lock_holder(file: BinaryIO) -> str:
    """The process that holds the lock on a file, from Linux' table of locks; elsewhere it is unknown."""
    inode = f":{os.fstat(file.fileno()).st_ino}"
    table = Path("/proc/locks")
    for entry in table.read_text().splitlines() if table.exists() else ():
        # "1: FLOCK ADVISORY WRITE <pid> <major>:<minor>:<inode> 0 EOF"
        fields = entry.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(inode):
            return f"process {fields[4]}"
    return "another process"
