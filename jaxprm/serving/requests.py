"""Requests parsed and bounded, and their responses: our own shape, vLLM's and SGLang's."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import ClientDisconnect, Request

from jaxprm.api import ActionScore

LONGEST_MESSAGE = 500


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """Bounds of a server; beyond them a request is refused with the bound in the message.

    body_bytes, depth: of a request's JSON; candidates: of a request, or inputs of a classification; tokens: of a
    conversation with a candidate; waiting: requests that are accepted and not answered; held_bytes: bodies of all
    requests together; batch: requests computed at once; body_seconds: to send a body in; idle_seconds: until a
    connection without a request is closed.
    """

    body_bytes: int = 1 << 20
    depth: int = 32
    candidates: int = 64
    tokens: int = 2048
    waiting: int = 256
    held_bytes: int = 256 << 20
    batch: int = 32
    body_seconds: float = 30.0
    idle_seconds: float = 60.0


class RequestRefused(Exception):
    """A request that is not answered: its status, one line that says why, and headers for the response."""

    def __init__(self, status: int, message: str, **headers: str):
        line = " ".join(message.split())
        self.status = HTTPStatus(status)
        self.message = line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(self.message)


class Intake:
    """Reads bodies of requests, and knows how much is held of all of them."""

    def __init__(self, limits: RequestLimits):
        self._limits = limits
        self.bytes = 0

    @contextmanager
    def holding(self) -> Iterator[bytearray]:
        """A buffer for a body; what is in it counts until the end of the block."""
        body = bytearray()
        try:
            yield body
        finally:
            self.bytes -= len(body)

    async def read(self, request: Request, body: bytearray) -> None:
        """Fills the buffer. Raises Refused for a body that is too large, too slow, cut off, or one too many."""
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self._limits.body_bytes:
                        raise self._too_large()
                    if self.bytes + len(chunk) > self._limits.held_bytes:
                        raise RequestRefused(
                            429, "too many requests at once for their size; try again", Retry_After="1"
                        )
                    body += chunk
                    self.bytes += len(chunk)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise RequestRefused(
                408, f"the body did not arrive within {seconds:g} seconds", Connection="close"
            ) from None
        except ClientDisconnect:
            raise RequestRefused(400, "the connection was closed before the body had arrived") from None

    def _too_large(self) -> RequestRefused:
        return RequestRefused(
            413, f"the body has more than {self._limits.body_bytes} bytes; send fewer candidates at once"
        )


def decoded(body: bytes | bytearray, depth: int) -> Any:
    """A body's JSON. Raises Refused where it is none, or nested more than `depth` deep."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestRefused(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise RequestRefused(400, f"the body is nested more than {depth} deep") from None
    layer = [value]
    for _ in range(depth):
        layer = [inner for one in layer for inner in _inside(one)]
        if not layer:
            return value
    raise RequestRefused(400, f"the body is nested more than {depth} deep")


