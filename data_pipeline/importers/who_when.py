"""Failures of several agents with the decisive mistake, as Who&When writes them: `history` and `mistake_step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, looks_like_messages


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has a history and the message of the mistake."""
    is_row = looks_like_messages(row.get("history"), "role") and "mistake_step" in row
    return "`history` and `mistake_step`" if is_row else None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Steps before the mistake are labelled 1, the mistake 0. `--roles` says which roles are the agents."""
    roles = {"human": "user", **context.roles}
    entries = full_list(row.get("history"), "history")
    parsed = conversation(entries, context._replace(roles=roles), "history")
    try:
        mistake = int(row["mistake_step"])
    except (TypeError, ValueError):
        raise DataError(f"mistake_step is {row['mistake_step']!r:.40}, not the index of a message") from None
    labels: list[float | None] = []
    for message, origin in zip(parsed.messages, parsed.origins, strict=True):
        if message["role"] == "assistant" and message.get("step", True):
            labels.append(1.0 if origin < mistake else 0.0 if origin == mistake else None)
    if 0.0 not in labels:
        raise DataError(f"mistake_step {mistake} is no message of an agent; name the agents' roles with --roles")
    return [parsed._replace(fields={"step_labels": labels}, used={"history"})]


READER = Reader("who-when", "Who&When", matches, parse, id=("id", "question_ID"), task=("task", "question_ID"))
