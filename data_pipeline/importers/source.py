"""Rows of a file in JSON Lines, a JSON array or Parquet, one at a time. The content decides which of these it is.

A row that cannot be read is returned as an error, and the next ones are read as usual. Where the ends of rows cannot be
found (an array that is never closed, Parquet without its footer) the file is an error, because the lost rows could not
be counted. The size of a row is bounded, and so is memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from data_pipeline.errors import DataError

MAX_ROW_BYTES = 64 << 20
_CHUNK = 1 << 20
_PARQUET_ROWS = 32  # In memory at a time.
# Bytes that change the depth of nesting outside of a string, and those that matter inside of one.
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
# By their first bytes, because every line of such a file would be an error that says nothing.
_REFUSED = {
    b"\x1f\x8b": "compressed with gzip; unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first (unzstd)",
    b"BZh": "compressed with bzip2; unpack it first (bunzip2)",
    b"PK\x03\x04": "a zip archive; unpack it first (unzip)",
    b"\xff\xfe": "not UTF-8 but UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "not UTF-8 but UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)",
}


class SourceRow(NamedTuple):
    """A row of a file. `number` counts from 1, `where` names the row, and `value` is its object or its error.

    `bytes_read` is the position of the reader in the file, for a progress bar.
    """

    where: str
    number: int
    value: dict[str, Any] | DataError
    bytes_read: int


def read_rows(path: str | PathLike[str]) -> Iterator[SourceRow]:
    """The rows of a file, in order and in bounded memory; blank lines are ignored.

    Raises DataError if the file cannot be read, is empty, or the ends of its rows cannot be found.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file; name a file in JSON Lines, a JSON array or Parquet")
    try:
        with path.open("rb") as file:
            kind = _kind(file, path)
            if kind == "parquet":
                yield from _parquet(path)
            elif kind == "array":
                yield from _array(file, path)
            else:
                yield from _lines(file, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def kind_of(value: Any) -> str:
    """The type of a JSON value in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}")


def _kind(file: BinaryIO, path: Path) -> str:
    """ "parquet", "array" or "lines", by the first bytes; moves the file to its first row."""
    head = file.read(4)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise DataError(f"{path}: {what}")
    if head == b"PAR1":
        return "parquet"
    start = len(_BOM) if head.startswith(_BOM) else 0
    file.seek(start)
    while chunk := file.read(_CHUNK):
        if text := chunk.lstrip(_BLANK):
            file.seek(start)
            return "array" if text[:1] == b"[" else "lines"
    raise DataError(f"{path}: empty, there is no row in it")


def _lines(file: BinaryIO, path: Path) -> Iterator[SourceRow]:
    number, position = 0, file.tell()
    while line := file.readline(MAX_ROW_BYTES + 1):
        number, position, is_complete = number + 1, position + len(line), len(line) <= MAX_ROW_BYTES
        where = f"{path}:{number}"
        if not is_complete:
            # Skips to the end of the line without keeping it in memory.
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
                position += len(line)
            yield SourceRow(where, number, _too_long(where), position)
        elif line.strip(_BLANK):
            yield SourceRow(where, number, _decode(line, where), position)


def _array(file: BinaryIO, path: Path) -> Iterator[SourceRow]:
    number = 0
    for number, (text, line, end, last) in enumerate(_elements(file, path), start=1):
        where = f"{path}: row {number} (line {line})"
        if last and number == 1 and not text:
            return  # an array without elements
        yield SourceRow(
            where, number, _decode(text, where) if text else DataError(f"{where}: nothing between commas"), end
        )


def _elements(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int, int, bool]]:
    """Elements of the array at the file's position, as (text, line of its start, position after it, whether the last).

    They are not decoded here, so a malformed element does not affect the others.
    """
    line, end = 1, file.tell()
    buffer = bytearray()
    # To the first byte after the opening bracket.
    while not buffer.endswith(b"["):
        buffer = bytearray(file.read(1))
        line, end = line + (buffer == b"\n"), end + 1
    buffer, at, depth, quoted, number = bytearray(), 0, 0, False, 1

    def unreadable(problem: str) -> DataError:
        start = line + _newlines_before(buffer)
        return DataError(f"{path}: row {number} (line {start}): {problem}; the ends of later rows cannot be found")

    while True:
        match = (_INSIDE if quoted else _OUTSIDE).search(buffer, at)
        if match is None:
            # A backslash may be the last byte of the buffer; then `at` is one past its end already.
            at = max(at, len(buffer))
            if len(buffer) > MAX_ROW_BYTES:
                raise unreadable(f"more than {MAX_ROW_BYTES >> 20} MiB without an end")
            if not (chunk := file.read(_CHUNK)):
                raise unreadable("the array is not closed, the file is cut off or a bracket is missing")
            buffer += chunk
            continue
        at, mark = match.end(), match[0]
        if quoted:
            if mark == b"\\":
                at += 1  # An escaped quote does not end the string.
            else:
                quoted = False
        elif mark == b'"':
            quoted = True
        elif mark in b"[{":
            depth += 1
        # Whether it is the bracket that was opened is checked when the element is decoded.
        elif depth and mark in b"]}":
            depth -= 1
        elif not depth:
            if mark == b"}":
                raise unreadable("a } that was never opened")
            text = bytes(buffer[: at - 1])
            end += at
            last = mark == b"]"
            yield text.strip(_BLANK), line + _newlines_before(text), end, last
            line, number = line + text.count(b"\n"), number + 1
            del buffer[:at]
            at = 0
            if last:
                break
    while buffer:
        if buffer.strip(_BLANK):
            raise DataError(f"{path}: something follows the end of the array in line {line}")
        buffer = bytearray(file.read(_CHUNK))


def _newlines_before(text: bytes | bytearray) -> int:
    return text.count(b"\n", 0, len(text) - len(text.lstrip(_BLANK)))


def _parquet(path: Path) -> Iterator[SourceRow]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: Parquet is read with pyarrow, which is not installed: pip install pyarrow") from None
    size, number = path.stat().st_size, 0
    # By default pyarrow reads a complete row group ahead, which may be the complete file.
    streamed = {"pre_buffer": False, "buffer_size": _CHUNK}
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True, **streamed) as file:
            total = file.metadata.num_rows
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{path}: row {number}"
                    # Parquet has no position in bytes, so the progress is by rows.
                    yield SourceRow(where, number, _parquet_row(batch.slice(index, 1), where), size * number // total)
    except Exception as error:  # pyarrow raises many classes for broken files.
        after = f"after row {number}: " if number else ""
        raise DataError(f"{path}: Parquet that cannot be read: {after}{' '.join(str(error).split())[:200]}") from None
    # Rows that a reader drops without an error would be lost silently.
    if number < total:
        raise DataError(f"{path}: Parquet that cannot be read: {number} rows, its footer says {total}")


def _parquet_row(row: Any, where: str) -> dict[str, Any] | DataError:
    try:
        (plain,) = row.to_pylist(maps_as_pydicts="strict")
        return _without_nulls(plain)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # such as text that is not UTF-8
        return DataError(f"{where}: cannot be read: {' '.join(str(error).split())[:200]}")


def _without_nulls(value: Any) -> Any:
    """The value without the nulls in objects."""
    # Parquet gives every struct of a column the same fields. A null was most likely a missing field.
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _decode(text: bytes, where: str) -> dict[str, Any] | DataError:
    if len(text) > MAX_ROW_BYTES:
        return _too_long(where)
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        return DataError(f"{where}: nested too deeply")
    except (msgspec.MsgspecError, UnicodeError) as error:
        return DataError(f"{where}: not JSON: {error}")
    if not isinstance(value, dict):
        return DataError(f"{where}: a row must be an object, this one is {kind_of(value)}")
    return value


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: a row of more than {MAX_ROW_BYTES >> 20} MiB")
