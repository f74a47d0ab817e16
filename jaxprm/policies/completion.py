"""What a server of chat completions answered, read without trusting it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from jaxprm.errors import redact

Whole = Annotated[int, msgspec.Meta(ge=0)]
STOPS: dict[str, Literal["end", "length"]] = {"stop": "end", "length": "length"}
# Of what a server says in an error, as much as fits a line.
_SHOWN = 300


class Usage(NamedTuple):
    """Tokens by the server's count; `cached` are those of the prompt that it did not have to encode."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Completion(NamedTuple):
    """One assistant turn."""

    text: str
    stop: Literal["end", "length"]
    log_probability: float | None
    usage: Usage


class BadAnswer(Exception):
    """An answer that is none; `usage` is what it cost all the same."""

    def __init__(self, reason: str, usage: Usage = Usage()):
        super().__init__(reason)
        self.usage = usage


class _Cached(msgspec.Struct):
    cached_tokens: Whole | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Whole
    completion_tokens: Whole
    prompt_tokens_details: _Cached | None = None


class _Message(msgspec.Struct):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
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


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    model: str | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Body)


def read(content: bytes, content_type: str, names: tuple[str, ...]) -> Completion:
    """The completion in an answer of status 200, of a model that goes by one of the names.

    Raises BadAnswer, which says what is wrong with it.
    """
    if "json" not in content_type.lower():
        raise BadAnswer(f"Content-Type {content_type or 'missing'} in place of JSON")
    try:
        body = _decoder.decode(content)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadAnswer(f"no chat completion ({error})") from None
    usage = _usage(body.usage)
    if body.error is not None:
        raise BadAnswer("an error with status 200", usage)
    if len(body.choices) != 1:
        raise BadAnswer(f"{len(body.choices)} choices where 1 was asked for", usage)
    if body.model and not any(_is_named(body.model, name) for name in names):
        raise BadAnswer("another model answered; if it is the right one, set served_as to its name", usage)
    (choice,) = body.choices
    text = _text(choice, usage)
    if body.usage is None:
        raise BadAnswer("no usage: the tokens were not counted", usage)
    if text and not usage.generated:
        raise BadAnswer("usage counts no token of a text that is not empty", usage)
    tokens = choice.logprobs.content if choice.logprobs else None
    log_probability = sum(token.logprob for token in tokens) if tokens else None
    return Completion(text, STOPS[choice.finish_reason], log_probability, usage)


def message(content: bytes, secret: str | None = None) -> str:
    """What a body says, in one line without the secret: the message in JSON of the usual forms, or its beginning."""
    try:
        found = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        # What is not shown is not made text of either: it may be megabytes.
        return _line(content[: 1 << 16].decode("utf-8", "replace"), secret)
    for name in ("error", "message", "detail"):
        if isinstance(found, Mapping) and found.get(name):
            found = found[name]
    return _line(found if isinstance(found, str) else msgspec.json.encode(found).decode(), secret)


def _text(choice: _Choice, usage: Usage) -> str:
    said = choice.message
    if said.tool_calls or said.function_call or choice.finish_reason in ("tool_calls", "function_call"):
        raise BadAnswer("the answer calls tools; environments take text: have the server leave them as text", usage)
    if said.content is None:
        cut = " (cut before it began; raise max_action_tokens)" if choice.finish_reason == "length" else ""
        raise BadAnswer(f"no content{cut}", usage)
    if choice.finish_reason not in STOPS:
        raise BadAnswer("finish_reason is neither stop nor length", usage)
    return said.content


def _usage(counted: _Usage | None) -> Usage:
    if counted is None:
        return Usage()
    details = counted.prompt_tokens_details
    cached = min(details.cached_tokens or 0 if details else 0, counted.prompt_tokens)
    return Usage(counted.prompt_tokens, cached, counted.completion_tokens)


def _is_named(answered: str, name: str) -> bool:
    """Whether a model's name is the one asked for, with or without its folders, or a version of it ("-2026-01-01")."""
    last = re.escape(name.rstrip("/").rsplit("/", 1)[-1])
    return answered == name or re.search(rf"(?i)(?:^|/){last}(?:[-@:].*)?$", answered) is not None


def _line(text: str, secret: str | None) -> str:
    text = redact(text, secret)  # before it is cut, or half of the secret would stay
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line[:_SHOWN] + ("..." if len(line) > _SHOWN else "") or "nothing"
