"""A file that is written whole or not at all, beside where it will be, and never over another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError


@contextmanager
def new_file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A stream that becomes `path` when its block ends without an error.

    Raises DataError where `path` exists, or cannot be written.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        what = "a directory" if path.is_dir() else "exists already and is not overwritten"
        raise DataError(f"{path}: {what}; name another file" + ("" if path.is_dir() else ", or remove it"))
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink()
