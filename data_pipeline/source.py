"""Rows of a file in JSON Lines, JSON arrays, JSON objects or Parquet, one at a time. The content decides which it is.

gzip and zstd are decompressed while they are read. A row that cannot be read is returned as an error, and the next ones
are read as usual. Where the ends of rows cannot be found (an array that is never closed, Parquet without its footer)
the file is an error, because the lost rows could not be counted. The size of a row is bounded, and so is memory.

`read_texts` is what every reader of trajectories uses: rows are bytes there, and only the caller decodes them.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import msgspec

from data_pipeline import json_values
from data_pipeline.compression import GZIP, ZSTD, Stream, open_stream
from data_pipeline.conversations.kinds import kind_of
from data_pipeline.errors import DataError

MAX_ROW_BYTES = 64 << 20
_CHUNK = 1 << 20
_HEAD = 1 << 20  # The kind of a file is decided by so many bytes, and its first object.
_PARQUET_ROWS = 32  # In memory at a time.
# Bytes that change the depth of nesting outside of a string, and those that matter inside of one.
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
# By their first bytes, because every line of such a file would be an error that says nothing.
_REFUSED = {
    b"BZh": "compressed with bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ": "compressed with xz; unpack it first (unxz)",
    b"PK\x03\x04": "a zip archive; unpack it first (unzip)",
    b"\xff\xfe": "not UTF-8 but UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "not UTF-8 but UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)",
}


class RowText(NamedTuple):
    """A row of a file as JSON text, or its error. `number` counts lines in JSON Lines, and rows elsewhere, from 1.

    `where` names the row in messages. `bytes_read` is the position of the reader in the file, for a progress bar.
    """

    where: str
    number: int
    text: bytes | DataError
    bytes_read: int


class SourceRow(NamedTuple):
    """A row of a file as an object (a list, if lists are allowed), or its error.

    `repairs` counts what was not quite JSON, by description; `size` is that of the text in bytes. The other fields are
    those of RowText.
    """

    where: str
    number: int
    value: Any
    bytes_read: int
    repairs: Mapping[str, int] = MappingProxyType({})
    size: int = 0


def read_texts(path: str | PathLike[str]) -> Iterator[RowText]:
    """The rows of a file as JSON text, in order and in bounded memory; blank lines are ignored.

    Raises DataError if the file cannot be read, or the ends of its rows cannot be found. An empty file has no rows.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file; name a file in JSON Lines, a JSON array or Parquet")
    try:
        kind = _kind(path)
        if kind == "empty":
            return
        if kind == "parquet":
            yield from _parquet(path)
            return
        with open_stream(path) as stream:
            if _skip_bom(stream.file):
                stream.file.read(len(_BOM))
            yield from {"array": _array, "objects": _objects, "lines": _lines}[kind](stream, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_rows(path: str | PathLike[str], *, lists: bool = False) -> Iterator[SourceRow]:
    """As `read_texts`, decoded. A row that is no object, or list if `lists`, is an error.

    NaN and infinite numbers stay floats, and half a surrogate pair is replaced; both are counted in `repairs`.

    Raises DataError as `read_texts`, and for an empty file.
    """
    if Path(path).is_file() and _kind(Path(path)) == "empty":
        raise DataError(f"{path}: empty, there is no row in it")
    for where, number, text, bytes_read in read_texts(path):
        repairs: Counter[str] = Counter()
        value: Any = text
        if not isinstance(text, DataError):
            try:
                value = json_values.decode(text, repairs)
            except DataError as error:
                value = DataError(f"{where}: {error}")
            else:
                if not isinstance(value, (dict, list) if lists else dict):
                    value = DataError(f"{where}: a row must be an object, this one is {kind_of(value)}")
        size = 0 if isinstance(text, DataError) else len(text)
        yield SourceRow(where, number, value, bytes_read, repairs, size)


def count_texts(path: str | PathLike[str]) -> int:
    """Number of rows of a file, without decoding them. Raises DataError as `read_texts`."""
    return sum(1 for _ in read_texts(path))


def _kind(path: Path) -> str:
    """ "empty", "parquet", "array", "objects" or "lines", by the content."""
    with open_stream(path) as stream:
        return _kind_of(stream.file, path)


def _kind_of(file: Any, path: Any) -> str:
    head = file.peek(6)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise DataError(f"{path}: {what}")
    if head[:4] == b"PAR1":
        return "parquet"
    if _skip_bom(file):
        file.read(len(_BOM))
    while chunk := file.read(_HEAD):
        if text := chunk.lstrip(_BLANK):
            break
    else:
        return "empty"
    if text[:1] == b"[":
        return "array" if _is_array(text) else "lines"
    return "objects" if text[:1] == b"{" and _spans_lines(text, file) else "lines"


def check_lines(file: BinaryIO, path: str) -> None:
    """Raises DataError unless an open file begins as plain JSON Lines, or is empty. For readers of raw lines."""
    head = file.read(_HEAD)
    if head.startswith((GZIP, ZSTD)):
        kind = "compressed"
    elif head.startswith(_BOM):
        kind = "text with a byte order mark"
    else:
        kind = _kind_of(io.BufferedReader(io.BytesIO(head)), path)
    if kind not in ("lines", "empty"):
        names = {"parquet": "Parquet", "array": "a JSON array", "objects": "JSON over several lines"}
        raise DataError(
            f"{path}: {names.get(kind, kind)}, and a build with Beam reads plain JSON Lines only; convert it, or build "
            "without --beam"
        )


def _skip_bom(file: Any) -> bool:
    return bool(file.peek(3)[:3] == _BOM)


def _decodes(text: bytes) -> bool:
    try:
        json_values.decode(text)
    except DataError:
        return False
    return True


def _is_array(text: bytes) -> bool:
    """Whether a file that begins with `text`, a bracket, is one array, rather than lines of one array each."""
    line, _, after = text.partition(b"\n")
    return not (after.lstrip(_BLANK)[:1] == b"[" and _decodes(line.strip(_BLANK)))


def _spans_lines(text: bytes, file: BinaryIO) -> bool:
    """Whether the first object of a file goes over several lines."""
    first_line = text.partition(b"\n")[0].strip(_BLANK)
    if b"\n" not in text or _decodes(first_line):
        return False
    if first_line == b"{":
        return True
    try:
        # A malformed first line of JSON Lines must not make the lines after it parts of one object.
        only, *others = itertools.islice(_cut(Stream(file, lambda: 0), bytearray(text)), 2)
    except (DataError, ValueError):
        return False
    return not others and _decodes(only.text)


def _lines(stream: Stream, path: Path) -> Iterator[RowText]:
    number, file = 0, stream.file
    while line := file.readline(MAX_ROW_BYTES + 1):
        number, is_complete = number + 1, len(line) <= MAX_ROW_BYTES
        where = f"{path}:{number}"
        if not is_complete:
            # Skips to the end of the line without keeping it in memory.
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
            yield RowText(where, number, _too_long(where), stream.position())
        elif line.strip(_BLANK):
            yield RowText(where, number, line, stream.position())


class _Object(NamedTuple):
    """An object cut out of a stream: its text, the line of its start, and the position in the file."""

    text: bytes
    line: int
    position: int


def _objects(stream: Stream, path: Path) -> Iterator[RowText]:
    """One object after the other, each over as many lines as it likes."""
    try:
        for number, row in enumerate(_cut(stream, bytearray()), start=1):
            yield RowText(f"{path}: row {number} (line {row.line})", number, row.text, row.position)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _cut(stream: Stream, buffer: bytearray) -> Iterator[_Object]:
    """The objects of a stream that begins with `buffer`. Raises DataError where one has no end."""
    line = 1
    try:
        for text, _ in _pieces(stream.file, buffer, in_array=False):
            yield _Object(text.strip(_BLANK), line + _newlines_before(text), stream.position())
            line += text.count(b"\n")
    except _TooLongError:
        raise DataError(f"an object of more than {MAX_ROW_BYTES >> 20} MiB, from line {line}") from None
    if bytes(buffer).strip(_BLANK):
        start = line + _newlines_before(buffer)
        raise DataError(f"the object in line {start} has no end, the file is cut off or a bracket is missing")


class _TooLongError(Exception):
    """A piece of more than MAX_ROW_BYTES."""


def _pieces(file: BinaryIO, buffer: bytearray, *, in_array: bool) -> Iterator[tuple[bytes, bytes]]:
    """The pieces of a file that begins with `buffer`, not decoded, as (text, mark): objects, or elements of an array.

    An object ends with a bracket, an element before a comma or a bracket that it did not open: the mark. What comes
    after the last piece stays in the buffer.

    Raises _TooLongError.
    """
    at, depth, quoted = 0, 0, False
    while True:
        match = (_INSIDE if quoted else _OUTSIDE).search(buffer, at)
        if match is None:
            # A backslash may be the last byte of the buffer; then `at` is one past its end already.
            at = max(at, len(buffer))
            if len(buffer) > MAX_ROW_BYTES:
                raise _TooLongError
            if not (chunk := file.read(_CHUNK)):
                return
            buffer += chunk
            continue
        at, mark = match.end(), match[0]
        if quoted:
            if mark == b"\\":
                at += 1  # An escaped quote does not end the string.
            else:
                quoted = False
            continue
        if mark == b'"':
            quoted = True
            continue
        is_end = in_array and not depth
        if mark in b"[{":
            depth, is_end = depth + 1, False
        # Whether it is the bracket that was opened is checked when the piece is decoded.
        elif depth and mark in b"]}":
            depth -= 1
            is_end = not in_array and not depth
        if is_end:
            text = bytes(buffer[: at - 1 if in_array else at])
            del buffer[:at]
            at = 0
            yield text, mark


def _array(stream: Stream, path: Path) -> Iterator[RowText]:
    number = 0
    for number, (text, line, last) in enumerate(_elements(stream.file, path), start=1):
        where = f"{path}: row {number} (line {line})"
        if last and number == 1 and not text:
            return  # an array without elements
        row = text if text else DataError(f"{where}: nothing between commas")
        yield RowText(where, number, row, stream.position())


def _elements(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int, bool]]:
    """Elements of the array at the file's position, as (text, line of its start, whether the last).

    They are not decoded here, so a malformed element does not affect the others.
    """
    line = 1
    buffer = bytearray()
    # To the first byte after the opening bracket.
    while not buffer.endswith(b"["):
        buffer = bytearray(file.read(1))
        line += buffer == b"\n"
    buffer, number = bytearray(), 1

    def unreadable(problem: str, text: bytes | bytearray) -> DataError:
        start = line + _newlines_before(text)
        return DataError(f"{path}: row {number} (line {start}): {problem}; the ends of later rows cannot be found")

    try:
        for text, mark in _pieces(file, buffer, in_array=True):
            if mark == b"}":
                raise unreadable("a } that was never opened", text)
            yield text.strip(_BLANK), line + _newlines_before(text), mark == b"]"
            line, number = line + text.count(b"\n"), number + 1
            if mark == b"]":
                break
        else:
            raise unreadable("the array is not closed, the file is cut off or a bracket is missing", buffer)
    except _TooLongError:
        raise unreadable(f"more than {MAX_ROW_BYTES >> 20} MiB without an end", buffer) from None
    while buffer:
        if buffer.strip(_BLANK):
            raise DataError(f"{path}: something follows the end of the array in line {line}")
        buffer = bytearray(file.read(_CHUNK))


