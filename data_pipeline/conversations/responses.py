"""Items of OpenAI's Responses API and Agents SDK as chat messages.

One response of the model is one message: its reasoning, its text and its calls, up to the outputs of the tools.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from data_pipeline.conversations.chat import block_text
from data_pipeline.conversations.kinds import plain
from data_pipeline.conversations.leftovers import is_nothing
from data_pipeline.errors import DataError

# Calls of tools, with the fields that hold their input; the output has the same name and `_output`.
_CALLS = {
    "function_call": ("arguments",),
    "custom_tool_call": ("input",),
    "mcp_call": ("arguments",),
    "local_shell_call": ("action",),
    "shell_call": ("action",),
    "apply_patch_call": ("operation",),
    "computer_call": ("action",),
}
_OUTPUTS = {f"{kind}_output" for kind in _CALLS}
_SEARCHES = {"web_search_call", "file_search_call", "code_interpreter_call"}
# No set: a value of a file may have no hash.
TYPES = ("message", "reasoning", *_CALLS, *_OUTPUTS, *_SEARCHES)
_KNOWN = {"id", "type", "status", "call_id", "name", "namespace", "server_label", "approval_request_id"}


class Merged(NamedTuple):
    """Chat messages, and for each the index of the first item it is made of."""

    messages: list[dict[str, Any]]
    origins: list[int]


def is_items(entries: list[Any]) -> bool:
    """Whether entries are items of the Responses API: one of them has a type of its own and no role."""
    return any(
        isinstance(entry, dict) and entry.get("type") in TYPES and ("role" not in entry or entry["type"] != "message")
        for entry in map(plain, entries)
    )


def to_messages(entries: list[Any]) -> Merged:
    """The items as chat messages, which `chat.read_message` reads. Raises DataError that names an unknown item."""
    messages: list[dict[str, Any]] = []
    origins: list[int] = []

    def add(index: int, message: dict[str, Any]) -> None:
        messages.append(message)
        origins.append(index)

    def reply(index: int) -> dict[str, Any]:
        """The assistant's message that the item continues, or a new one."""
        if not is_open:
            add(index, {"role": "assistant", "content": None})
        return messages[-1]

    is_open = False  # The last message is a response that more items may belong to.
    for index, raw in enumerate(entries):
        item = plain(raw)
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message" and item.get("role") == "assistant":
            if is_open and (messages[-1]["content"] is not None or messages[-1].get("tool_calls")):
                is_open = False
            message = reply(index)
            message |= {key: value for key, value in item.items() if key not in ("id", "status", "type", "phase")}
            is_open = True
        elif kind == "message":
            add(index, {key: value for key, value in item.items() if key not in ("id", "status", "type")})
            is_open = False
        elif kind == "reasoning":
            if is_open and (messages[-1]["content"] is not None or messages[-1].get("tool_calls")):
                is_open = False
            message = reply(index)
            texts = [message.get("reasoning_content"), block_text(item.get("content")) or block_text(item)]
            message["reasoning_content"] = "\n".join(filter(None, texts)) or None
            is_open = True
        elif kind in _CALLS:
            message = reply(index)
            message.setdefault("tool_calls", []).append(_call(item, _CALLS[kind]))
            is_open = True
            # The call of a remote tool holds its own output.
            if kind == "mcp_call" and item.get("output") is not None:
                add(index, _output(item))
                is_open = False
        elif kind in _OUTPUTS:
            add(index, _output(item))
            is_open = False
        else:
            what = f"of the type {kind!r:.40}" if isinstance(item, dict) else "no object"
            raise DataError(f"item {index} is {what}, which cannot be trained on and scored")
    return Merged(messages, origins)


def _call(item: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    value = next((item[key] for key in keys if item.get(key) is not None), None)
    call = {"id": item.get("call_id") or item.get("id"), "name": item.get("name") or item["type"], "arguments": value}
    ignored = _KNOWN | set(keys) | ({"output", "error"} if item["type"] == "mcp_call" else set())
    return call | {key: inner for key, inner in item.items() if key not in ignored and not is_nothing(inner)}


def _output(item: dict[str, Any]) -> dict[str, Any]:
    ignored = {"id", "type", "status", "call_id", "output", "max_output_length", *_KNOWN, "arguments", "error"}
    return {
        "role": "tool",
        "content": item.get("output"),
        "tool_call_id": item.get("call_id") or item.get("id"),
        **{key: value for key, value in item.items() if key not in ignored and not is_nothing(value)},
    }
