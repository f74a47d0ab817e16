"""Rows of a prompt and the completion that a policy sampled, as verifiers, prime-rl and TRL write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.importers.fields import name
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, tools_near


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has a prompt and a completion, and no labels by completion."""
    if all(isinstance(row.get(key), (str, list)) and row[key] for key in ("prompt", "completion")):
        return "`prompt` and `completion`"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """Reads the completion's assistant messages as steps; those of the prompt are examples, and no steps."""
    prompt = _entries(row.get("prompt"), "user")
    completion = _entries(row.get("completion"), "assistant")
    parsed = conversation([*prompt, *completion], context, "prompt")
    messages = [
        message | {"step": False} if message["role"] == "assistant" and origin < len(prompt) else message
        for message, origin in zip(parsed.messages, parsed.origins, strict=True)
    ]
    tools, used = tools_near(row, context)
    fields: dict[str, Any] = {"tools": tools} if tools else {}
    # `task` is the name of the environment there, the same in every row.
    if row.get("example_id") is not None:
        parts = [row["task"]] if isinstance(row.get("task"), str) and row["task"] else []
        fields["task"] = "/".join([*parts, name(row["example_id"], "example_id")])
    return [parsed._replace(messages=messages, fields=fields, used={"prompt", "completion", *used})]


def _entries(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value or []


READER = Reader(
    "prompt-completion",
    "verifiers, prime-rl, TRL",
    matches,
    parse,
    outcome=("outcome", "reward"),
    id=("id", "example_id"),
)