def _newlines_before(text: bytes | bytearray) -> int:
    return text.count(b"\n", 0, len(text) - len(text.lstrip(_BLANK)))


def _parquet(path: Path) -> Iterator[RowText]:
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
                    yield RowText(where, number, _parquet_row(batch.slice(index, 1), where), size * number // total)
    except Exception as error:  # pyarrow raises many classes for broken files.
        after = f"after row {number}: " if number else ""
        raise DataError(f"{path}: Parquet that cannot be read: {after}{' '.join(str(error).split())[:200]}") from None
    # Rows that a reader drops without an error would be lost silently.
    if number < total:
        raise DataError(f"{path}: Parquet that cannot be read: {number} rows, its footer says {total}")


def _parquet_row(row: Any, where: str) -> bytes | DataError:
    try:
        (plain,) = row.to_pylist(maps_as_pydicts="strict")
        # Not msgspec's encoder, which writes NaN as null: a number that is none must be named later.
        text = json.dumps(msgspec.to_builtins(_without_nulls(plain)), ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # such as text that is not UTF-8
        return DataError(f"{where}: cannot be read: {' '.join(str(error).split())[:200]}")
    return text if len(text) <= MAX_ROW_BYTES else _too_long(where)


def _without_nulls(value: Any) -> Any:
    """The value without the nulls in objects."""
    # Parquet gives every struct of a column the same fields. A null was most likely a missing field.
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: a row of more than {MAX_ROW_BYTES >> 20} MiB")
