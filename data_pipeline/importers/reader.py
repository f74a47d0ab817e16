"""What a reader of a format is, and what readers share.

A reader is a module with `READER`, a `Reader`: how it recognises a row of its shape, and how it turns one into parsed
trajectories. Adding a format is one such module, and its name in `registry.py`.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from data_pipeline import json_values
from data_pipeline.conversations import chat
from data_pipeline.conversations.kinds import kind_of
from data_pipeline.conversations.leftovers import Leftovers, add_note, is_nothing
from data_pipeline.conversations.reading import read_conversation
from data_pipeline.conversations.tools import read_tool
from data_pipeline.errors import DataError
from data_pipeline.importers.fields import Path

Notes = Counter  # Changes and omissions, by description.
MESSAGE_FIELDS = "message_fields"  # The key in `meta` of what messages hold beyond their text.
# Fields of a row that no text replaces.
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")


class Context(NamedTuple):
    """How to read rows: where messages and tools are, the roles, where to count, and the file of the row."""

    messages: Path | None
    notes: Notes
    tools: Path | None = None
    roles: Mapping[str, str] = chat.ROLES
    file: pathlib.Path | None = None


class Parsed(NamedTuple):
    """A trajectory of a row.

    Args:
      messages: in the form of a trajectory.
      fields: other fields of the trajectory.
      used: fields of the row, or dotted paths, that are in these already; others go to `meta`.
      origins: for each message, its index in the row's own list, by which labels may name it.
      meta: what does not fit elsewhere.
      chosen, rejected: of a preference pair, whose messages are the state.
    """

    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    used: set[str]
    origins: Sequence[int] = ()
    meta: Mapping[str, Any] = MappingProxyType({})
    chosen: dict[str, Any] | None = None
    rejected: Sequence[dict[str, Any]] = ()


class Reader(NamedTuple):
    """A format.

    Args:
      name: of `--format`.
      about: who writes it.
      matches: of a row, what shows that it has this shape; None if it has not.
      parse: the trajectories of a row. Raises DataError for a malformed one.
      messages: the usual path of the conversation; None if the format has no such field.
      outcome, id, task: the usual paths of these fields, by preference.
    """

    name: str
    about: str
    matches: Callable[[Mapping[str, Any]], str | None]
    parse: Callable[[dict[str, Any], Context], list[Parsed]]
    messages: str | None = None
    outcome: tuple[str, ...] = ("outcome",)
    id: tuple[str, ...] = ("id",)
    task: tuple[str, ...] = ("task",)


def conversation(entries: Any, context: Context, name: str, *, join: bool = True) -> Parsed:
    """A list of messages, or its JSON, as a trajectory without other fields. Counts in `context.notes`."""
    leftovers = Leftovers()
    messages, origins = read_conversation(full_list(entries, name), leftovers, roles=context.roles, join=join)
    for description, count in leftovers.counts.items():
        note(context.notes, description, count)
    kept = sum("reasoning_content" in message for message in messages)
    if kept:
        note(context.notes, "messages with reasoning, kept", kept)
    meta = {MESSAGE_FIELDS: {str(index): fields for index, fields in leftovers.fields.items()}}
    return Parsed(messages, {}, set(), origins, meta if leftovers.fields else {})


def with_system(parsed: Parsed, system: Any, context: Context) -> Parsed:
    """The trajectory with the system prompt of its row, a text or blocks of it, as the first message."""
    if is_nothing(system):
        return parsed
    (message,) = conversation([{"role": "system", "content": system}], context, "system").messages
    if parsed.messages and parsed.messages[0]["role"] == "system":
        if parsed.messages[0]["content"] == message["content"]:
            return parsed
        raise DataError("`system` is given and the conversation begins with another system message; keep one")
    return parsed._replace(messages=[message, *parsed.messages], origins=[-1, *parsed.origins])


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raises DataError for images, audio or video next to the messages."""
    for key in _MEDIA:
        if not is_nothing(row.get(key)):
            raise DataError(f"`{key}` of the row: only text can be trained on and scored")


def tools_of(value: Any, name: str = "tools") -> list[dict[str, Any]]:
    """Definitions of tools in OpenAI's form, from a list of those of any API, or its JSON."""
    if is_nothing(value):
        return []
    entries = full_list(value, name)
    return [read_tool(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]


def tools_near(row: Mapping[str, Any], context: Context) -> tuple[list[dict[str, Any]], set[str]]:
    """The tools of a row and the fields they are in: at the path of the user, next to the messages, or in the row."""
    if context.tools is not None:
        value = context.tools.find(row)
        return tools_of(value, context.tools.text), {context.tools.key} - {None}
    places: list[tuple[str, Mapping[str, Any]]] = [("", row)]
    if context.messages is not None and (parent := context.messages.parent) is not None:
        inner = parent.find(row)
        if isinstance(inner, dict):
            places.insert(0, (f"{parent.text}.", inner))
    for prefix, place in places:
        for key in ("tools", "functions"):
            if not is_nothing(place.get(key)):
                return tools_of(place[key], key), {prefix + key}
    return [], {"tools", "functions"}


def full_list(value: Any, name: str) -> list[Any]:
    """A list that is not empty, from a list or its JSON. Raises DataError for anything else."""
    if isinstance(value, str) and value:
        value = json_value(value, name)
    if not isinstance(value, list) or not value:
        problem = "missing" if value is None else "empty" if value in ([], "") else f"{kind_of(value)}, not a list"
        raise DataError(f"{name} is {problem}")
    return value


def json_value(text: str, name: str) -> Any:
    """The value of JSON in a text. Raises DataError that begins with `name`."""
    try:
        return json_values.decode(text)
    except DataError as error:
        reason = str(error).removeprefix("not JSON: ")
        raise DataError(f"{name} are not JSON: {reason}: {text[:40]!r}") from None


def note(notes: Notes, description: str, count: int = 1) -> None:
    """Adds to the count of a change or omission."""
    add_note(notes, description, count)


def step_parts(texts: Sequence[str], notes: Notes, name: str) -> list[dict[str, str]]:
    """Texts as the parts of one assistant message, a step each.

    Every part ends with a newline, where a tokenizer ends a token. Line breaks at the beginning of a text move to the
    end of the one before, so that the text stays the same.
    """
    parts = [texts[0]]
    for text in texts[1:]:
        body = text.lstrip("\r\n")
        parts[-1] += text[: len(text) - len(body)]
        parts.append(body)
    for index, part in enumerate(parts):
        if not part.strip():
            raise DataError(f"{name}[{index}] has no text; every step needs some")
    if any(not part.endswith("\n") for part in parts):
        note(notes, "trajectories in which steps were ended with a newline")
    return [{"type": "text", "text": part if part.endswith("\n") else part + "\n"} for part in parts]


def looks_like_messages(value: Any, *keys: str) -> bool:
    """Whether a value is a list of objects that have one of these keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, dict) for entry in value[:3])
        and any(key in value[0] for key in keys)
    )
