"""Whether a chat template prints everything that a conversation says.

Every text of the conversation is replaced by a marker, and the result is rendered too: what a template leaves out or
moves, it leaves out or moves there. Then the rendering is compared with that of the markers, text by text: what differs
from its marker's place is something that the template changed because of its content.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

# A word that is in no vocabulary of templates. Others are tried if a conversation contains it.
_PREFIXES = ("Xq7m", "Yv3k", "Zj9w", "Qx5h")


class Field(NamedTuple):
    """A text that a template must print: its message, what it is, its marker, and how it may be printed.

    `quoted` are the forms in place of the marker in double quotes.
    """

    message: int
    what: str
    marker: str
    forms: tuple[str, ...]
    quoted: tuple[str, ...]


Span = tuple[int, int]


class Marked(NamedTuple):
    """A conversation with markers in place of its texts, and what they stand for, in order."""

    messages: list[dict[str, Any]]
    fields: list[Field]


class Loss(NamedTuple):
    """A field that a template leaves out, moves or changes."""

    field: Field
    is_missing: bool


def first_loss(
    messages: list[dict[str, Any]],
    text: str,
    render: Callable[[list[dict[str, Any]]], str | None],
    special: Sequence[Span] = (),
) -> Loss | None:
    """The first text of a conversation that its rendering `text` does not contain in its place; None if all are there.

    Args:
      messages: as the template takes them.
      render: renders other messages with the same tools; None if the template fails for them.
      special: places of special tokens in `text`. A text that is part of one is changed by it.
    """
    prefix = next((prefix for prefix in _PREFIXES if prefix not in text), None)
    marked = mark(messages, prefix or _PREFIXES[0])
    rendered = render(marked.messages) if prefix is not None else None
    if rendered is not None:
        if (missing := _unmarked(marked.fields, rendered)) is not None:
            return Loss(missing, is_missing=True)
        if (places := _places(marked.fields, rendered, text)) is not None:
            swallowed = _swallowed(places, special)
            return None if swallowed is None else Loss(swallowed, is_missing=False)
    # The template treats these texts otherwise than others: each must at least occur, after the message before it.
    changed = _out_of_order(marked.fields, text)
    return None if changed is None else Loss(changed, is_missing=False)


def mark(messages: list[dict[str, Any]], prefix: str) -> Marked:
    """The conversation with a marker for every text that is not empty."""
    fields: list[Field] = []
    marked = []
    called: dict[str, Any] = {}  # Markers of the tools called so far.

    def marker(message: int, what: str, value: Any) -> Any:
        if value in ("", None) or (isinstance(value, (dict, list)) and not value):
            return value
        # Digits of a fixed width and a letter after them: no marker is the beginning of another.
        word = f"{prefix}{len(fields):05d}z"
        fields.append(Field(message, what, word, *_forms(value)))
        return word

    for index, message in enumerate(messages):
        copy = dict(message)
        for key in ("reasoning_content", "reasoning", "thinking"):
            if key in copy:
                copy[key] = marker(index, "the reasoning", copy[key])
        copy["content"] = marker(index, "content", copy.get("content"))
        if copy.get("name"):
            # The name of a tool is in its call already.
            is_called = copy["role"] == "tool" and copy["name"] in called
            copy["name"] = called[copy["name"]] if is_called else marker(index, "the name", copy["name"])
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_marked_call(call, index, marker) for call in copy["tool_calls"]]
            pairs = zip(message["tool_calls"], copy["tool_calls"], strict=True)
            called |= {call["function"]["name"]: marked_call["function"]["name"] for call, marked_call in pairs}
        marked.append(copy)
    return Marked(marked, fields)


def _marked_call(call: dict[str, Any], index: int, marker: Callable[[int, str, Any], Any]) -> dict[str, Any]:
    function = call["function"]
    name, arguments = function["name"], function.get("arguments")
    copy = {**function, "name": marker(index, f"the name of tool call {name}", name)}
    what = f"the arguments of tool call {name}"
    if isinstance(arguments, dict):
        copy["arguments"] = {key: marker(index, what, value) for key, value in arguments.items()}
    elif arguments is not None:
        copy["arguments"] = marker(index, what, arguments)
    return {**call, "function": copy}


def _forms(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How a template may print a value, without quotes and in place of a quoted text."""
    if not isinstance(value, str):
        as_json = (json.dumps(value, ensure_ascii=False), msgspec.json.encode(value).decode())
        return tuple(dict.fromkeys((*as_json, str(value)))), as_json
    plain = (value, value.strip(), value.lstrip(), value.rstrip(), value.strip("\n"))
    escaped = [json.dumps(form, ensure_ascii=ascii)[1:-1] for form in plain for ascii in (False, True)]
    # Jinja's own filter escapes for HTML.
    html = [re.sub("[<>&']", lambda found: f"\\u{ord(found[0]):04x}", form) for form in escaped]
    forms = tuple(dict.fromkeys((*plain, *escaped, *html)))
    return forms, tuple(f'"{form}"' for form in forms)


def _unmarked(fields: list[Field], rendered: str) -> Field | None:
    """The first field whose marker is not in the rendering, or before a marker of an earlier message."""
    reached = at_message = 0
    message = -1
    for field in fields:
        at = rendered.find(field.marker)
        if field.message != message:
            message, at_message = field.message, reached
        if at < at_message:
            return field
        reached = max(reached, at)
    return None


def _places(fields: list[Field], rendered: str, text: str) -> list[tuple[Field, Span]] | None:
    """Where the fields are in `text`, if it is the rendering of the markers with the fields in their places."""
    if not fields:
        return [] if rendered == text else None
    by_marker = {field.marker: field for field in fields}
    prefix = re.escape(fields[0].marker[:4])
    literals = re.split(rf'("{prefix}\d{{5}}z"|{prefix}\d{{5}}z)', rendered)
    at = len(literals[0])
    if not text.startswith(literals[0]):
        return None
    places = []
    for word, literal in zip(literals[1::2], literals[2::2], strict=True):
        field = by_marker[word.strip('"')]
        for form in field.quoted if word[0] == '"' else field.forms:
            end = at + len(form)
            if text.startswith(form, at) and text.startswith(literal, end):
                places.append((field, (at, end)))
                at = end + len(literal)
                break
        else:
            return None
    return places if at == len(text) else None


def _swallowed(places: list[tuple[Field, Span]], special: Sequence[Span]) -> Field | None:
    """The first field that is partly inside of a special token: the end of a text and the template made one."""
    starts = [start for start, _ in special]
    for field, (start, end) in places:
        if start == end:
            continue  # of spaces that the template strips
        before = bisect_right(starts, start) - 1
        if before >= 0 and special[before][1] > start:
            return field
        if before + 1 < len(special) and starts[before + 1] < end:
            return field
    return None


def _out_of_order(fields: list[Field], text: str) -> Field | None:
    """The first field that does not occur in the text after all of the message before it."""
    message, start, end = -1, 0, 0
    for field in fields:
        if field.message != message:
            message, start = field.message, end
        # Within a message, calls may come before the content, but nothing is printed twice for two fields.
        places = [(place, len(form)) for form in field.forms if (place := text.find(form, start)) >= 0]
        if not places:
            return field
        place, length = min(places)
        end = max(end, place + length)
    return None
