"""ShareGPT's conversations of `from` and `value`, and AgentGym's, which are the same with an `item_id`."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers import openai
from data_pipeline.importers.fields import Path, name
from data_pipeline.importers.openai import Notes, Parsed
from data_pipeline.importers.source import kind_of

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
_KNOWN = {"from", "value", "loss", "weight"}
_ITEM = re.compile(r"(.+)_(\d+)")


def parse(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """A row with turns at `where`; `system` beside them is the first message, `tools` a list or its JSON."""
    turns = openai.full_list(where.find(row), where.text)
    messages = [_turn(one, index, notes) for index, one in enumerate(turns)]
    used = {where.key, "tools", "functions"} - {None}
    if isinstance(row.get("system"), str):
        used.add("system")
        if row["system"]:
            if messages[0]["role"] == "system":
                raise DataError("`system` is given and the conversation begins with a system turn; keep one")
            messages.insert(0, {"role": "system", "content": row["system"]})
    found = openai.tools(row)
    return Parsed(messages, {"tools": found} if found else {}, used)


def parse_agentgym(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """As ShareGPT; `item_id` names the attempt and, as "webshop_123", the environment and the task webshop/123.

    It is kept in `meta` as it was.
    """
    messages, fields, used = parse(row, where, notes)
    if row.get("item_id") is not None:
        item = name(row["item_id"], "item_id")
        known = _ITEM.fullmatch(item)
        fields |= {"environment": known[1], "task": f"{known[1]}/{known[2]}"} if known else {"task": item}
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
    made: dict[str, Any] = {"role": role, "content": value}
    if raw["from"] == "function_call":
        made = {"role": role, "content": None, "tool_calls": _calls(value, where, notes)}
    # `"loss": false` (AgentGym) and `"weight": 0` mark an assistant turn that is no decision, an acknowledgement.
    learnt = openai.flag(raw, "loss", where) and openai.flag(raw, "weight", where)
    if role == "assistant" and not learnt:
        made["step"] = False
    for key in {*raw} - _KNOWN:
        if raw[key] not in (None, [], "", {}):
            openai.note(notes, f"turn field `{key:.40}`, left out")
    return made


def _calls(value: str, where: str, notes: Notes) -> list[dict[str, Any]]:
    found = openai.json_value(value, f"{where}: the calls")
    calls = []
    for index, one in enumerate(found if isinstance(found, list) and found else [found]):
        if not isinstance(one, dict):
            raise DataError(f'{where}: call {index} is {kind_of(one)}, not {{"name", "arguments"}}')
        called = openai.tool_call(one.get("name"), one.get("arguments"), f"{where}: call {index}", notes)
        calls.append({"type": "function", "function": called})
    return calls
