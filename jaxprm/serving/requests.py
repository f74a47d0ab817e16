"""Parses and bounds requests, and builds their responses: our own format, vLLM's and SGLang's."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from starlette.requests import ClientDisconnect, Request

from jaxprm.api import ActionScore

# Characters of an error message: it may quote the request.
MAX_MESSAGE = 500
# For failures of ours: details stay in the log, since clients may be strangers.
INTERNAL_ERROR = "internal error; the server's log has more"
# Fields of vLLM's and SGLang's requests that would change the answer, with the only value that does not.
_UNSUPPORTED = {
    "truncate_prompt_tokens": None,
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
_INPUT_FIELDS = ("input", "messages", "text", "input_ids")


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """Bounds of a server. A request beyond one is refused, with the bound in the message.

    Args:
      body_bytes: size of a request's body.
      depth: nesting of its JSON.
      candidates: candidates of a request, or inputs of a classification.
      tokens: tokens of a conversation with a candidate.
      waiting: requests that are accepted and not answered.
      held_bytes: bodies of all requests together.
      batch: requests computed at once.
      body_seconds: time for a body to arrive.
      idle_seconds: time until a connection without a request is closed.
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
    """A request without an answer: the status, a message of one line, and headers of the response."""

    def __init__(self, status: int, message: str, **headers: str):
        line = " ".join(message.split())
        self.status = HTTPStatus(status)
        self.message = line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(self.message)


class Intake:
    """Reads the bodies of requests and bounds their total size. bytes: of the bodies that are held now."""

    def __init__(self, limits: RequestLimits):
        self._limits = limits
        self.bytes = 0

    @contextmanager
    def holding(self) -> Iterator[bytearray]:
        """A buffer for a body. Its content counts in `bytes` until the end of the block."""
        body = bytearray()
        try:
            yield body
        finally:
            self.bytes -= len(body)

    async def read(self, request: Request, body: bytearray) -> None:
        """Fills the buffer. Raises RequestRefused if the body is too large, too slow, cut off, or one too many."""
        declared = request.headers.get("content-length", "0")
        # Refused before anything is read, if the client is honest about the length.
        if declared.isdecimal() and int(declared) > self._limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                # Counted as it arrives: the declared length may be missing or wrong.
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


def parse_json(body: bytes | bytearray, depth: int) -> Any:
    """The value of a body. Raises RequestRefused if it is not JSON, or nested more than `depth` deep."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestRefused(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise RequestRefused(400, f"the body is nested more than {depth} deep") from None
    # Level by level, without recursion: what follows may recurse as deep as `depth`, not as deep as a client likes.
    level = [value]
    for _ in range(depth):
        level = [inner for container in level for inner in _containers_in(container)]
        if not level:
            return value
    raise RequestRefused(400, f"the body is nested more than {depth} deep")


def _containers_in(value: Any) -> list:
    """The lists and objects directly inside a value."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


