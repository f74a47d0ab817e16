"""A policy behind an API: a client of any OpenAI-compatible server of chat completions.

The client is written here, on httpx2, because every request needs bounds that client libraries do not have: the size of
a response body (of errors too), a deadline for the whole attempt, and a count of attempts and of the tokens billed for
invalid responses. See completion.py for what a response must hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import httpx2
import tenacity
from cachetools import LRUCache

from data_pipeline.encode import Encoder
from jaxprm.config import EndpointConfig, PolicyConfig
from jaxprm.errors import UserError
from jaxprm.policies.completion import Completion, InvalidResponse, Usage, error_text, parse_completion
from jaxprm.policies.protocol import Action, DrawKey, State, candidate_seed, draw_keys
from jaxprm.redaction import MIN_SECRET, redact

Result = TypeVar("Result")

# Bytes of a response body. A completion has some thousand tokens, at most each with its log probability.
MAX_BYTES = 8 << 20
# Actions in memory, some kilobytes each at most. The least recently used are dropped.
MAX_CACHED = 1 << 18
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
_SENT_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
# Estimates without a tokenizer: a token of English or code is some four bytes, and the markers of a message are a few.
_BYTES_PER_TOKEN, _TOKENS_PER_MESSAGE = 4, 4
# Client errors that may pass. The others from 400 on are the request's fault, and another attempt cannot fix them.
_TRANSIENT_STATUSES = frozenset((408, 409, 425, 429))
# Wordings of vLLM, SGLang, llama.cpp and OpenAI: they share no error code.
_TOO_LONG = re.compile(r"(?i)context.{0,3}(length|size|window)|(too long|too many tokens)|maximum.{0,20}\blength")


class EndpointPolicy:
    """Samples actions from a server: one request per candidate.

    A request carries the seed of its draw, so a draw does not depend on the batch, as far as the server honours seeds.
    The last MAX_CACHED completed draws are kept in memory and not requested again. A draw that failed is an Action with
    stop "error"; it is requested again when it is proposed again.

    Args:
      settings: with an `endpoint`.
      encoder: the base model's tokenizer. It counts tokens, and keeps conversations within `settings.max_tokens`.
        Without one, token counts are estimates.
      client: of that endpoint.
    """

    def __init__(self, settings: PolicyConfig, *, seed: int, encoder: Encoder | None, client: ChatClient):
        assert settings.endpoint is not None
        self._settings, self._endpoint, self._seed = settings, settings.endpoint, seed
        self._encoder, self._client = encoder, client
        self._cache: LRUCache[DrawKey, Action] = LRUCache(MAX_CACHED)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens by the server's count (`encoded`, `cached`, `generated`), and `requests`, `retries`, `failures`."""
        return asdict(self._client.counts)

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        """n actions for each state. A state without room for an action gets empty ones with stop "length".

        Raises UserError if the server is unusable as configured, or stopped answering.
        """
        keys = draw_keys(states, n, temperature)
        # Read before anything is added: an addition may drop a key of this call.
        actions = {key: self._cache[key] for row in keys for key in row if key in self._cache}
        missing = {key: state for state, row in zip(states, keys, strict=True) for key in row if key not in actions}
        drawn = {key: Action("", 0, None, "length") for key, state in missing.items() if self._is_full(state)}
        jobs = [(key, state) for key, state in missing.items() if key not in drawn]
        results = self._client.complete([self._request_body(key, state) for key, state in jobs])
        drawn |= {key: _action(result) for (key, _), result in zip(jobs, results, strict=True)}
        self._cache.update((key, action) for key, action in drawn.items() if action.stop != "error")
        actions |= drawn
        return [[actions[key] for key in row] for row in keys]

    def count_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        """Length of a conversation in the base model's tokens, with the opening of the next turn; or an estimate."""
        if self._encoder is not None:
            return len(self._encoder.prompt(messages))
        sizes = [len(str(message.get("content") or "").encode()) for message in messages]
        return sum(_TOKENS_PER_MESSAGE - (-size // _BYTES_PER_TOKEN) for size in sizes)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _is_full(self, state: State) -> bool:
        # An estimate may be off by half, so without a tokenizer the server decides what is too long.
        return self._encoder is not None and (
            self.count_tokens(state.messages) + self._settings.max_action_tokens > self._settings.max_tokens
        )

    def _request_body(self, key: DrawKey, state: State) -> dict[str, Any]:
        extra = self._endpoint.extra_body
        seed, _ = candidate_seed(self._seed, key.task, key.prefix, key.number)
        fields = (*_SENT_FIELDS, "reasoning_content") if self._endpoint.send_reasoning else _SENT_FIELDS
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": [
                {name: message[name] for name in fields if message.get(name) is not None} for message in state.messages
            ],
            "temperature": key.temperature,
            # Servers have other defaults; the recorded temperature is that of the full distribution.
            "top_p": 1.0,
            # 31 bits: some servers keep the seed in a signed word of 32 bits.
            "seed": seed >> 1,
        }
        # For servers that know only the newer name of the limit, which the config sets in extra_body.
        if "max_completion_tokens" not in extra:
            body["max_tokens"] = self._settings.max_action_tokens
        if self._endpoint.log_probabilities:
            body["logprobs"] = True
        # extra_body = {"seed": None} leaves the seed out, for servers that refuse the field.
        return {name: value for name, value in (body | extra).items() if (name, value) != ("seed", None)}


