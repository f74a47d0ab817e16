"""TRL's stepwise supervision: `prompt`, `completions` and their `labels`, to one assistant message of many steps."""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers import openai
from data_pipeline.importers.fields import Path
from data_pipeline.importers.openai import Notes, Parsed
from data_pipeline.importers.source import kind_of


def parse(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """The prompt, a text or messages, at `where`; every completion is one text part, one step, with its label.

    Every part ends with a newline, where a tokenizer ends a token; line breaks a completion begins with end the one
    before, so that the text stays the same.
    """
    prompt = where.find(row)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = [openai.message(one, index, notes) for index, one in enumerate(openai.full_list(prompt, where.text))]
    texts = _completions(row.get("completions"))
    labels = _labels(row.get("labels"), len(texts))
    messages.append({"role": "assistant", "content": _parts(texts, notes)})
    found = openai.tools(row)
    fields = {"step_labels": labels} | ({"tools": found} if found else {})
    return Parsed(messages, fields, {where.key, "completions", "labels", "tools", "functions"} - {None})


def _completions(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        what = "missing" if value is None else "empty" if value == [] else f"{kind_of(value)}, not a list"
        raise DataError(f"completions is {what}")
    texts = []
    for index, one in enumerate(value):
        if isinstance(one, list) and len(one) == 1:
            (one,) = one
        if isinstance(one, dict) and one.get("role") == "assistant":
            one = one.get("content")
        if not isinstance(one, str):
            raise DataError(f"completions[{index}] is {kind_of(one)}, not a text or an assistant message")
        texts.append(one)
    return texts


def _labels(value: Any, count: int) -> list[float | None]:
    if not isinstance(value, list):
        raise DataError(f"labels is {'missing' if value is None else kind_of(value)}; it holds one label a completion")
    if len(value) != count:
        raise DataError(f"labels has {len(value)} values, completions {count}")
    labels: list[float | None] = []
    for index, one in enumerate(value):
        if one is not None and not isinstance(one, (bool, int, float)):
            raise DataError(f"labels[{index}] is {kind_of(one)}; a label is true, false, a number or null")
        if one is not None and not abs(one) <= 1e30:  # NaN neither
            raise DataError(f"labels[{index}] = {'NaN' if one != one else 'a number beyond 1e30'} is no label")
        labels.append(None if one is None else float(one))
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
