"""A file that is written whole or not at all, beside where it will be, and never over another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.metadata import FILE, Metadata


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


def replace(written: Path, output: Path) -> None:
    """Puts `written` in the place of `output`, an empty directory or a dataset that is removed only afterwards."""
    previous = output.with_name(f".{output.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if output.exists():
        output.rename(previous)
    written.rename(output)
    shutil.rmtree(previous, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raises DataError unless `output` is absent, empty, or a dataset."""
    if output.is_dir():
        if any(output.iterdir()) and not (output / FILE).is_file():
            raise DataError(f"{output}: not empty and not a dataset; name another directory or empty this one")
        if (output / FILE).is_file():
            Metadata.load(output)  # somebody else's metadata.json is an error
    elif output.exists():
        raise DataError(f"{output}: a file; name a directory")
