"""Files that survive a kill: whole or absent, appended to and resumed, fingerprinted."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxprm.errors import UserError


def write_atomic(path: Path, text: str) -> None:
    """The file holds `text` or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        # A full disk should not be left fuller.
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def line(value: dict) -> str:
    """An object as a line of JSON Lines."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSON Lines file of our own. Raises UserError, naming the line that is none."""
    with path.open("rb") as file:
        yield from _objects(file, path)


def whole_lines(path: Path) -> list[dict]:
    """What an interrupted writer left behind; a torn last line is cut off the file.

    Raises UserError, naming the line, where one before it is broken: that is no kill's work.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return list(_objects(content[:end].splitlines(), path))


def _objects(lines: Iterable[bytes], path: Path) -> Iterator[dict]:
    for number, text in enumerate(lines, start=1):
        try:
            yield json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); mend the line, or remove the file") from None


@contextmanager
def appending(path: Path) -> Iterator:
    """A function that appends objects as lines, each batch flushed to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:

        def append(objects: Iterable[dict]) -> None:
            file.write("".join(map(line, objects)))
            file.flush()

        yield append


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what is not defined is null."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
