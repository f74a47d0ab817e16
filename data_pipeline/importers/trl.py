"""Import of TRL's stepwise supervision: `completions` with `labels` become the steps of one assistant message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.conversations.kinds import kind_of
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, step_parts, tools_near


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has completions with labels."""
    if isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list):
        return "`prompt`, `completions` and `labels`"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Parses a row with its prompt, a text or messages. Every completion is a text part, and so a step."""
    where = context.messages
    prompt = where.find(row) if where is not None else None
    text = "prompt" if where is None else where.text
    parsed = conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, context, text)
    texts = _completions(row.get("completions"))
    labels = _labels(row.get("labels"), len(texts))
    reply = {"role": "assistant", "content": step_parts(texts, context.notes, "completions")}
    tools, used = tools_near(row, context)
    fields = {"step_labels": labels} | ({"tools": tools} if tools else {})
    used = {where.key if where is not None else None, "completions", "labels", *used} - {None}
    return [parsed._replace(messages=[*parsed.messages, reply], fields=fields, used=used)]


def _completions(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        problem = "missing" if value is None else "empty" if value == [] else f"{kind_of(value)}, not a list"
        raise DataError(f"completions is {problem}")
    texts = []
    for index, completion in enumerate(value):
        # In TRL's conversational form, a completion is a list of one message.
        if isinstance(completion, list) and len(completion) == 1:
            (completion,) = completion
        if isinstance(completion, dict) and completion.get("role") == "assistant":
            completion = completion.get("content")
        if not isinstance(completion, str):
            raise DataError(f"completions[{index}] is {kind_of(completion)}, not a text or an assistant message")
        texts.append(completion)
    return texts


def _labels(value: Any, count: int) -> list[float | None]:
    if not isinstance(value, list):
        raise DataError(
            f"labels is {'missing' if value is None else kind_of(value)}; it holds one label per completion"
        )
    if len(value) != count:
        raise DataError(f"labels has {len(value)} values, completions {count}")
    labels: list[float | None] = []
    for index, label in enumerate(value):
        if label is not None and not isinstance(label, (bool, int, float)):
            raise DataError(f"labels[{index}] is {kind_of(label)}; a label is true, false, a number or null")
        if label is not None and not abs(label) <= 1e30:  # also true of NaN
            raise DataError(f"labels[{index}] = {'NaN' if label != label else 'a number beyond 1e30'} is no label")
        labels.append(None if label is None else float(label))
    return labels


READER = Reader("trl-prm", "TRL's stepwise supervision", matches, parse, "prompt")
