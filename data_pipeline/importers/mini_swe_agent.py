"""mini-swe-agent's `.traj.json` files: chat messages, and how the run ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, note

_ENDED = {"Submitted": "done", "LimitsExceeded": "max_rounds", "CostLimitExceeded": "max_rounds"}


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row names this format."""
    form = row.get("trajectory_format")
    if isinstance(form, str) and form.startswith("mini-swe-agent") and isinstance(row.get("messages"), list):
        return f"`trajectory_format` {form:.30}"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads the messages but the last of role `exit`, which the agent has not seen."""
    entries = full_list(row.get("messages"), "messages")
    seen = [entry for entry in entries if not (isinstance(entry, dict) and entry.get("role") == "exit")]
    if len(seen) < len(entries):
        note(context.notes, "messages of role exit, left out", len(entries) - len(seen))
    parsed = conversation(seen, context, "messages")
    info = row.get("info")
    ended = _ENDED.get(info.get("exit_status", "")) if isinstance(info, dict) else None
    return [parsed._replace(fields={"ended": ended} if ended else {}, used={"messages", "trajectory_format"})]


READER = Reader(
    "mini-swe-agent",
    "mini-swe-agent (.traj.json)",
    matches,
    parse,
    id=("id", "instance_id"),
    task=("task", "instance_id"),
)
