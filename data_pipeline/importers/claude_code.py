"""Sessions of Claude Code: the events of a `.jsonl` file, in which a response is spread over several lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.conversations.leftovers import is_nothing
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, note

SESSION = "session"
_TYPES = ("user", "assistant", "system")  # No set: a value of a file may have no hash.


def is_event(row: Any) -> bool:
    """Whether a row of a file is an event of a session."""
    return isinstance(row, dict) and row.get("type") in _TYPES and "sessionId" in row and "uuid" in row


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row holds the events of a session."""
    return "events with `sessionId` and `parentUuid`" if isinstance(row.get(SESSION), list) else None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """A trajectory for the session, and one for each of its subagents (sidechains)."""
    chains: dict[str, list[dict[str, Any]]] = {}
    seen: set[Any] = set()
    for event in row[SESSION]:
        kind = event.get("type")
        if kind not in ("user", "assistant") or not isinstance(event.get("message"), dict):
            note(context.notes, f"session events of type {kind!s:.30}, left out")
        elif event.get("uuid") in seen:
            note(context.notes, "session events that are repeated, left out")
        else:
            seen.add(event.get("uuid"))
            agent = str(event.get("agentId") or "sidechain") if event.get("isSidechain") else ""
            chains.setdefault(agent, []).append(event)
    trajectories = []
    for agent, events in chains.items():
        events = _without_rewound(events, context)
        parsed = conversation(_messages(events, context), context, SESSION)
        identity = str(events[0].get("sessionId")) + (f"/{agent}" if agent else "")
        about = {key: events[0][key] for key in ("cwd", "gitBranch", "version") if not is_nothing(events[0].get(key))}
        if agent:
            note(context.notes, "subagents of sessions, each a trajectory of its own")
        trajectories.append(parsed._replace(fields={"id": identity}, used={SESSION}, meta={**parsed.meta, **about}))
    return trajectories


def _messages(events: list[dict[str, Any]], context: Context) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    response = None  # The id of the response that the last message is.
    for event in events:
        raw = event["message"]
        content = raw.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if event["type"] == "assistant" and raw.get("id") is not None and raw["id"] == response:
            messages[-1]["content"] = [*messages[-1]["content"], *blocks]
            continue
        response = raw.get("id") if event["type"] == "assistant" else None
        message = {"role": event["type"], "content": blocks}
        # A message of the program about a failed request, and not of the model.
        if event.get("isApiErrorMessage") or raw.get("model") == "<synthetic>":
            message["step"] = False
        messages.append(message)
    return [message for message in messages if message["content"] or _empty(context)]


def _empty(context: Context) -> bool:
    note(context.notes, "session messages without content, left out")
    return False


def _without_rewound(events: list[dict[str, Any]], context: Context) -> list[dict[str, Any]]:
    """The events without those that the user went back before: a later prompt has the same parent as an earlier one."""
    kept: list[dict[str, Any]] = []
    starts: dict[Any, int] = {}
    for event in events:
        parent = event.get("parentUuid")
        if _is_prompt(event) and parent is not None:
            if parent in starts:
                cut = starts[parent]
                note(context.notes, "session events that the user went back before, left out", len(kept) - cut)
                starts = {key: at for key, at in starts.items() if at < cut}
                del kept[cut:]
            starts[parent] = len(kept)
        kept.append(event)
    return kept


def _is_prompt(event: dict[str, Any]) -> bool:
    content = event["message"].get("content")
    if event["type"] != "user" or event.get("isMeta"):
        return False
    return isinstance(content, str) or not any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content or ()
    )


READER = Reader("claude-code", "Claude Code (session .jsonl)", matches, parse)