def _inside(value: Any) -> list:
    """The lists and objects directly inside of one."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in items if isinstance(one, (dict, list))]


# Fields of vLLM's and SGLang's requests that would change the answer, with the only value that does not.
_FIXED = {
    "truncate_prompt_tokens": None,
    "add_special_tokens": False,
    "add_generation_prompt": False,
    "continue_final_message": False,
    "chat_template": None,
    "chat_template_kwargs": None,
    "dimensions": None,
    "image_data": None,
    "video_data": None,
    "audio_data": None,
    "input_embeds": None,
    "lora_path": None,
}
_INPUTS = ("input", "messages", "text", "input_ids")


class ScoreActions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/score_actions`: as jaxprm.Model.score_actions. `model` is not looked at, there is one."""

    messages: list[dict[str, Any]]
    candidates: list[str | dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    model: str | None = None


class Classify(NamedTuple):
    """`POST /classify`: conversations as texts or token ids, or one as messages; `one`: not asked for in a list."""

    form: Literal["vllm", "sglang"]
    inputs: list[str | list[int]]
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    one: bool


class Values(NamedTuple):
    """Values of classified conversations, and their tokens."""

    values: list[float]
    tokens: list[int]


def score_actions(value: Any, limits: RequestLimits) -> ScoreActions:
    """Raises Refused for what has another shape, or too many candidates."""
    asked = _converted(value, ScoreActions)
    _check_count("candidates", len(asked.candidates), limits)
    return asked


def classify(value: Any, limits: RequestLimits) -> Classify:
    """vLLM's shape (`input` or `messages`) or SGLang's (`text` or `input_ids`).

    Raises Refused for another one, for too many inputs, and for options that would change the answer.
    """
    fields = _converted(value, dict[str, Any])
    given = [name for name in _INPUTS if fields.get(name) is not None]
    if len(given) != 1:
        raise RequestRefused(400, f"give one of {', '.join(_INPUTS)}, got {' and '.join(given) or 'none of them'}")
    for name, only in _FIXED.items():
        if fields.get(name) not in (None, only):
            raise RequestRefused(400, f"{name} is not supported; leave it out")
    (name,) = given
    if name == "messages":
        messages = _converted(fields[name], list[dict[str, Any]], name)
        tools = _converted(fields.get("tools"), list[dict[str, Any]] | None, "tools")
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant" or last.get("step") is False:
            raise RequestRefused(400, "messages: the last one must be the assistant's, whose promise is the answer")
        return Classify("vllm", [], messages, tools, True)
    one = isinstance(fields[name], str) or (isinstance(fields[name], list) and not _of_lists(fields[name]))
    inputs = [fields[name]] if one else fields[name]
    _check_inputs(name, inputs, limits)
    return Classify("vllm" if name == "input" else "sglang", inputs, None, None, one)


def scores(found: Sequence[ActionScore], model: str) -> dict[str, Any]:
    """{"model", "scores": [{"promise", "progress"}]}, in the order of the candidates."""
    return {"model": model, "scores": [one._asdict() for one in found]}


def classes(asked: Classify, found: Values, model: str, seconds: float) -> Any:
    """vLLM's ClassificationResponse, or SGLang's object with `embedding`, in a list where a list was asked for."""
    name = f"classify-{uuid.uuid4().hex}"
    if asked.form == "sglang":
        items = [
            {
                "embedding": [value],
                "meta_info": {
                    "id": f"{name}-{index}",
                    "finish_reason": {"type": "length", "length": 0},
                    "prompt_tokens": tokens,
                    "completion_tokens": 0,
                    "e2e_latency": seconds,
                },
            }
            for index, (value, tokens) in enumerate(zip(*found, strict=True))
        ]
        return items[0] if asked.one else items
    data = [
        {"index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1}
        for index, value in enumerate(found.values)
    ]
    total = sum(found.tokens)
    usage = {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": name, "object": "list", "created": int(time.time()), "model": model, "data": data, "usage": usage}


def _converted(value: Any, kind: Any, name: str = "") -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RequestRefused(400, f"{name}: {error}" if name else str(error)) from None


def _of_lists(items: list) -> bool:
    """Whether a list holds inputs, as opposed to the token ids of one."""
    return bool(items) and isinstance(items[0], (str, list))


def _check_inputs(name: str, inputs: Any, limits: RequestLimits) -> None:
    if not isinstance(inputs, list):
        raise RequestRefused(400, f"{name}: must be a text, token ids, or a list of texts or of token ids")
    _check_count(name, len(inputs), limits)
    for index, one in enumerate(inputs):
        ids = isinstance(one, list) and all(type(token) is int for token in one)
        if not (isinstance(one, str) or ids) or type(one) is not type(inputs[0]):
            raise RequestRefused(
                400, f"{name}: number {index} is neither a text nor a list of token ids as the first one"
            )
        if not one:
            raise RequestRefused(400, f"{name}: number {index} is empty")


def _check_count(name: str, count: int, limits: RequestLimits) -> None:
    if not 1 <= count <= limits.candidates:
        raise RequestRefused(400, f"{name}: {count} of them, must be 1 to {limits.candidates}; ask in several requests")
