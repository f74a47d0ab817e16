"""Responses of a chat-completions server, parsed and validated before anything is trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from jaxprm.redaction import redact

_Count = Annotated[int, msgspec.Meta(ge=0)]
# finish_reason of a usable response -> Action.stop.
_STOPS: dict[str | None, Literal["end", "length"]] = {"stop": "end", "length": "length"}
# Characters of a server's error text in our one-line messages.
_MAX_SHOWN = 300
# Characters of a body that are considered for a message: the body may be megabytes.
_MAX_DECODED = 1 << 16


class Usage(NamedTuple):
    """Tokens by the server's count. `cached` are the prompt tokens that it did not encode again."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Completion(NamedTuple):
    """One assistant turn.

    log_probability: of the whole turn, None if the server sent no token probabilities. reasoning: None if it sent none.
    """

    text: str
    stop: Literal["end", "length"]
    log_probability: float | None
    usage: Usage
    reasoning: str | None = None


class InvalidResponse(Exception):
    """A response of status 200 without a usable completion; `usage` holds the tokens it was billed for."""

    def __init__(self, reason: str, usage: Usage = Usage()):
        super().__init__(reason)
        self.usage = usage


class _CachedTokens(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count
    completion_tokens: _Count
    prompt_tokens_details: _CachedTokens | None = None


class _Message(msgspec.Struct):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    # Two names of one thing: servers send either, or both.
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class _Token(msgspec.Struct):
    logprob: float


class _LogProbabilities(msgspec.Struct):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _LogProbabilities | None = None


# Fields that are not named here are ignored: servers add their own. Optional ones may be null, as many send them.
class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    model: str | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Body)


def parse_completion(content: bytes, content_type: str, names: tuple[str, ...]) -> Completion:
    """The completion in the body of a response of status 200.

    Args:
      names: names of the requested model; a response of another model is invalid.

    Raises InvalidResponse with the reason.
    """
    if "json" not in content_type.lower():
        raise InvalidResponse(f"Content-Type {content_type or 'missing'} in place of JSON")
    try:
        body = _decoder.decode(content)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidResponse(f"no chat completion ({error})") from None
    usage = _read_usage(body.usage)
    if body.error is not None:
        raise InvalidResponse("an error with status 200", usage)
    if len(body.choices) != 1:
        raise InvalidResponse(f"{len(body.choices)} choices, expected 1", usage)
    if body.model and not any(_is_named(body.model, name) for name in names):
        raise InvalidResponse("another model answered; if it is the right one, set served_as to its name", usage)
    (choice,) = body.choices
    text = _read_text(choice, usage)
    if body.usage is None:
        raise InvalidResponse("no usage: the tokens were not counted", usage)
    if text and not usage.generated:
        raise InvalidResponse("usage counts no token of a text that is not empty", usage)
    tokens = choice.logprobs.content if choice.logprobs else None
    log_probability = sum(token.logprob for token in tokens) if tokens else None
    return Completion(text, _STOPS[choice.finish_reason], log_probability, usage, _read_reasoning(choice.message))


def error_text(content: bytes, secret: str | None = None) -> str:
    """The error message in a body, on one line and without the secret: of JSON in the usual forms, or the beginning."""
    try:
        value = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _one_line(content[:_MAX_DECODED].decode("utf-8", "replace"), secret)
    for name in ("error", "message", "detail"):
        if isinstance(value, Mapping) and value.get(name):
            value = value[name]
    return _one_line(value if isinstance(value, str) else msgspec.json.encode(value).decode(), secret)


def _read_text(choice: _Choice, usage: Usage) -> str:
    message = choice.message
    if message.tool_calls or message.function_call or choice.finish_reason in ("tool_calls", "function_call"):
        raise InvalidResponse(
            "the answer calls tools; environments take text: have the server leave them as text", usage
        )
    if message.content is None:
        # A reasoning model that reaches the token limit while it thinks has no content.
        cut = " (cut before it began; raise max_action_tokens)" if choice.finish_reason == "length" else ""
        raise InvalidResponse(f"no content{cut}", usage)
    if choice.finish_reason not in _STOPS:
        raise InvalidResponse("finish_reason is neither stop nor length", usage)
    return message.content


def _read_reasoning(message: _Message) -> str | None:
    texts = (message.reasoning_content, message.reasoning)
    return next((text for text in texts if isinstance(text, str) and text), None)


def _read_usage(counted: _Usage | None) -> Usage:
    if counted is None:
        return Usage()
    details = counted.prompt_tokens_details
    # At most the prompt: the rest of it is counted as encoded, and must not be negative.
    cached = min(details.cached_tokens or 0 if details else 0, counted.prompt_tokens)
    return Usage(counted.prompt_tokens, cached, counted.completion_tokens)


def _is_named(answered: str, name: str) -> bool:
    """Whether a response names the requested model: with or without its folders, or a version of it ("-2026-01-01")."""
    last = re.escape(name.rstrip("/").rsplit("/", 1)[-1])
    return answered == name or re.search(rf"(?i)(?:^|/){last}(?:[-@:].*)?$", answered) is not None


def _one_line(text: str, secret: str | None) -> str:
    # Cut, because a body may be megabytes. Redacting finds half of a secret too.
    text = redact(text[:_MAX_DECODED], secret)
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line[:_MAX_SHOWN] + ("..." if len(line) > _MAX_SHOWN else "") or "nothing"
