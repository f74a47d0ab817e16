"""OpenAI's Responses API and Agents SDK: lists of items in `input` and `output`, or one list of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.conversations import responses
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, note, tools_of, with_system

_LISTS = ("input", "new_items", "output", "items")


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has items of this API."""
    if isinstance(row.get("messages"), list):
        return "`messages` with items of the Responses API" if responses.is_items(row["messages"]) else None
    for key in _LISTS:
        entries = row.get(key)
        if isinstance(entries, list) and any(_raw(entry).get("type") in responses.TYPES for entry in _objects(entries)):
            return f"`{key}` with items of the Responses API"
    return None


def _objects(entries: list[Any]) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict)]


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads the items of `input` and then those of `output`; `instructions` are the system prompt."""
    used = {"tools", "instructions"}
    if context.messages is not None:
        items, used = context.messages.find(row), used | {context.messages.key}
    elif isinstance(row.get("messages"), list):
        items, used = row["messages"], used | {"messages"}
    else:
        items = []
        for key in _LISTS:
            value = row.get(key)
            if isinstance(value, str) and key == "input":
                value = [{"role": "user", "content": value}]
            if isinstance(value, list):
                items, used = [*items, *value], used | {key}
    if not isinstance(items, list) or not items:
        raise DataError("input and output are missing or empty")
    items = [_raw(item) for item in items]
    empty = sum(
        isinstance(item, dict) and item.get("type") == "reasoning" and not responses.block_text(item) for item in items
    )
    if empty:
        note(context.notes, "items of reasoning that hold no text", empty)
    parsed = with_system(conversation(items, context, "input"), row.get("instructions"), context)
    tools = tools_of(row["tools"]) if row.get("tools") else []
    return [parsed._replace(fields={"tools": tools} if tools else {}, used=used - {None})]


def _raw(item: Any) -> Any:
    """The item of a RunItem of the Agents SDK; any other as it is."""
    return item["raw_item"] if isinstance(item, dict) and isinstance(item.get("raw_item"), dict) else item


READER = Reader("responses", "OpenAI's Responses API and Agents SDK", matches, parse)
