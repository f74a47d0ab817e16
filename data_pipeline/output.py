"""Files and directories that appear complete or not at all.

Everything is written to a staging path next to its final one and renamed when it is complete. A killed process leaves
only the staging path, which the next write of the same output replaces.
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
    # Hidden, so that it cannot be a file of the user's own.
    # In the same folder, because a rename is atomic only within a file system.
    staging = path.with_name(f".{path.name.removeprefix('.')}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            # Without it a power failure after the rename could leave the final name with an empty file.
            os.fsync(file.fileno())
        os.replace(staging, path)
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
    path = Path(path)
    if path.is_symlink():  # the directory it points to is replaced, and the link stays
        path = path.resolve()
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


def staging_of(path: Path) -> Path:
    """Where `staged_directory` writes what will be `path`."""
    return path.with_name(f".{path.name}.partial")


def backup_of(path: Path) -> Path:
    """Where `staged_directory` keeps the earlier `path` until the new one has its name."""
    return path.with_name(f".{path.name}.old")


@contextmanager
def write_errors(path: str | PathLike[str], problem: str = "cannot be written") -> Iterator[None]:
    """Raises an OSError of the block as a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {problem}: {error.strerror or error}") from error


def _sync(directory: Path) -> None:
    # Without it a power failure after the rename could leave the final name with empty files.
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _swap(staging: Path, path: Path, backup: Path) -> None:
    """Renames `staging` to `path`. What `path` was before is removed only when the new directory has its name."""
    if not path.exists():
        staging.rename(path)
        return
    # A directory with files cannot be replaced by one rename.
    path.rename(backup)
    try:
        staging.rename(path)
    except BaseException:
        backup.rename(path)
        raise
    shutil.rmtree(backup, ignore_errors=True)