def load(settings: PolicyConfig, *, seed: int, encoder: Encoder | None) -> EndpointPolicy:
    """The policy of `settings.endpoint`. Raises UserError if its API key is missing or malformed."""
    assert settings.endpoint is not None
    client = ChatClient(settings.endpoint, read_key(settings.endpoint), find_special=special_token_finder(encoder))
    return EndpointPolicy(settings, seed=seed, encoder=encoder, client=client)


def read_key(endpoint: EndpointConfig) -> str | None:
    """The API key from the environment, or None if none is configured.

    Raises UserError if the variable is empty or holds characters that no header can carry.
    """
    name = endpoint.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"policy.endpoint.api_key_env: {name} is not set; export it, or set the field to null for none")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"environment variable {name}: holds characters that no key has; set it again")
    return key


def special_token_finder(encoder: Encoder | None) -> Callable[[str], str | None]:
    """A function that finds the first special token of a chat template in a text, or None.

    Without a tokenizer it looks for the form that most templates use, "<|name|>".
    """
    if encoder is not None:
        return encoder.special_in
    return lambda text: match[0] if (match := re.search(r"<\|\w+\|>", text)) else None


def _action(result: Completion | RequestFailed) -> Action:
    if isinstance(result, RequestFailed):
        return Action("", 0, None, "length") if result.too_long else Action("", 0, None, "error", result.reason)
    tokens = result.usage.generated
    return Action(result.text, tokens, result.log_probability, result.stop, reasoning=result.reasoning)


class RequestFailed(NamedTuple):
    """A request without a completion. `too_long`: the conversation leaves no room for one."""

    reason: str
    too_long: bool = False


@dataclass(frozen=True)
class Pauses:
    """Seconds between the attempts of a request.

    A pause is drawn between `first` / 2 and a limit that starts at `first` and doubles up to `longest`. A Retry-After
    header makes it longer, up to `asked`.
    """

    first: float = 1.0
    longest: float = 30.0
    asked: float = 60.0


@dataclass
class RequestCounts:
    """Totals of a client. `requests` are attempts, of which `retries` repeat an earlier one; the rest are tokens."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    encoded: int = 0
    cached: int = 0
    generated: int = 0

    def add(self, usage: Usage) -> None:
        self.encoded += usage.prompt - usage.cached
        self.cached += usage.cached
        self.generated += usage.generated


class TransientError(Exception):
    """A failed attempt that is worth repeating; `retry_after`: the seconds that the server asked to wait."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


class PermanentError(Exception):
    """A request that the server rejects however often it is sent."""

    def __init__(self, failed: RequestFailed):
        super().__init__(failed.reason)
        self.failed = failed


