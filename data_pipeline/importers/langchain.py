"""LangChain and LangGraph messages: `type` in place of `role`, the fields next to it, in `data` or in `kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.fields import Path
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, tools_near

_ROLES = {
    "human": "user",
    "ai": "assistant",
    "tool": "tool",
    "system": "system",
    "function": "tool",
    "developer": "system",
}
# About the message: which response, how many tokens.
_ABOUT = {
    "id",
    "type",
    "example",
    "response_metadata",
    "usage_metadata",
    "additional_kwargs",
    "status",
    "lc",
    "artifact",
}
_PATHS = ("messages", "outputs.messages", "output.messages", "output", "run.messages", "values.messages")


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether messages name their type."""
    for path in _PATHS:
        value = Path.parse(path).find(dict(row))
        if isinstance(value, list) and value and all(_type(entry) in _ROLES for entry in value):
            return f"`{path}` with `type` human or ai"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads the messages of a run, or of the output of one."""
    where = context.messages
    if where is None:
        where = next(
            (path for path in map(Path.parse, _PATHS) if isinstance(path.find(row), list)), Path.parse("messages")
        )
    entries = full_list(where.find(row), where.text)
    converted = [_message(entry, f"message {index}") for index, entry in enumerate(entries)]
    parsed = conversation(converted, context, where.text)
    tools, used = tools_near(row, context._replace(messages=where))
    return [parsed._replace(fields={"tools": tools} if tools else {}, used={*used, where.text})]


def _type(entry: Any) -> str | None:
    """human, ai, tool or system; None for an entry that is no message of LangChain."""
    if not isinstance(entry, dict) or "role" in entry:
        return None
    kind = entry.get("type")
    if kind == "constructor" and isinstance(entry.get("id"), list) and entry["id"]:
        kind = str(entry["id"][-1]).removesuffix("Chunk").removesuffix("Message").lower()
    if not isinstance(kind, str):
        return None
    return kind.removesuffix("MessageChunk").lower()


def _message(raw: Any, where: str) -> dict[str, Any]:
    kind = _type(raw)
    if kind not in _ROLES:
        raise DataError(f"{where} has no type of {', '.join(_ROLES)}")
    inner = next((raw[key] for key in ("data", "kwargs") if isinstance(raw.get(key), dict)), raw)
    message = {key: value for key, value in inner.items() if key not in _ABOUT and key != "invalid_tool_calls"}
    # Calls whose arguments LangChain could not parse: they are what the agent did.
    calls = [
        *(inner.get("tool_calls") or ()),
        *({**call, "error": None} for call in inner.get("invalid_tool_calls") or ()),
    ]
    message["tool_calls"] = [{**call, "type": None} if isinstance(call, dict) else call for call in calls]
    more = inner.get("additional_kwargs")
    if isinstance(more, dict):
        # Its tool_calls are those of the message, as the API wrote them.
        message |= {key: value for key, value in more.items() if key not in ("tool_calls", "function_call", "refusal")}
        if not calls and more.get("tool_calls"):
            message["tool_calls"] = more["tool_calls"]
    if isinstance(message.get("content"), list):
        # Calls are in `tool_calls` too.
        blocks = message["content"]
        repeated = ("tool_use", "tool_call", "function_call")
        message["content"] = [b for b in blocks if not (calls and isinstance(b, dict) and b.get("type") in repeated)]
    return {"role": _ROLES[kind], **message}


READER = Reader("langchain", "LangChain, LangGraph, LangSmith", matches, parse)
