"""The rows of files and folders to import.

A file is not always a list of rows: an array of messages, or the events of a session, are one conversation. An archive
of inspect_ai is a folder of samples.
"""

from __future__ import annotations

import itertools
import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline import json_values
from data_pipeline.conversations import responses
from data_pipeline.errors import DataError
from data_pipeline.importers import claude_code, langchain, openhands
from data_pipeline.source import MAX_ROW_BYTES, SourceRow, read_rows

_SUFFIXES = {".json", ".jsonl", ".ndjson", ".traj", ".parquet", ".eval"}
_COMPRESSED = {".gz", ".zst"}
# What zipfile raises for a broken archive; ValueError is for names and sizes that cannot be.
_BROKEN_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, RuntimeError, OSError, EOFError,
    ValueError,
)  # fmt: skip
_LOOK = 20  # Rows by which it is decided whether a file is one conversation.


class InputFile(NamedTuple):
    """A file to import. Rows without an id are called after `name`; `is_listed` files were named by the user."""

    path: Path
    name: str
    is_listed: bool


class Inputs(NamedTuple):
    """Files to import in their order, and how many files of folders have another kind."""

    files: list[InputFile]
    others: int


def find_files(arguments: Sequence[str | os.PathLike[str]]) -> Inputs:
    """Files, and for each folder the files in it and below, by name. Raises DataError for a folder without any."""
    files: list[InputFile] = []
    others = 0
    for argument in map(Path, arguments):
        if not argument.is_dir():
            files.append(InputFile(argument, _stem(argument), True))
            continue
        before = len(files)
        for folder, folders, names in os.walk(argument):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
                if name.startswith(".") or not suffixes or suffixes[-1] not in _SUFFIXES or not path.is_file():
                    others += 1
                    continue
                relative = path.relative_to(argument)
                files.append(InputFile(path, str(relative.with_name(_stem(path))), False))
        if len(files) == before:
            kinds = ", ".join(sorted(_SUFFIXES))
            raise DataError(f"{argument}: a folder without a file of {kinds}, also compressed")
    return Inputs(files, others)


def _stem(path: Path) -> str:
    while path.suffix in _SUFFIXES | _COMPRESSED:
        path = path.with_suffix("")
    return path.name


def read_file(file: InputFile) -> Iterator[SourceRow]:
    """The rows of a file: conversations, whatever rows or elements the file has. Raises DataError as `read_rows`."""
    path = file.path
    if zipfile.is_zipfile(path):
        yield from _archive(path)
        return
    rows = read_rows(path, lists=True)
    first = _head(rows)
    key = _one_conversation([row.value for row in first])
    if key is not None:
        yield _grouped(path, key, itertools.chain(first, rows))
        return
    for row in itertools.chain(first, rows):
        yield _of_list(row) if isinstance(row.value, list) else row


def _head(rows: Iterator[SourceRow]) -> list[SourceRow]:
    """The first rows of a file: _LOOK, or as many as hold a conversation's most bytes."""
    first: list[SourceRow] = []
    size = 0
    for row in itertools.islice(rows, _LOOK):
        first.append(row)
        size += row.size
        if size > MAX_ROW_BYTES:
            break
    return first


def _one_conversation(values: list[Any]) -> str | None:
    """The key under which the rows of a file are one conversation; None if each is a row of its own."""
    objects = [value for value in values if isinstance(value, dict)]
    if not objects or len(objects) < len([value for value in values if not isinstance(value, DataError)]):
        return None
    if any(map(claude_code.is_event, objects)):
        return claude_code.SESSION
    if openhands.is_event(objects[0]):
        return openhands.EVENTS
    return _key_of_messages(objects) if len(values) == len(objects) else None


def _key_of_messages(entries: list[Any]) -> str | None:
    """The key of a list of messages: `messages` or `conversations`; None if the entries are no messages."""
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        return None
    if all(isinstance(entry.get("from"), str) and isinstance(entry.get("value"), str) for entry in entries):
        return "conversations"
    if any(_is_rows(entry) for entry in entries):
        return None
    if all(isinstance(entry.get("role"), str) or entry.get("type") in responses.TYPES for entry in entries):
        return "messages"
    return "messages" if langchain.READER.matches({"messages": entries}) else None


def _is_rows(entry: dict[str, Any]) -> bool:
    """Whether an object with a role is more than a message: it holds a conversation of its own."""
    return any(isinstance(entry.get(key), list) for key in ("messages", "conversations", "steps", "history"))


def _of_list(row: SourceRow) -> SourceRow:
    key = _key_of_messages(row.value)
    if key is None:
        error = DataError(f"{row.where}: a row must be an object or a list of messages, this list holds neither")
        return row._replace(value=error)
    return row._replace(value={key: row.value})


def _grouped(path: Path, key: str, rows: Iterable[SourceRow]) -> SourceRow:
    """All rows of a file as one, or the error of the first that is bad."""
    entries: list[Any] = []
    error: DataError | None = None
    repairs: Counter[str] = Counter()
    size = end = 0
    # To the end in any case, for the position in the file.
    for row in rows:
        end, size = row.bytes_read, size + row.size
        if error is None and size > MAX_ROW_BYTES:
            error = DataError(f"{path}: one conversation of more than {MAX_ROW_BYTES >> 20} MiB")
        if error is None and isinstance(row.value, DataError):
            error = row.value
        if error is None:
            entries.append(row.value)
            repairs.update(row.repairs)
    return SourceRow(str(path), 1, {key: entries} if error is None else error, end, repairs)


def _archive(path: Path) -> Iterator[SourceRow]:
    """The samples of an inspect_ai archive (.eval)."""
    total = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.startswith("samples/") and name.endswith(".json")]
            if not names:
                raise DataError(f"{path}: a zip archive without samples of inspect_ai; unpack it first (unzip)")
            header = next((name for name in ("header.json", "_journal/start.json") if name in archive.namelist()), None)
            about = _about(archive, header, path) if header else {}
            for number, name in enumerate(names, start=1):
                where = f"{path}: {name}"
                repairs: Counter[str] = Counter()
                try:
                    value = json_values.decode(_member(archive, name), repairs)
                    if not isinstance(value, dict):
                        raise DataError("a sample is no object")
                    value["eval"] = about
                except DataError as error:
                    value = DataError(f"{where}: {error}")
                yield SourceRow(where, number, value, total * number // len(names), repairs)
    except DataError:
        raise
    except _BROKEN_ARCHIVE as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path}: an archive that cannot be read: {reason}; write it as JSON (inspect log convert --to json)"
        ) from None


def _about(archive: zipfile.ZipFile, header: str, path: Path) -> Any:
    """What the header of an archive says of its samples."""
    try:
        value = json_values.decode(_member(archive, header))
        if not isinstance(value, dict):
            raise DataError("the header is no object")
    except DataError as error:
        raise DataError(f"{path}: {header}: {error}") from None
    return value.get("eval", {})


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        text = file.read(MAX_ROW_BYTES + 1)
    if len(text) > MAX_ROW_BYTES:
        raise DataError(f"more than {MAX_ROW_BYTES >> 20} MiB")
    return text
