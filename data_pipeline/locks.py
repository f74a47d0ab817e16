"""One writer for each output: an exclusive lock on a hidden file next to it.

The lock belongs to the process and ends with it, also by SIGKILL, so the file of a dead process never blocks. Linux'
NFS client turns the lock into one of the server, so writers on different hosts exclude each other where fcntl locks do.
The file names its holder and the staging paths of that process: those of a killed one can then be
told from a user's own files of the same name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from data_pipeline.errors import DataError
from data_pipeline.output import lock_of, write_errors

# What flock answers if another process has the lock; on NFS it may be EACCES.
_BUSY = (errno.EAGAIN, errno.EACCES)


class Holder(msgspec.Struct, kw_only=True):
    """Content of a lock file: the process that holds it, and the names of its staging paths."""

    pid: int
    host: str
    staging: list[str] = []

    def __str__(self) -> str:
        return f"process {self.pid}" + ("" if self.host == platform.node() else f" on {self.host}")


class Busy(Exception):
    """Another process has the lock. The message names it."""


class LockFile:
    """A held lock. `staging` are names of staging paths: first those of a former holder that was killed.

    Raises:
      Busy: another process holds it.
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = _open_locked(path)
        earlier = _read(self._file)
        self.staging: set[str] = set(earlier.staging) if earlier else set()
        try:
            self._write()
        except OSError:
            self.release(remove=not self.staging)
            raise

    def own(self, names: Sequence[str]) -> None:
        """Adds staging paths, by name."""
        if not self.staging.issuperset(names):
            self.staging.update(names)
            self._write()
            # On disk before the staging path is: a power failure must not leave one without an owner.
            os.fsync(self._file.fileno())

    def _write(self) -> None:
        content = msgspec.json.encode(Holder(pid=os.getpid(), host=platform.node(), staging=sorted(self.staging)))
        self._file.seek(0)
        # In place and then cut, not emptied first: on a full disk the names of a killed process stay.
        self._file.write(content.ljust(os.fstat(self._file.fileno()).st_size))
        self._file.truncate(len(content))

    def release(self, *, remove: bool) -> None:
        """Gives the lock back. The file is removed while the lock is held: another process may lock it right after."""
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.close()


@contextmanager
def locked(
    output: str | os.PathLike[str],
    *,
    staging: Sequence[Path] = (),
    is_ours: Callable[[Path], bool] = lambda path: False,
) -> Iterator[None]:
    """Excludes other writers of `output` while the block runs.

    Args:
      output: what the block writes. Its folder is made if it is missing.
      staging: paths that the block creates and removes. One that exists must be from a killed process.
      is_ours: recognizes a staging path by its content, for those that no lock file names.

    Raises DataError: another process writes the output, which is named with the process; a staging path is not ours; or
      nothing can be written there.
    """
    output = Path(output)
    with write_errors(output):
        lock_of(output).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = LockFile(lock_of(output))
        except Busy as holder:
            raise DataError(
                f"output {output}: {holder} is writing it; wait until it ends, or name another output"
            ) from None
    try:
        for path in staging:
            if os.path.lexists(path) and path.name not in lock.staging and not is_ours(path):
                raise DataError(f"{path}: exists, and no interrupted command left it for {output}; move or delete it")
        with write_errors(output):
            lock.own([path.name for path in staging])
        yield
    finally:
        # The next writer must know of a staging path that is still there.
        lock.release(remove=not any(os.path.lexists(lock.path.with_name(name)) for name in lock.staging))


def _open_locked(path: Path) -> BinaryIO:
    """The file opened for reading and writing, unbuffered, with an exclusive lock that closing it releases."""
    while True:
        # O_CLOEXEC is Python's default: a child must not keep the lock of a process that is gone.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                holder = _holder(file)
                file.close()
                raise Busy(holder) from None
            _report_missing_locks(path.parent)
            return file
        # The former holder may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@functools.cache  # once in a process: a run locks a file for each of its searches
def _report_missing_locks(folder: Path) -> None:
    # Writing there must still be possible.
    print(f"{folder}: the file system has no locks; run one command at a time there", file=sys.stderr)


def _holder(file: BinaryIO) -> str:
    """The process that holds a lock, from the file's content."""
    for _ in range(20):
        holder = _read(file)
        # Until the new holder has written its name, the file has none, or that of a process that is gone.
        if holder is not None and (holder.host != platform.node() or _is_alive(holder.pid)):
            return str(holder)
        time.sleep(0.01)
    return "another process"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _read(file: BinaryIO) -> Holder | None:
    file.seek(0)
    try:
        return msgspec.json.decode(file.read(), type=Holder)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
