"""Files and directories that appear complete or not at all.

Everything is written to a staging path next to its final one and renamed when it is complete. A killed process leaves
only the staging path, which the next write of the same output replaces. Who writes a path that a user named holds its
lock meanwhile (`data_pipeline.locks.locked`), which also tells a staging path of ours from a user's own file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError


@contextmanager
def staged_file(path: str | PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary stream whose content becomes `path` when the block ends without an error.

    After an error `path` is what it was before, and the staging file is removed.

    Raises:
      DataError: `path` exists and `overwrite` is false.
    """
    path = Path(path)
    if not overwrite and (path.exists() or path.is_symlink()):
        problem = "a directory" if path.is_dir() else "exists already and is not overwritten"
        raise DataError(f"{path}: {problem}; name another file" + ("" if path.is_dir() else ", or remove it"))
    staging = staging_file_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            # Without it a power failure after the rename could leave the final name with an empty file.
            os.fsync(file.fileno())
        os.replace(staging, path)
        sync_folder(path.parent)
    except BaseException:
        # A full disk should not be left fuller.
        staging.unlink(missing_ok=True)
        raise


@contextmanager
def staged_directory(
    path: str | PathLike[str], *, overwrite: bool = False, staging: Path | None = None
) -> Iterator[Path]:
    """An empty directory that becomes `path` when the block ends without an error.

    After an error `path` is what it was before, and the staging directory is removed.

    Args:
      path: the final directory. It is absent or empty, or replaced with `overwrite`.
      overwrite: the directory that is replaced is renamed first and removed last. If an earlier process was killed
        between these two steps, that directory is first restored.
      staging: the staging directory; see `staging_of` for the default.

    Raises:
      DataError: `path` is not empty and `overwrite` is false.
    """
    path = _followed(Path(path))
    staging, backup = staging or staging_of(path), backup_of(path)
    if overwrite:
        # A process was killed between the two renames of `_swap`: only the backup has the earlier content.
        if backup.exists() and not path.exists():
            backup.rename(path)
        shutil.rmtree(backup, ignore_errors=True)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists already and is not overwritten; name another directory, or remove it")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        # Before the renames: they must not be on disk before the content is.
        _sync(staging)
        _swap(staging, path, backup)
    # Also for Ctrl-C, which is no Exception.
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


# Names next to an output, in the same folder because a rename is atomic only within a file system. Those that are not
# the user's business are hidden. `data_pipeline.paths` refuses an input of one of these names.


def staging_file_of(path: Path) -> Path:
    """Where `staged_file` writes what will be `path`."""
    return path.with_name(f".{path.name.removeprefix('.')}.tmp")


def staging_of(path: Path) -> Path:
    """Where `staged_directory` writes what will be `path`."""
    path = _followed(path)
    return path.with_name(f".{path.name}.partial")


def backup_of(path: Path) -> Path:
    """Where `staged_directory` keeps the earlier `path` until the new one has its name."""
    path = _followed(path)
    return path.with_name(f".{path.name}.old")


def lock_of(path: Path) -> Path:
    """The file that the writer of `path` locks."""
    path = _followed(path)
    return path.with_name(f".{path.name}.lock")


def partial_of(path: Path) -> Path:
    """The lines of `path` while they are written over several runs."""
    return path.with_name(f"{path.name}.partial")


def record_of(path: Path) -> Path:
    """What the lines in `partial_of(path)` were made from."""
    return path.with_name(f"{path.name}.partial.json")


def companions(path: Path) -> list[Path]:
    """Every path next to an output that its writer may create, replace and remove."""
    record = record_of(path)
    lines = [partial_of(path), record, staging_file_of(record)]
    return [lock_of(path), staging_file_of(path), staging_of(path), backup_of(path), *lines]


def _followed(path: Path) -> Path:
    """The directory that a link points to: it is replaced, and the link stays."""
    return path.resolve() if path.is_symlink() and path.is_dir() else path


@contextmanager
def write_errors(path: str | PathLike[str], problem: str = "cannot be written") -> Iterator[None]:
    """Raises an OSError of the block as a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {problem}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk: a rename survives a power failure only after this."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    # Some file systems cannot sync a folder, and the rename has succeeded.
    except OSError:
        return


def _sync(directory: Path) -> None:
    # Without it a power failure after the rename could leave the final name with empty files.
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(directory)


def _swap(staging: Path, path: Path, backup: Path) -> None:
    """Renames `staging` to `path`. What `path` was before is removed only when the new directory has its name."""
    if not path.exists():
        staging.rename(path)
        sync_folder(path.parent)
        return
    # A directory with files cannot be replaced by one rename.
    path.rename(backup)
    try:
        staging.rename(path)
    except BaseException:
        backup.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(backup, ignore_errors=True)
