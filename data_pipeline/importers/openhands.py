"""Events of OpenHands: of its first version (`action`, `observation`) and of its SDK (`kind`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.conversations.leftovers import is_nothing
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, note, tools_of

EVENTS = "events"
_KEYS = (EVENTS, "history", "trajectory")
_SDK = (  # No set: a value of a file may have no hash.
    "MessageEvent",
    "ActionEvent",
    "ObservationEvent",
    "SystemPromptEvent",
    "AgentErrorEvent",
    "UserRejectObservation",
)
# Of the program, and not shown to the model.
_SILENT = {
    "recall",
    "agent_state_changed",
    "change_agent_state",
    "null",
    "condensation",
    "condensation_request",
    "loop",
}


def is_event(row: Any) -> bool:
    """Whether a row of a file, or an entry of a history, is an event."""
    if not isinstance(row, dict) or "source" not in row:
        return False
    return row.get("kind") in _SDK or (
        ("action" in row or "observation" in row) and ("timestamp" in row or "id" in row) and "role" not in row
    )


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row holds events."""
    key = _key(row)
    return key and f"`{key}` with events of `{'kind' if 'kind' in _flat(row[key])[0] else 'action'}`"


def _key(row: Mapping[str, Any]) -> str | None:
    """The field of the events."""
    return next((key for key in _KEYS if is_event(next(iter(_flat(row.get(key))), None))), None)


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads the events in their order. Actions of one response are one message."""
    key = _key(row)
    if key is None:
        raise DataError(f"no events in {', '.join(f'`{key}`' for key in _KEYS)}")
    state = _State(context)
    for event in _flat(row[key]):
        if not isinstance(event, dict):
            note(context.notes, "events that are no objects, left out")
        elif event.get("kind") is not None:
            state.add_sdk(event)
        else:
            state.add(event)
    parsed = conversation(state.entries, context, key)
    fields: dict[str, Any] = {"tools": state.tools} if state.tools else {}
    used = {key}
    if isinstance(row.get("instance_id"), str):
        fields |= {"id": row["instance_id"], "task": row["instance_id"]}
        used.add("instance_id")
    return [parsed._replace(fields=fields, used=used)]


def _flat(history: Any) -> list[Any]:
    """The events of a history; older ones are pairs of an action and its observation."""
    if not isinstance(history, list):
        return []
    return [event for entry in history for event in (entry if isinstance(entry, list) else [entry])]


class _State:
    """Messages so far, and the response that the last one is."""

    def __init__(self, context: Context):
        self.entries: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] = []
        self._notes = context.notes
        self._response: Any = None

    def _left_out(self, kind: Any) -> None:
        note(self._notes, f"events of type {kind!s:.40}, left out")

    def add(self, event: dict[str, Any]) -> None:
        """An event of the first version."""
        kind = event.get("action") or event.get("observation")
        if kind in _SILENT or kind is None:
            self._left_out(kind)
        elif "observation" in event and event.get("observation") is not None:
            self._observe(event)
        elif kind == "system":
            arguments = event.get("args") or {}
            self.tools = tools_of(arguments.get("tools"))
            self._append({"role": "system", "content": arguments.get("content") or event.get("message")})
        elif event.get("source") == "agent":
            self._act(event, kind)
        else:
            arguments = event.get("args") or {}
            self._append({"role": "user", "content": arguments.get("content") or event.get("message") or ""})

    def _act(self, event: dict[str, Any], kind: str) -> None:
        metadata, arguments = event.get("tool_call_metadata") or {}, event.get("args") or {}
        response = metadata.get("model_response") or {}
        if response.get("choices"):
            # All actions of a response carry the whole of it.
            if response.get("id") is None or response["id"] != self._response:
                self._append(dict(response["choices"][0]["message"]), response.get("id"))
        elif kind == "message":
            self._append({"role": "assistant", "content": arguments.get("content") or event.get("message") or ""})
        else:
            thought = arguments.get("thought")
            inputs = {key: value for key, value in arguments.items() if key != "thought" and not is_nothing(value)}
            call = {"name": metadata.get("function_name") or kind, "arguments": inputs}
            if metadata.get("tool_call_id"):
                call["id"] = metadata["tool_call_id"]
            self._append({"role": "assistant", "content": thought or None, "tool_calls": [call]})

    def _observe(self, event: dict[str, Any]) -> None:
        metadata = event.get("tool_call_metadata") or {}
        message = {"role": "tool", "content": event.get("content") or ""}
        if metadata.get("tool_call_id"):
            message["tool_call_id"] = metadata["tool_call_id"]
        self._append(message)

    def add_sdk(self, event: dict[str, Any]) -> None:
        """An event of the SDK."""
        kind = event["kind"]
        if kind == "SystemPromptEvent":
            self.tools = tools_of(event.get("tools"))
            self._append({"role": "system", "content": [event.get("system_prompt") or ""]})
        elif kind == "MessageEvent":
            message = {key: value for key, value in (event.get("llm_message") or {}).items() if not is_nothing(value)}
            keys = ("role", "content", "tool_calls", "reasoning_content", "thinking_blocks", "name", "tool_call_id")
            self._append({key: message[key] for key in keys if key in message})
        elif kind == "ActionEvent":
            called = event.get("tool_call") or {}
            call = {
                "id": event.get("tool_call_id"),
                "name": called.get("name") or event.get("tool_name"),
                "arguments": called.get("arguments") if called.get("arguments") is not None else event.get("action"),
            }
            response = event.get("llm_response_id")
            if response is not None and response == self._response and self.entries[-1]["role"] == "assistant":
                self.entries[-1]["tool_calls"].append(call)
                return
            message = {"role": "assistant", "content": event.get("thought") or None, "tool_calls": [call]}
            message |= {key: event[key] for key in ("reasoning_content", "thinking_blocks") if event.get(key)}
            self._append(message, response)
        elif kind in ("ObservationEvent", "AgentErrorEvent", "UserRejectObservation"):
            observed = event.get("observation")
            content = observed.get("content") if isinstance(observed, dict) else observed
            content = content or event.get("error") or event.get("rejection_reason") or _output(observed)
            self._append({"role": "tool", "content": content, "tool_call_id": event.get("tool_call_id")})
        else:
            self._left_out(kind)

    def _append(self, message: dict[str, Any], response: Any = None) -> None:
        self.entries.append(message)
        self._response = response


def _output(observed: Any) -> str:
    return str(observed.get("output") or "") if isinstance(observed, dict) else ""


READER = Reader("openhands", "OpenHands (events, output.jsonl)", matches, parse, outcome=("outcome", "report.resolved"))
