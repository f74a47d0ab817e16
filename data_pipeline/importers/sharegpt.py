"""ShareGPT conversations (`from` and `value`), and AgentGym's, which also have an `item_id`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_pipeline.conversations import chat
from data_pipeline.conversations.kinds import kind_of
from data_pipeline.conversations.leftovers import Leftovers, is_nothing
from data_pipeline.conversations.tool_calls import function_call
from data_pipeline.errors import DataError
from data_pipeline.importers.fields import name
from data_pipeline.importers.reader import (
    Context,
    Notes,
    Parsed,
    Reader,
    full_list,
    json_value,
    looks_like_messages,
    note,
    tools_near,
    with_system,
)

_ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
_FIELDS = {"from", "value", "loss", "weight"}
_ITEM = re.compile(r"(.+)_(\d+)")


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has conversations of this form, and is not AgentGym's."""
    if not looks_like_messages(row.get("conversations"), "from") or matches_agentgym(row):
        return None
    return "`conversations` with `from` and `value`"


def matches_agentgym(row: Mapping[str, Any]) -> str | None:
    """Whether the row also has an item of AgentGym."""
    if looks_like_messages(row.get("conversations"), "from") and "item_id" in row:
        return "`conversations` with `from`, and `item_id`"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Parses a row with turns. `system` becomes the first message; `tools` is a list or its JSON."""
    if context.messages is None:
        raise DataError("the field of the conversation is not known; name it with --messages-field")
    turns = full_list(context.messages.find(row), context.messages.text)
    roles = _ROLES if context.roles is chat.ROLES else {**_ROLES, **context.roles}
    messages = [_turn(turn, index, roles, context.notes) for index, turn in enumerate(turns)]
    tools, used = tools_near(row, context)
    parsed = Parsed(messages, {"tools": tools} if tools else {}, {context.messages.key, *used} - {None})
    parsed = parsed._replace(origins=list(range(len(messages))))
    if isinstance(row.get("system"), str):
        parsed = with_system(parsed, row["system"], context)
        parsed.used.add("system")
    return [parsed]


def parse_agentgym(row: dict[str, Any], context: Context) -> list[Parsed]:
    """As `parse`, with the id and the task from `item_id`: "webshop_123" is task webshop/123 of environment webshop.

    `item_id` itself is kept in `meta`.
    """
    (parsed,) = parse(row, context)
    if row.get("item_id") is None:
        return [parsed]
    item = name(row["item_id"], "item_id")
    match = _ITEM.fullmatch(item)
    fields = {"environment": match[1], "task": f"{match[1]}/{match[2]}"} if match else {"task": item}
    # All attempts at an item share it; the converter appends numbers.
    return [parsed._replace(fields=parsed.fields | fields | {"id": fields["task"]})]


def _turn(raw: Any, index: int, roles: Mapping[str, str], notes: Notes) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DataError(f"turn {index} is {kind_of(raw)}, not an object")
    if "from" not in raw and "role" in raw:
        raise DataError(f"turn {index} has no `from`; this looks like OpenAI's format, use --format openai")
    role = chat.role_of(raw, "from", roles, f"turn {index}")
    where = f"turn {index} ({raw['from']})"
    value = raw.get("value")
    if not isinstance(value, str):
        raise DataError(f"{where}: value is {kind_of(value)}, not a text")
    is_context = role == chat.CONTEXT
    message: dict[str, Any] = {"role": "assistant" if is_context else role, "content": value}
    if raw["from"] == "function_call":
        message = {"role": role, "content": None, "tool_calls": _calls(value, where, notes)}
    if raw["from"] not in _ROLES:
        message["name"] = raw["from"]
    # `"loss": false` (AgentGym) and `"weight": 0` mark an assistant turn that is no step, such as an acknowledgement.
    is_step = chat.flag(raw, "loss", where) and chat.flag(raw, "weight", where) and not is_context
    if message["role"] == "assistant" and not is_step:
        message["step"] = False
    for key, inner in raw.items():
        if key not in _FIELDS and not is_nothing(inner):
            note(notes, f"turn field `{key:.40}`, left out")
    return message


def _calls(value: str, where: str, notes: Notes) -> list[dict[str, Any]]:
    parsed = json_value(value, f"{where}: the calls")
    calls, leftovers = [], Leftovers()
    for index, call in enumerate(parsed if isinstance(parsed, list) and parsed else [parsed]):
        if not isinstance(call, dict):
            raise DataError(f'{where}: call {index} is {kind_of(call)}, not {{"name", "arguments"}}')
        called = function_call(call.get("name"), call.get("arguments"), f"{where}: call {index}", leftovers)
        calls.append({"type": "function", "function": called})
    for description, count in leftovers.counts.items():
        note(notes, description, count)
    return calls


READER = Reader("sharegpt", "ShareGPT, LLaMA-Factory", matches, parse, "conversations")
AGENTGYM = Reader(
    "agentgym", "AgentGym", matches_agentgym, parse_agentgym, "conversations", ("outcome", "reward", "score")
)
