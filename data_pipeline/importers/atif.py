"""ATIF, the trajectory format of Harbor. The outcome is in the trial's `result.json`, next to the folder `agent`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipeline import json_values
from data_pipeline.conversations.leftovers import is_nothing
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, note, tools_of

_ROLES = {"system": "system", "user": "user", "agent": "assistant"}
_STEP_FIELDS = {
    "step_id", "source", "message", "reasoning_content", "tool_calls", "observation", "llm_call_count",
    "is_copied_context",
}  # fmt: skip


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row names its version of ATIF."""
    version = row.get("schema_version")
    is_atif = isinstance(version, str) and version.startswith("ATIF") and isinstance(row.get("steps"), list)
    return f"`schema_version` {version:.20} and `steps`" if is_atif else None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """The trajectory of a file, and one for each of its subagents, without an outcome."""
    trial = _trial(context.file)
    fields = _outcome(trial, context)
    if isinstance(trial.get("task_name"), str) and trial["task_name"]:
        fields["task"] = trial["task_name"]
    identifier = trial.get("trial_name") or row.get("trajectory_id") or row.get("session_id")
    if isinstance(identifier, str) and identifier:
        fields["id"] = identifier
    # Into the row: it is kept in meta, and --outcome-field finds it there.
    if result := {key: trial[key] for key in ("verifier_result", "exception_info") if trial.get(key)}:
        row["result"] = result
    main = _trajectory(row, context)
    trajectories = [main._replace(fields=main.fields | fields)]
    for index, inner in enumerate(row.get("subagent_trajectories") or ()):
        note(context.notes, "trajectories of subagents, without an outcome")
        parsed = _trajectory(inner, context)
        identity = {"id": f"{fields.get('id', 'subagent')}/{inner.get('trajectory_id') or index}"}
        trajectories.append(parsed._replace(fields=parsed.fields | identity))
    return trajectories


def _trajectory(row: dict[str, Any], context: Context) -> Parsed:
    entries: list[dict[str, Any]] = []
    for index, step in enumerate(full_list(row.get("steps"), "steps")):
        if not isinstance(step, dict) or step.get("source") not in _ROLES:
            raise DataError(f"steps[{index}] has no source of {', '.join(_ROLES)}")
        role = _ROLES[step["source"]]
        entry: dict[str, Any] = {"role": role, "content": step.get("message")}
        if role == "assistant":
            entry |= {key: step[key] for key in ("reasoning_content", "tool_calls") if step.get(key)}
            if step.get("is_copied_context") or step.get("llm_call_count") == 0:
                entry["step"] = False
        if is_nothing(entry["content"]) and not entry.get("tool_calls") and not entry.get("reasoning_content"):
            entry["content"] = ""
        others = {key: value for key, value in step.items() if key not in _STEP_FIELDS and not is_nothing(value)}
        entries.append(entry | others)
        entries += _results(step, index)
    parsed = conversation(entries, context, "steps")
    agent = row.get("agent")
    tools = tools_of(agent.get("tool_definitions")) if isinstance(agent, dict) else []
    return parsed._replace(
        fields={"tools": tools} if tools else {}, used={"steps", "subagent_trajectories", "trajectory_id", "session_id"}
    )


def _results(step: dict[str, Any], index: int) -> list[dict[str, Any]]:
    observation = step.get("observation")
    if is_nothing(observation):
        return []
    results = observation.get("results") if isinstance(observation, dict) else None
    if not isinstance(results, list):
        raise DataError(f"steps[{index}].observation has no list of results")
    messages = []
    for result in results:
        known = {"source_call_id", "content"}
        others = {key: value for key, value in result.items() if key not in known and not is_nothing(value)}
        content = result.get("content")
        message = {"role": "tool", "content": "" if content is None else content, **others}
        if result.get("source_call_id") is not None:
            message["tool_call_id"] = result["source_call_id"]
        messages.append(message)
    return messages


def _trial(file: pathlib.Path | None) -> dict[str, Any]:
    """The trial's result.json: in the folder above `agent`, or in that of the file. Empty without one."""
    for folder in (file.parent.parent, file.parent) if file is not None else ():
        path = folder / "result.json"
        if path.is_file():
            try:
                value = json_values.decode(path.read_bytes())
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
            return value if isinstance(value, dict) else {}
    return {}


def _outcome(trial: dict[str, Any], context: Context) -> dict[str, Any]:
    result = trial.get("verifier_result")
    rewards = result.get("rewards") if isinstance(result, dict) else None
    if not isinstance(rewards, dict) or not rewards:
        return {}
    if "reward" in rewards or len(rewards) == 1:
        value = rewards.get("reward", next(iter(rewards.values())))
        return {} if value is None else {"outcome": value}
    path = "result.verifier_result.rewards.NAME"
    note(context.notes, f"trials with several rewards, none called `reward`: name one with --outcome-field {path}")
    return {}


READER = Reader("atif", "Harbor, and the agents that it runs", matches, parse)
