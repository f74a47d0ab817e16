"""Import of TRL's stepwise supervision: `completions` with `labels` become the steps of one assistant message."""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers import openai
from data_pipeline.importers.fields import Path
from data_pipeline.importers.openai import Notes, Parsed
from data_pipeline.source import kind_of


def parse(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """Parses a row with its prompt, a text or messages, at `where`. Every completion is a text part, and so a step.

    Every part ends with a newline, where a tokenizer ends a token. Line breaks at the beginning of a completion move to
    the end of the one before, so that the text stays the same.
    """
    prompt = where.find(row)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = [openai.message(raw, index, notes) for index, raw in enumerate(openai.full_list(prompt, where.text))]
    texts = _completions(row.get("completions"))
    labels = _labels(row.get("labels"), len(texts))
    messages.append({"role": "assistant", "content": _parts(texts, notes)})
    tools = openai.tools(row)
    fields = {"step_labels": labels} | ({"tools": tools} if tools else {})
    return Parsed(messages, fields, {where.key, "completions", "labels", "tools", "functions"} - {None})


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


def _parts(texts: list[str], notes: Notes) -> list[dict[str, str]]:
    parts = [texts[0]]
    for text in texts[1:]:
        body = text.lstrip("\r\n")
        parts[-1] += text[: len(text) - len(body)]
        parts.append(body)
    for index, part in enumerate(parts):
        if not part.strip():
            raise DataError(f"completions[{index}] has no text; every step needs some")
    if any(not part.endswith("\n") for part in parts):
        openai.note(notes, "trajectories in which steps were ended with a newline")
    return [{"type": "text", "text": part if part.endswith("\n") else part + "\n"} for part in parts]
