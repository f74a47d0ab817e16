"""Preference pairs: a state, an action that is better in it, and worse ones, as in ToolPRMBench and DPO data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.conversations.kinds import kind_of
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, tools_near, with_system

_STATES = ("messages", "prompt", "history", "conversation", "conversations", "context", "state", "query", "instruction")
_CHOSEN = ("chosen", "chosen_action", "positive")
_REJECTED = ("rejected", "rejected_action", "rejected_actions", "rejects", "negative", "negatives")


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has an action that was chosen and one that was rejected."""
    chosen, rejected = _first(row, _CHOSEN), _first(row, _REJECTED)
    return f"`{chosen}` and `{rejected}`" if chosen and rejected else None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads a pair. Without a state, it is what the conversations of both actions have in common."""
    chosen_key, rejected_key = _first(row, _CHOSEN), _first(row, _REJECTED)
    if chosen_key is None or rejected_key is None:
        raise DataError("`chosen` or `rejected` is missing")
    chosen, rejected = row[chosen_key], _list_of(row[rejected_key])
    state_key = _first(row, _STATES)
    used = {chosen_key, rejected_key, state_key} - {None}
    state = row[state_key] if state_key else None
    if context.messages is not None:
        state, used = context.messages.find(row), used | ({context.messages.key} - {None})
    if state is None:
        state, chosen, rejected = _common(chosen, rejected)
    if isinstance(state, str):
        state = [{"role": "user", "content": state}]
    parsed = conversation(state, context, state_key or "the state")
    if isinstance(row.get("system"), str):
        parsed, used = with_system(parsed, row["system"], context), used | {"system"}
    tools, more = tools_near(row, context)
    # Decisions of the past are no steps: only the two actions are compared.
    actions = [
        _action(value, context, name, len(parsed.messages))
        for value, name in ((chosen, chosen_key), *((value, rejected_key) for value in rejected))
    ]
    return [
        parsed._replace(
            fields={"tools": tools} if tools else {}, used={*used, *more}, chosen=actions[0], rejected=actions[1:]
        )
    ]


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if row.get(key) not in (None, "", [])), None)


def _list_of(value: Any) -> list[Any]:
    """Rejected actions: one, or a list of them. A list of messages with a user among them is one conversation."""
    if not isinstance(value, list):
        return [value]
    if all(isinstance(entry, dict) and "role" in entry for entry in value):
        roles = {entry["role"] for entry in value}
        return value if roles == {"assistant"} else [value]
    return value


def _common(chosen: Any, rejected: list[Any]) -> tuple[Any, Any, list[Any]]:
    """(state, chosen, rejected) of conversations that begin alike."""
    whole = [chosen, *rejected]
    if not all(isinstance(one, list) and one for one in whole):
        raise DataError("the state is missing; name it with --messages-field")
    shared = 0
    while all(len(one) > shared + 1 for one in whole) and all(one[shared] == chosen[shared] for one in whole):
        shared += 1
    if not shared:
        raise DataError("the conversations of chosen and rejected begin differently, so there is no state")
    return chosen[:shared], chosen[shared:], [one[shared:] for one in rejected]


def _action(value: Any, context: Context, name: str, index: int) -> dict[str, Any]:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, dict):
        value = [value if "role" in value else {"role": "assistant", **value}]
    if not isinstance(value, list):
        raise DataError(f"{name} is {kind_of(value)}, not an assistant message or its text")
    messages = conversation(value, context, name).messages
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{name} is not one assistant message but {len(messages)} ({roles:.80})")
    return {key: inner for key, inner in messages[0].items() if key != "step"}


READER = Reader("preference", "preference pairs: ToolPRMBench, DPO data", matches, parse)