Salt = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class ScoreActions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/score_actions`: the arguments of jaxprm.Model.score_actions. `model` is ignored: a server has one.

    cache_salt: requests share caches only with those of the same salt, as in vLLM.
    """

    messages: list[dict[str, Any]]
    candidates: list[str | dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    cache_salt: Salt | None = None


class Classify(NamedTuple):
    """`POST /classify`: conversations as texts or token ids, or one as messages.

    is_single: the input was not in a list, so SGLang's response is not one either.
    add_bos: put the begin-of-text token before inputs that lack it.
    """

    form: Literal["vllm", "sglang"]
    inputs: list[str | list[int]]
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    is_single: bool
    cache_salt: str | None = None
    add_bos: bool = False


class Values(NamedTuple):
    """Values of classified conversations, their lengths in tokens, and errors by index: these have the value NaN."""

    values: list[float]
    tokens: list[int]
    errors: Mapping[int, str] = MappingProxyType({})


def parse_score_actions(value: Any, limits: RequestLimits) -> ScoreActions:
    """Raises RequestRefused for a wrong shape and for too many candidates."""
    request = _convert(value, ScoreActions)
    _check_count("candidates", len(request.candidates), limits)
    return request


def parse_classify(value: Any, limits: RequestLimits) -> Classify:
    """A request of vLLM's shape (`input` or `messages`) or SGLang's (`text` or `input_ids`).

    Raises RequestRefused for another shape, for too many inputs, and for options that would change the answer.
    """
    # As a dict: clients of vLLM and SGLang send more fields than have a meaning here, and those are ignored.
    fields = _convert(value, dict[str, Any])
    present = [name for name in _INPUT_FIELDS if fields.get(name) is not None]
    if len(present) != 1:
        got = " and ".join(present) or "none of them"
        raise RequestRefused(400, f"give one of {', '.join(_INPUT_FIELDS)}, got {got}")
    for name, harmless in _UNSUPPORTED.items():
        if fields.get(name) not in (None, harmless):
            raise RequestRefused(400, f"{name} is not supported; leave it out")
    add_bos = fields.get("add_special_tokens")
    if add_bos not in (None, True, False):
        raise RequestRefused(400, "add_special_tokens: must be true or false")
    (name,) = present
    salt = _convert(fields.get("cache_salt"), Salt | None, "cache_salt")
    if name == "messages":
        messages = _convert(fields[name], list[dict[str, Any]], name)
        tools = _convert(fields.get("tools"), list[dict[str, Any]] | None, "tools")
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant" or last.get("step") is False:
            raise RequestRefused(400, "messages: the last one must be the assistant's, whose promise is the answer")
        return Classify("vllm", [], messages, tools, True, salt)
    is_single = isinstance(fields[name], str) or (isinstance(fields[name], list) and not _holds_inputs(fields[name]))
    inputs = [fields[name]] if is_single else fields[name]
    _check_inputs(name, inputs, limits)
    return Classify("vllm" if name == "input" else "sglang", inputs, None, None, is_single, salt, bool(add_bos))


def score_actions_response(scores: Sequence[ActionScore], model: str) -> dict[str, Any]:
    """{"model", "scores": [{"promise", "progress"}]}, in the order of the candidates.

    A candidate that cannot be scored has two nulls and an "error". Raises RequestRefused if none can be scored.
    """
    _check_any([score.error for score in scores])
    failed = {"promise": None, "progress": None}
    items = [score._asdict() if score.error is None else failed | {"error": score.error} for score in scores]
    return {"model": model, "scores": items}


def classify_response(request: Classify, answer: Values, model: str, seconds: float) -> Any:
    """vLLM's ClassificationResponse, or SGLang's object with `embedding`, in a list if the inputs were.

    An input that cannot be scored has an empty list in place of its value, and an "error". Raises RequestRefused if
    none can be scored.
    """
    _check_any([answer.errors.get(index) for index in range(len(answer.values))])
    values = [[] if math.isnan(value) else [value] for value in answer.values]
    errors = [{"error": answer.errors[index]} if index in answer.errors else {} for index in range(len(values))]
    name = f"classify-{uuid.uuid4().hex}"
    if request.form == "sglang":
        items = [
            {
                "embedding": value,
                "meta_info": {
                    "id": f"{name}-{index}",
                    # Nothing is generated; clients of SGLang expect the fields all the same.
                    "finish_reason": {"type": "length", "length": 0},
                    "prompt_tokens": tokens,
                    "completion_tokens": 0,
                    "e2e_latency": seconds,
                },
            }
            | error
            for index, (value, tokens, error) in enumerate(zip(values, answer.tokens, errors, strict=True))
        ]
        return items[0] if request.is_single else items
    data = [
        {"index": index, "label": "LABEL_0", "probs": value, "num_classes": 1} | error
        for index, (value, error) in enumerate(zip(values, errors, strict=True))
    ]
    total = sum(answer.tokens)
    usage = {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": name, "object": "list", "created": int(time.time()), "model": model, "data": data, "usage": usage}


def _check_any(errors: Sequence[str | None]) -> None:
    """Raises RequestRefused, with the first error, if there is an error for every item."""
    if errors and all(error is not None for error in errors):
        raise RequestRefused(400, str(errors[0]))


def _convert(value: Any, kind: Any, name: str = "") -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RequestRefused(400, f"{name}: {error}" if name else str(error)) from None


def _holds_inputs(items: list) -> bool:
    """Whether a list holds several inputs, as opposed to the token ids of one."""
    return bool(items) and isinstance(items[0], (str, list))


def _check_inputs(name: str, inputs: Any, limits: RequestLimits) -> None:
    if not isinstance(inputs, list):
        raise RequestRefused(400, f"{name}: must be a text, token ids, or a list of texts or of token ids")
    _check_count(name, len(inputs), limits)
    for index, item in enumerate(inputs):
        # type() and not isinstance(): JSON's true is an int to Python.
        is_ids = isinstance(item, list) and all(type(token) is int for token in item)
        if not (isinstance(item, str) or is_ids) or type(item) is not type(inputs[0]):
            raise RequestRefused(
                400, f"{name}: number {index} is neither a text nor a list of token ids as the first one"
            )
        if not item:
            raise RequestRefused(400, f"{name}: number {index} is empty")


def _check_count(name: str, count: int, limits: RequestLimits) -> None:
    if not 1 <= count <= limits.candidates:
        raise RequestRefused(400, f"{name}: {count} of them, must be 1 to {limits.candidates}; ask in several requests")
