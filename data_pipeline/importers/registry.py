"""All readers, and the one that a row's shape asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from data_pipeline.conversations import responses
from data_pipeline.errors import DataError
from data_pipeline.importers import (
    anthropic,
    atif,
    claude_code,
    inspect_ai,
    langchain,
    math_steps,
    mini_swe_agent,
    openai,
    openhands,
    preferences,
    prompt_completion,
    sharegpt,
    swe_agent,
    trl,
    verifiers,
    who_when,
)
from data_pipeline.importers import responses as responses_reader
from data_pipeline.importers.fields import Path
from data_pipeline.importers.reader import Reader, looks_like_messages
from data_pipeline.terminal import escape

AUTO = "auto"
# In this order: a shape with more of its own comes first.
READERS: tuple[Reader, ...] = (
    atif.READER,
    inspect_ai.READER,
    mini_swe_agent.READER,
    claude_code.READER,
    openhands.READER,
    swe_agent.READER,
    verifiers.READER,
    math_steps.PROCESSBENCH,
    math_steps.PRM800K,
    math_steps.MATH_SHEPHERD,
    trl.READER,
    preferences.READER,
    who_when.READER,
    sharegpt.AGENTGYM,
    sharegpt.READER,
    responses_reader.READER,
    langchain.READER,
    anthropic.READER,
    prompt_completion.READER,
    openai.READER,
)
BY_NAME = {reader.name: reader for reader in READERS}
FORMATS = (AUTO, *BY_NAME)
_SHOWN_KEYS = 8


class Detected(NamedTuple):
    """The reader of a row, and what shows it."""

    reader: Reader
    reason: str


def detect(row: Mapping[str, Any], messages: Path | None) -> Detected:
    """The reader for a row; `messages` is where the user says that the conversation is.

    Raises DataError that describes the shape if no reader knows it.
    """
    if messages is not None and (listed := messages.find(dict(row))) is not None:
        return _by_messages(listed, messages, row)
    for reader in READERS:
        if reason := reader.matches(row):
            return Detected(reader, reason)
    raise DataError(describe(row))


def _by_messages(listed: Any, messages: Path, row: Mapping[str, Any]) -> Detected:
    """The reader for a conversation at a path, by its entries."""
    at = f"`{messages.text}`"
    if preferences.READER.matches(row):
        return Detected(preferences.READER, f"{at}, `chosen` and `rejected`")
    if isinstance(listed, list) and responses.is_items(listed):
        return Detected(responses_reader.READER, f"{at} with items of the Responses API")
    if looks_like_messages(listed, "from"):
        return Detected(sharegpt.AGENTGYM if "item_id" in row else sharegpt.READER, f"{at} with `from`")
    if langchain.READER.matches({"messages": listed}):
        return Detected(langchain.READER, f"{at} with `type` human or ai")
    if trl.READER.matches(row):
        return Detected(trl.READER, f"{at}, `completions` and `labels`")
    if row.get("mistake_step") is not None and who_when.READER.matches(row):
        return Detected(who_when.READER, f"{at} and `mistake_step`")
    return Detected(openai.READER, f"{at}")


def describe(row: Mapping[str, Any]) -> str:
    """What a row of an unknown shape looks like, and the option to try."""
    keys = ", ".join(f"{key:.40}" for key in list(row)[:_SHOWN_KEYS])
    more = f" and {len(row) - _SHOWN_KEYS} more" if len(row) > _SHOWN_KEYS else ""
    shape = f"no format is known for an object with the keys {keys}{more}" if row else "an object without keys"
    paths = list(_conversations(row, ""))
    if paths:
        entry = Path.parse(paths[0]).find(dict(row))[0]
        roles = entry.get("role")
        option = (
            "" if not isinstance(roles, str) or roles in ("system", "user", "assistant", "tool") else " with --roles"
        )
        return escape(f"{shape}; try --messages-field {paths[0]}{option}")
    return escape(
        f"{shape}; name the field of its conversation with --messages-field, or convert it (docs/your-trajectories.md "
        "lists the formats)"
    )


def _conversations(value: Any, path: str, depth: int = 0) -> Iterable[str]:
    """Paths of lists that look like conversations, the nearest first."""
    if not isinstance(value, Mapping) or depth > 3:
        return
    for key, inner in value.items():
        if looks_like_messages(inner, "role", "from", "type") and "." not in key and "[" not in key:
            yield f"{path}{key}"
    for key, inner in value.items():
        if "." not in key and "[" not in key:
            yield from _conversations(inner, f"{path}{key}.", depth + 1)
