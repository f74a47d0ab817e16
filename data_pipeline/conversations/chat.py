"""Chat messages of OpenAI's, Anthropic's and compatible APIs, as their SDKs write them.

A message may become several: the results of tools in one user message of Anthropic's are a message each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from data_pipeline.conversations.kinds import kind_of, plain
from data_pipeline.conversations.leftovers import Leftovers, is_nothing
from data_pipeline.conversations.tool_calls import read_call, read_calls
from data_pipeline.errors import DataError

# `developer` is what newer APIs call `system`, `function` what older ones called `tool`.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# An assistant message that is no step; only a map of roles can say so.
CONTEXT = "context"
_FIELDS = {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "weight", "step"}
# Texts of what a model thought, by preference: the others repeat the first that is there.
REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONING_BLOCKS = ("thinking_blocks", "reasoning_details")
TEXT_TYPES = {"text", "input_text", "output_text"}
_MEDIA = {"audio", "image", "images", "image_url", "video", "videos", "file", "files", "attachments"}
# What Anthropic's API says about a message and not in it.
_RESPONSE = {
    "id",
    "type",
    "model",
    "stop_reason",
    "stop_sequence",
    "usage",
    "container",
    "stop_details",
    "status",
    "phase",
}


def read_message(
    raw: Any, index: int, leftovers: Leftovers, *, roles: Mapping[str, str] = ROLES, join: bool
) -> list[dict[str, Any]]:
    """The messages of a trajectory that chat message `index` of a conversation is.

    Args:
      roles: our role by the message's. A role that is in `roles` and not in ROLES is kept as the name of an
        assistant message.
      join: texts in several parts become one, so that a message is one step.

    Raises DataError that names the message.
    """
    raw = plain(raw)
    if not isinstance(raw, dict):
        raise DataError(f"message {index} is {kind_of(raw)}, not an object")
    role = role_of(raw, "role", roles, f"message {index}")
    where = f"message {index} ({raw['role']})"
    is_context = role == CONTEXT
    message: dict[str, Any] = {"role": "assistant" if is_context else role}
    parts = _Parts(raw.get("content"), message["role"], where, leftovers, index)
    calls = [*_calls(raw, message["role"], where, leftovers, index), *parts.calls]
    if message["role"] != "assistant" and calls:
        raise DataError(f"{where} has tool_calls; only an assistant calls tools")
    reasoning = _reasoning(raw, parts.reasoning, where)
    content: Any = parts.content(join)
    if content is None and not calls and not parts.results:
        if message["role"] == "tool":
            leftovers.note("tool results without content, taken as empty")
        elif not reasoning:
            refusal = "; it has a refusal, which is no action" if raw.get("refusal") else ""
            raise DataError(f"{where} has neither content nor tool_calls{refusal}")
        content = ""
    message["content"] = content
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
    # Fine-tuning files mark an assistant message that is not trained on with `"weight": 0`, ours with `"step": false`.
    if message["role"] == "assistant" and (is_context or not (flag(raw, "weight", where) and flag(raw, "step", where))):
        message["step"] = False
    message |= {key: raw[key] for key in ("name", "tool_call_id") if raw.get(key) is not None}
    # One of several agents: which of them spoke must not be lost.
    if raw["role"] not in ROLES and message["role"] == "assistant" and "name" not in message:
        message["name"] = raw["role"]
    _check_fields(raw, index, where, leftovers)
    if not parts.results:
        return [message]
    if message["role"] != "user":
        raise DataError(f"{where}: a tool_result belongs into a user message")
    return parts.split(message)


def role_of(raw: dict[str, Any], key: str, roles: Mapping[str, str], where: str) -> str:
    """Our name for the role at `key`. Raises DataError for an unknown one."""
    value = raw.get(key)
    role = roles.get(value) if isinstance(value, str) else None
    if role is None and isinstance(value, str):
        # "Orchestrator (thought)" is an Orchestrator.
        role = roles.get(value.partition(" (")[0]) if value.partition(" (")[0] not in ROLES else None
    if role is None:
        what = "is missing" if value is None else f"{value!r:.40} is none of {', '.join(roles)}"
        # Only where the roles of a row are its own: an unknown key is no role.
        name = value.partition(" (")[0] if isinstance(value, str) else ""
        option = f"; map it with --roles assistant={name:.40}" if name else ""
        raise DataError(f"{where}: {key} {what}{option}")
    return role


def flag(raw: dict[str, Any], key: str, where: str) -> bool:
    """The value of a flag: true, false, 1 or 0; true if it is missing. Raises DataError for anything else."""
    value = raw.get(key)
    if value is not None and (not isinstance(value, (int, float)) or value not in (0, 1)):
        raise DataError(f"{where}: {key} is {value!r:.40}, not true or false, or 1 or 0")
    return value is None or bool(value)


class _Parts:
    """The content of a message, sorted: texts, reasoning, calls of tools and their results."""

    def __init__(self, content: Any, role: str, where: str, leftovers: Leftovers, index: int):
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        # In order: the results of tools, and the texts between them.
        self.results: list[dict[str, Any]] = []
        self._order: list[tuple[str, Any]] = []
        self._is_list = isinstance(content, (list, tuple))
        self._leftovers = leftovers
        if content is None:
            return
        if isinstance(content, str):
            self.texts = [content]
        elif role == "tool" and not _is_blocks(content):
            leftovers.note("tool results that are JSON, written as text")
            self.texts, self._is_list = [_json(content, where)], False
        elif self._is_list:
            for number, part in enumerate(content):
                self._add(plain(part), f"{where}: content part {number}", index)
        else:
            raise DataError(f"{where}: content is {kind_of(content)}, not a text or a list of parts")

    def _add(self, part: Any, where: str, index: int) -> None:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
        if kind in TEXT_TYPES:
            if not isinstance(part.get("text"), str):
                raise DataError(f"{where} has no text")
            self.texts.append(part["text"])
            self._order.append(("text", part["text"]))
        elif kind in ("thinking", "reasoning"):
            self.reasoning.append(block_text(part))
        elif kind == "redacted_thinking":
            self._leftovers.note("blocks of redacted thinking, which cannot be read, left out")
        elif kind in ("tool_use", "server_tool_use"):
            self.calls.append(read_call({**part, "type": None, "cache_control": None}, where, self._leftovers, index))
        elif kind == "tool_result":
            self._order.append(("result", self._result(part, where, index)))
            self.results.append(self._order[-1][1])
        else:
            raise DataError(f"{where} is {kind!r:.40}; only text can be trained on and scored")

    def _result(self, part: dict[str, Any], where: str, index: int) -> dict[str, Any]:
        inner = _Parts(part.get("content"), "tool", where, self._leftovers, index)
        if part.get("is_error"):
            self._leftovers.note("results of tools marked as errors: the mark is left out, their text kept")
        identifier = {"tool_call_id": str(part["tool_use_id"])} if part.get("tool_use_id") is not None else {}
        return {"role": "tool", "content": "".join(inner.texts)} | identifier

    def content(self, join: bool) -> str | list[dict[str, str]] | None:
        """The texts: one, or a list of parts. None without any."""
        if not self.texts:
            return None
        if not self._is_list:
            return self.texts[0]
        # A list of texts has a step for each part, but only if it holds nothing else.
        if not join and not (self.reasoning or self.calls or self.results) and all(self.texts):
            return [{"type": "text", "text": text} for text in self.texts]
        if len(self.texts) > 1:
            self._leftovers.note("messages in several parts, joined to one text")
        return "".join(self.texts)

    def split(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """The results of tools, a message each, and the texts between them as user messages."""
        messages: list[dict[str, Any]] = []
        for kind, value in self._order:
            if kind == "result":
                messages.append(value)
            elif messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += value
            elif value:
                messages.append({**message, "content": value})
        return messages


def block_text(block: Any) -> str:
    """The text of a block of reasoning, whatever it is called there; empty if it is encrypted or a mere summary id."""
    if isinstance(block, str):
        return block
    if isinstance(block, (list, tuple)):
        return "\n".join(filter(None, map(block_text, map(plain, block))))
    if not isinstance(block, dict):
        return ""
    keys = ("thinking", "reasoning", "text", "content", "summary")
    return next((text for key in keys if (text := block_text(plain(block.get(key))))), "")


def _reasoning(raw: dict[str, Any], from_parts: list[str], where: str) -> str | None:
    texts = {}
    for key in REASONING:
        value = raw.get(key)
        if value is not None and not isinstance(value, str):
            # The reasoning of the Responses API, and settings of a request, are objects.
            value = block_text(value)
        if value:
            texts[key] = value
    if len(set(texts.values())) > 1:
        raise DataError(f"{where} has different {' and '.join(texts)}; keep one")
    if texts:
        return next(iter(texts.values()))
    blocks = next((text for key in _REASONING_BLOCKS if (text := block_text(raw.get(key)))), "")
    return "\n".join(filter(None, from_parts)) or blocks or None


def _calls(raw: dict[str, Any], role: str, where: str, leftovers: Leftovers, index: int) -> list[dict[str, Any]]:
    calls, older_call = raw.get("tool_calls") or [], raw.get("function_call")
    if calls and older_call:
        raise DataError(f"{where} has both tool_calls and function_call; keep one")
    if older_call:
        calls = [{"type": "function", "function": older_call}]
    return read_calls(calls, where, leftovers, index) if calls else []


def _check_fields(raw: dict[str, Any], index: int, where: str, leftovers: Leftovers) -> None:
    ignored = {*_FIELDS, *REASONING, *_REASONING_BLOCKS, *(_RESPONSE if raw.get("type") == "message" else ())}
    for key, value in raw.items():
        if key not in ignored and not is_nothing(value):
            if key in _MEDIA:
                raise DataError(f"{where} has `{key}`; only text can be trained on and scored")
            leftovers.unknown(index, where, key, value)


def _is_blocks(content: Any) -> bool:
    """Whether a list holds blocks of content, rather than what a tool returned."""
    if not isinstance(content, (list, tuple)):
        return False
    return all(isinstance(part, str) or _is_block(plain(part)) for part in content)


def _is_block(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type", "text"), str) and bool({"type", "text"} & part.keys())


def _json(value: Any, where: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, OverflowError, UnicodeError) as error:
        raise DataError(f"{where}: content cannot be written as JSON: {error}") from None