class ChatClient:
    """Sends requests to one server, many at a time; each is answered or failed in bounded time.

    The API key is held here only: it is in no message, no count and no `repr`.

    find_special: finds a special token of a chat template in a text. A completion that contains one is invalid: a
      server that cannot parse its own template returns the prompt along with the answer.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        key: str | None,
        *,
        find_special: Callable[[str], str | None] = lambda text: None,
        pauses: Pauses = Pauses(),
    ):
        self.counts = RequestCounts()
        self.url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self._endpoint, self._key, self._pauses, self._find_special = endpoint, key, pauses, find_special
        self._names = (endpoint.model, endpoint.served_as) if endpoint.served_as else (endpoint.model,)
        self._has_answered, self._failures_in_a_row = False, 0
        self._thread: _LoopThread | None = None
        self._http: httpx2.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    def complete(self, bodies: Sequence[dict[str, Any]]) -> list[Completion | RequestFailed]:
        """The result of each request, in order.

        Raises UserError if further requests are pointless: the server rejects the key, the address or the model, it has
        never answered, not even a greeting, or `endpoint.give_up_after` requests in a row failed.
        """
        if not bodies:
            return []
        if self._thread is None:
            self._thread = _LoopThread()
        results = self._thread.run(self._complete_all(bodies))
        # Nothing was ever answered: a greeting tells a broken server from conversations that it rejects.
        if not self._has_answered and not self._thread.run(self._greet(bodies[0])):
            (failed, *_) = results
            assert isinstance(failed, RequestFailed)
            raise self._error(f"not one of {len(bodies)} requests was answered, the first: {failed.reason}")
        return results

    def close(self) -> None:
        """Cancels the requests in flight, closes the connections and ends the thread. Takes seconds at most."""
        # Forgotten first: a second close does nothing, and a later request starts a new thread.
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(TimeoutError):
                thread.run(self._close())
            thread.close()

    async def _close(self) -> None:
        http, self._http = self._http, None
        async with asyncio.timeout(_CLOSE_SECONDS):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if http is not None:
                await http.aclose()

    async def _complete_all(self, bodies: Sequence[dict[str, Any]]) -> list[Completion | RequestFailed]:
        if self._http is None:
            self._http, self._slots = self._connect(), asyncio.Semaphore(self._endpoint.requests_in_flight)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(body)) for body in bodies]
        except BaseExceptionGroup as errors:
            # A TaskGroup wraps what its tasks raise, and cancels the others.
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _connect(self) -> httpx2.AsyncClient:
        connections = self._endpoint.requests_in_flight
        return httpx2.AsyncClient(
            # A small compressed body could unpack to any size.
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            # No limits per read or write: every attempt has a deadline as a whole.
            timeout=httpx2.Timeout(None, connect=min(_CONNECT_SECONDS, self._endpoint.timeout_seconds)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def _complete(self, body: dict[str, Any]) -> Completion | RequestFailed:
        assert self._slots is not None
        # The pauses between attempts are inside the slot: a server that cannot keep up gets fewer requests.
        async with self._slots:
            result = await self._with_retries(body)
        if isinstance(result, Completion) or result.too_long:
            # Also after a conversation that is too long: the server has answered.
            self._failures_in_a_row = 0
            return result
        self.counts.failures += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._endpoint.give_up_after:
            raise self._error(f"{self._failures_in_a_row} requests in a row failed, the last: {result.reason}")
        return result

    async def _with_retries(self, body: dict[str, Any]) -> Completion | RequestFailed:
        attempts = 1 + self._endpoint.retries
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=self._pause,
            retry=tenacity.retry_if_exception_type(TransientError),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            completion: Completion = await retrying(self._attempt, body)
        except TransientError as error:
            return RequestFailed(f"{error} ({attempts} attempts)")
        except PermanentError as error:
            return error.failed
        self._has_answered = True
        return completion

    async def _greet(self, body: dict[str, Any]) -> bool:
        """Whether the server answers this request with a short message in place of its conversation."""
        with contextlib.suppress(TransientError, PermanentError):
            await self._attempt(body | {"messages": [{"role": "user", "content": "Hello"}]})
            self._has_answered = True
        return self._has_answered

    def _pause(self, retry: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt."""
        # Random, since requests that failed together would otherwise return together.
        draw = tenacity.wait_random_exponential(self._pauses.first, self._pauses.longest, min=self._pauses.first / 2)
        error = retry.outcome.exception() if retry.outcome else None
        asked = error.retry_after if isinstance(error, TransientError) else 0.0
        return max(draw(retry), min(asked, self._pauses.asked))

    def _count_retry(self, retry: tenacity.RetryCallState) -> None:
        self.counts.retries += 1

    async def _attempt(self, body: dict[str, Any]) -> Completion:
        assert self._http is not None
        self.counts.requests += 1
        seconds = self._endpoint.timeout_seconds
        try:
            async with (
                # From here on, so the time that a request waits for its slot does not count.
                asyncio.timeout(seconds),
                self._http.stream("POST", self.url, content=json.dumps(body).encode()) as response,
            ):
                content = await _read_bounded(response)
        except TimeoutError:
            raise TransientError(f"no complete answer within {seconds:g} seconds") from None
        except httpx2.HTTPError as error:
            detail = redact(str(error), self._key)
            raise TransientError(f"{type(error).__name__}{detail and ': '}{detail}") from None
        if response.status_code == HTTPStatus.OK:
            return self._parse(content, response.headers.get("Content-Type", ""))
        raise self._status_error(response, content)

    def _parse(self, content: bytes, content_type: str) -> Completion:
        try:
            completion = parse_completion(content, content_type, self._names)
            if special := self._find_special(completion.text) or self._find_special(completion.reasoning or ""):
                raise InvalidResponse(f"the answer spells {special}, which no message may contain", completion.usage)
        except InvalidResponse as error:
            # An invalid response is billed like any other.
            self.counts.add(error.usage)
            reason = f"{error}: {error_text(content, self._key)}"
            raise TransientError(redact(reason, self._key)) from None
        self.counts.add(completion.usage)
        if len(self._key or "") < MIN_SECRET:
            return completion
        # What it says is stored, and shown to every later reader of the trajectories.
        reasoning = completion.reasoning and redact(completion.reasoning, self._key)
        return completion._replace(text=redact(completion.text, self._key), reasoning=reasoning)

    def _status_error(self, response: httpx2.Response, content: bytes) -> Exception:
        """The exception for a status other than 200: by whether a retry, another request or another config can help."""
        status = response.status_code
        # A redirect says where to in a header, and its body may be empty.
        detail = error_text(content or response.headers.get("Location", "").encode(), self._key)
        reason = redact(f"status {status} {response.reason_phrase}".rstrip() + f": {detail}", self._key)
        # Below 300: accepted or empty, such as 202 and 204, which is no answer yet.
        if status in _TRANSIENT_STATUSES or status >= 500 or status < 300:
            return TransientError(reason, _retry_after(response.headers.get("Retry-After", "")))
        if status in (401, 403):
            sent = f"the key in {self._endpoint.api_key_env}" if self._key else "no key"
            fix = f"it was sent {sent}; name the variable of a valid one in policy.endpoint.api_key_env"
        elif status == 404:
            fix = "see that policy.endpoint.base_url is what comes before /chat/completions, and policy.endpoint.model"
        elif status < 400 or status in (402, 405, 407, 410):
            fix = "fix policy.endpoint.base_url, or what the server asks for"
        else:
            return PermanentError(RequestFailed(reason, too_long=_TOO_LONG.search(detail) is not None))
        return self._error(reason, fix)

    def _error(self, what: str, fix: str = "") -> UserError:
        fix = fix or "fix the server or policy.endpoint, and run the same command again: it resumes where it stopped"
        return UserError(f"policy at {self.url}, model {self._endpoint.model}: {what}; {fix}")


class _LoopThread:
    """An event loop in a daemon thread.

    A thread, because callers may run an event loop themselves (notebooks); a daemon, so that it never keeps a program
    from ending.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C interrupts this wait only; the coroutine in the other thread has to be cancelled.
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _read_bounded(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_BYTES:
            raise TransientError(f"an answer of more than {MAX_BYTES} bytes")
    return bytes(content)


def _retry_after(header: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 if it is neither."""
    try:
        # float() also reads "nan" and "inf", which nothing can wait for.
        return max(0.0, float(header)) if not re.search(r"nan|inf", header, re.IGNORECASE) else 0.0
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
