"""Logs of inspect_ai: `.json`, whose samples are trajectories, and the samples of a `.eval` archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, note, tools_of

# Large, and repeated in the messages or of no use without the program.
_LEFT_OUT = ("events", "store", "attachments", "output", "timelines", "model_usage", "role_usage", "events_data")
_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row is a log, or a sample of one."""
    if isinstance(row.get("samples"), list) and isinstance(row.get("eval"), dict):
        return "`eval` and `samples`"
    if {"epoch", "target", "messages", "scores"} <= row.keys():
        return "a sample with `messages`, `epoch` and `scores`"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """A trajectory for each sample."""
    if not isinstance(row.get("samples"), list):
        return [_sample(row, row.pop("eval", {}), row, context)]
    about = row["eval"] if isinstance(row.get("eval"), dict) else {}
    trajectories = []
    for sample in full_list(row["samples"], "samples"):
        if not isinstance(sample, dict):
            raise DataError("a sample is no object")
        parsed = _sample(sample, about, sample, context)
        others = {key: value for key, value in sample.items() if key not in parsed.used and value not in (None, {}, [])}
        trajectories.append(parsed._replace(used=set(row), meta={**parsed.meta, **others}))
    return trajectories


def _sample(sample: dict[str, Any], about: Any, row: dict[str, Any], context: Context) -> Parsed:
    entries = []
    attachments = sample.get("attachments") if isinstance(sample.get("attachments"), dict) else {}
    for raw in full_list(sample.get("messages"), "messages"):
        entry = dict(_resolved(raw, attachments)) if isinstance(raw, dict) else raw
        if isinstance(entry, dict):
            # What the dataset gave, and not the model.
            if entry.get("role") == "assistant" and entry.get("source") == "input":
                entry["step"] = False
            if entry.get("role") == "tool" and isinstance(entry.get("function"), str):
                entry["name"] = entry.pop("function")
                error = entry.pop("error", None)
                if error and not entry.get("content"):
                    entry["content"] = error.get("message", "") if isinstance(error, dict) else str(error)
            for key in ("id", "source", "model"):
                entry.pop(key, None)
        entries.append(entry)
    parsed = conversation(entries, context, "messages")
    task = about.get("task") if isinstance(about, dict) else None
    fields: dict[str, Any] = {"id": f"{sample.get('id')}#{sample.get('epoch')}"}
    fields["task"] = f"{task}/{sample.get('id')}" if isinstance(task, str) else str(sample.get("id"))
    if tools := _tools(sample):
        fields["tools"] = tools
    if sample.get("error"):
        fields["ended"] = "error"
    fields |= _outcome(sample, context)
    for key in _LEFT_OUT:
        if sample.get(key):
            note(context.notes, f"field `{key}` of samples, left out")
    return parsed._replace(fields=fields, used={"messages", "id", "uuid", "eval", *_LEFT_OUT})


def _resolved(value: Any, attachments: dict[str, Any]) -> Any:
    """The value with texts that were moved to the attachments of its sample."""
    if isinstance(value, str) and value.startswith("attachment://"):
        return attachments.get(value.removeprefix("attachment://"), value)
    if isinstance(value, dict):
        return {key: _resolved(inner, attachments) for key, inner in value.items()}
    return [_resolved(inner, attachments) for inner in value] if isinstance(value, list) else value


def _tools(sample: dict[str, Any]) -> list[dict[str, Any]]:
    for event in sample.get("events") or ():
        if isinstance(event, dict) and event.get("event") == "model" and event.get("tools"):
            return tools_of(event["tools"])
    return []


def _outcome(sample: dict[str, Any], context: Context) -> dict[str, Any]:
    """The outcome of the only scorer. Letters become numbers in the row, so that a path to one of several works."""
    scores = sample.get("scores")
    if not isinstance(scores, dict) or not scores:
        return {}
    for score in scores.values():
        if isinstance(score, dict) and isinstance(score.get("value"), str):
            score["value"] = _LETTERS.get(score["value"], score["value"])
    if len(scores) > 1:
        note(context.notes, "samples with several scores: name one with --outcome-field scores.NAME.value")
        return {}
    (score,) = scores.values()
    value = score.get("value") if isinstance(score, dict) else score
    if isinstance(value, (bool, int, float)):
        return {"outcome": value}
    note(context.notes, "scores that are no number and none of C, P, I, N: without an outcome")
    return {}


READER = Reader("inspect", "inspect_ai (.json, .eval)", matches, parse)
