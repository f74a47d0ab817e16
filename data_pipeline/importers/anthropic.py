"""Anthropic's Messages API: blocks in `content`, `system` next to the messages, tools with `input_schema`.

The blocks are read wherever messages are; this reader only recognises the shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.importers import openai
from data_pipeline.importers.reader import Reader, looks_like_messages

_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")  # No set: a value of a file may have no hash.


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether messages have blocks of this API, or tools its schemas."""
    messages = row.get("messages")
    if not looks_like_messages(messages, "role"):
        return None
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict) and block.get("type") in _BLOCKS:
                return f"`messages` with blocks of type {block['type']}"
    if looks_like_messages(row.get("tools"), "input_schema"):
        return "`tools` with `input_schema`"
    return None


READER = Reader("anthropic", "Anthropic's API and SDK", matches, openai.parse, "messages")
