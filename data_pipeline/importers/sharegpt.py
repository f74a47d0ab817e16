"""Import of ShareGPT conversations (`from` and `value`), and of AgentGym's, which also have an `item_id`."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers import openai
from data_pipeline.importers.fields import Path, name
from data_pipeline.importers.openai import Notes, Parsed
from data_pipeline.source import kind_of

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


def parse(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """Parses a row with turns at `where`. `system` becomes the first message; `tools` is a list or its JSON."""
    turns = openai.full_list(where.find(row), where.text)
    messages = [_turn(turn, index, notes) for index, turn in enumerate(turns)]
    used = {where.key, "tools", "functions"} - {None}
    if isinstance(row.get("system"), str):
        used.add("system")
        if row["system"]:
            if messages[0]["role"] == "system":
                raise DataError("`system` is given and the conversation begins with a system turn; keep one")
            messages.insert(0, {"role": "system", "content": row["system"]})
    tools = openai.tools(row)
    return Parsed(messages, {"tools": tools} if tools else {}, used)


def parse_agentgym(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """As `parse`, with the id and the task from `item_id`: "webshop_123" is task webshop/123 of environment webshop.

    `item_id` itself is kept in `meta`.
    """
    messages, fields, used = parse(row, where, notes)
    if row.get("item_id") is not None:
        item = name(row["item_id"], "item_id")
        match = _ITEM.fullmatch(item)
        fields |= {"environment": match[1], "task": f"{match[1]}/{match[2]}"} if match else {"task": item}
        # All attempts at an item share it; the converter appends numbers.
        fields["id"] = fields["task"]
    return Parsed(messages, fields, used)


def _turn(raw: Any, index: int, notes: Notes) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DataError(f"turn {index} is {kind_of(raw)}, not an object")
    hint = "; this looks like OpenAI's format, use --format openai" if "role" in raw else ""
    role = openai.role_of(raw, "from", _ROLES, f"turn {index}", hint)
    where = f"turn {index} ({raw['from']})"
    value = raw.get("value")
    if not isinstance(value, str):
        raise DataError(f"{where}: value is {kind_of(value)}, not a text")
    message: dict[str, Any] = {"role": role, "content": value}
    if raw["from"] == "function_call":
        message = {"role": role, "content": None, "tool_calls": _calls(value, where, notes)}
    # `"loss": false` (AgentGym) and `"weight": 0` mark an assistant turn that is no step, such as an acknowledgement.
    is_step = openai.flag(raw, "loss", where) and openai.flag(raw, "weight", where)
    if role == "assistant" and not is_step:
        message["step"] = False
    for key in {*raw} - _FIELDS:
        if raw[key] not in (None, [], "", {}):
            openai.note(notes, f"turn field `{key:.40}`, left out")
    return message


def _calls(value: str, where: str, notes: Notes) -> list[dict[str, Any]]:
    parsed = openai.json_value(value, f"{where}: the calls")
    calls = []
    for index, call in enumerate(parsed if isinstance(parsed, list) and parsed else [parsed]):
        if not isinstance(call, dict):
            raise DataError(f'{where}: call {index} is {kind_of(call)}, not {{"name", "arguments"}}')
        called = openai.tool_call(call.get("name"), call.get("arguments"), f"{where}: call {index}", notes)
        calls.append({"type": "function", "function": called})
    return calls
