"""SWE-agent's `.traj` files: the conversation is `history`, and demonstrations in it are no steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, looks_like_messages, note

# They repeat what the content and the calls of a message say.
_REPEATED = ("thought", "action", "state", "observation", "query", "response")


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has a history of messages next to a trajectory of actions."""
    if isinstance(row.get("trajectory"), list) and looks_like_messages(row.get("history"), "role"):
        return "`history` of messages and `trajectory`"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads the history. The actions in `trajectory` repeat it, and are left out."""
    entries = []
    for raw in full_list(row.get("history"), "history"):
        entry = dict(raw) if isinstance(raw, dict) else raw
        if isinstance(entry, dict):
            repeated = [key for key in _REPEATED if entry.pop(key, None) not in (None, "", [])]
            for key in repeated:
                note(context.notes, f"message field `{key}`, which the message repeats, left out")
            if entry.pop("is_demo", None):
                entry["step"] = False
            identifiers = entry.pop("tool_call_ids", None)
            if identifiers and entry.get("role") == "tool":
                entry["tool_call_id"] = identifiers[0]
            entry.pop("cache_control", None)
        entries.append(entry)
    parsed = conversation(entries, context, "history")
    note(context.notes, "lists `trajectory` of actions, which `history` repeats, left out")
    return [parsed._replace(used={"history", "trajectory", "replay_config"})]


READER = Reader(
    "swe-agent", "SWE-agent (.traj)", matches, parse, id=("id", "instance_id"), task=("task", "instance_id")
)
