"""JSON files as typed values, checked once where they are read. A bad file is an error of one line.

The line has the file, the field, its value, what is expected, and the fix. Sizes are bounded, because a file may come
from anywhere: bytes, depth of nesting, and digits of a number. Not for JSON Lines of data, which msgspec decodes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from data_pipeline.errors import DataError, shown

T = TypeVar("T")
MAX_BYTES = 64 << 20
# Python's own encoder and copy.deepcopy need several frames for each level, of the thousand that Python allows.
MAX_DEPTH = 64
# Beyond float64's largest number, and far below the 4,300 digits at which Python refuses to parse.
MAX_DIGITS = 400


def read(path: Path, kind: type[T], *, fix: str, error: type[ValueError] = DataError) -> T:
    """The value of a JSON file, checked against a type.

    Args:
      kind: a type that msgspec converts to. A struct accepts fields that it does not have.
      fix: what the user can do, the end of the error.
      error: class of the error.

    Raises `error` if the file is not JSON of that type, and OSError if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise error(f"{path}: has more than {MAX_BYTES >> 20} MiB; {fix}")
    try:
        value = parse(content)
    except ValueError as problem:
        raise error(f"{path}: {problem}; {fix}") from None
    return convert(value, kind, where=str(path), fix=fix, error=error)


def parse(content: bytes | str) -> Any:
    """The value of a JSON text. NaN and Infinity are accepted: Python writes them.

    Raises ValueError, with the problem, for a text that is not JSON, is nested too deeply, has a number of too many
    digits, a text that is no Unicode, or a name that occurs twice with different values.
    """
    try:
        # A byte order mark is ignored, as RFC 8259 allows. json.loads would also accept UTF-16.
        # Not the codec "utf-8-sig": Python would read a module for it, which may fail where files cannot be opened.
        text = content.removeprefix(codecs.BOM_UTF8).decode() if isinstance(content, bytes) else content
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise NotJSON(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    check(value)
    return value


def check(value: Any) -> None:
    """Raises ValueError for a plain value that is nested too deeply, or has a text that no file can be written with."""
    level = [value]
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        for node in level:
            if isinstance(node, str):
                # JSON can spell half of a surrogate pair, which no file can be written with.
                if not node.isascii() and any("\ud800" <= character <= "\udfff" for character in node):
                    raise ValueError(f"the text {shown(node)} is no Unicode: it has half of a surrogate pair")
            elif isinstance(node, dict):
                following += [*node, *node.values()]
            elif isinstance(node, list):
                following += node
        if not following:
            return
        level = following
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


class NotJSON(ValueError):
    """A text that does not follow the syntax of JSON."""


def convert(value: Any, kind: type[T], *, where: str, fix: str, error: type[ValueError] = DataError) -> T:
    """A plain value as another type. Raises `error` with `where`, the field, its value, what is expected and `fix`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise error(f"{where}: {describe(problem, value)}; {fix}") from None


def describe(problem: msgspec.ValidationError, value: Any) -> str:
    """msgspec's message with the field in front, and its value."""
    # msgspec gives the field only within the text of the message.
    expected, _, path = str(problem).partition(" - at `")
    parts = re.findall(r"[^.\[\]]+|\[\.\.\.\]", path.rstrip("`").removeprefix("$"))
    names: list[str] = []
    for part in parts:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            break  # msgspec does not name the key of a dictionary: the dictionary is shown
        names.append(f"[{part}]" if part.isdecimal() else part)
    field = ".".join(names).replace(".[", "[")
    expected = (expected[:1].lower() + expected[1:]).replace("`", "")
    return f"{field} = {shown(value)}: {expected}" if field else expected


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            # json.loads would silently use the last. Equal ones have one meaning.
            if fields[name] != value:
                raise ValueError(f"the name {shown(name)} occurs twice with different values")
    return fields
