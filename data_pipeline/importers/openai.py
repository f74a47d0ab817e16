"""OpenAI's chat format, as APIs, SDKs and fine-tuning files write it. An assistant message is one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.reader import (
    Context,
    Parsed,
    Reader,
    conversation,
    full_list,
    looks_like_messages,
    tools_near,
    with_system,
)


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has `messages` with roles."""
    return "`messages` with `role`" if looks_like_messages(row.get("messages"), "role") else None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads a row with chat messages, perhaps tools, and perhaps a system prompt next to them."""
    if context.messages is None:
        raise DataError("the field of the conversation is not known; name it with --messages-field")
    entries = full_list(context.messages.find(row), context.messages.text)
    if looks_like_messages(entries, "from") and "role" not in entries[0]:
        raise DataError("message 0 has no role; this looks like ShareGPT, use --format sharegpt")
    parsed = conversation(entries, context, context.messages.text)
    tools, used = tools_near(row, context)
    parent = context.messages.parent
    place = row if parent is None else parent.find(row)
    system = place.get("system") if isinstance(place, dict) else None
    # A system prompt is a text or blocks of text; anything else called so is about the system that ran.
    if isinstance(system, str) or looks_like_messages(system, "text"):
        parsed = with_system(parsed, system, context)
        used = used | {"system" if parent is None else f"{parent.text}.system"}
    fields = {"tools": tools} if tools else {}
    return [parsed._replace(fields=fields, used={*used, context.messages.key} - {None})]


READER = Reader("openai", "OpenAI's and Anthropic's APIs, their SDKs, fine-tuning files", matches, parse, "messages")
