"""A client of an OpenAI-compatible server: many requests in flight, each answered or failed in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import httpx2
import tenacity

from jaxprm.config import EndpointConfig
from jaxprm.errors import UserError, redact
from jaxprm.policies import completion
from jaxprm.policies.completion import BadAnswer, Completion, Usage

Result = TypeVar("Result")

# An answer holds some thousand tokens, each with its log-probability at the most.
MAX_BYTES = 8 << 20
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
# Other statuses from 400 on are the request's fault, which one more attempt does not mend.
_PASSING = frozenset((408, 409, 425, 429))
_TOO_LONG = re.compile(r"(?i)context.{0,3}(length|size|window)|(too long|too many tokens)|maximum.{0,20}\blength")


class RequestFailed(NamedTuple):
    """A request that was not answered, and why. `too_long`: the conversation leaves no room for an answer."""

    reason: str
    too_long: bool = False


@dataclass(frozen=True)
class Pauses:
    """Seconds between the attempts of a request: drawn between `first` / 2 and a limit that doubles up to `longest`.

    What a server asks for in Retry-After is waited for, up to `asked`.
    """

    first: float = 1.0
    longest: float = 30.0
    asked: float = 60.0


@dataclass
class RequestCounts:
    """Of everything that was sent and came back. `requests` are attempts, `retries` those that repeat one."""

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
    """An attempt that failed for a reason that may pass; `after`: the seconds to wait that the server asked for."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class PermanentError(Exception):
    """A request that the server will not answer, however often it is sent."""

    def __init__(self, failed: RequestFailed):
        super().__init__(failed.reason)
        self.failed = failed


class ChatClient:
    """Asks a server. The key is held here alone: it is in no message, no count and no `repr`.

    template_in: the first special token of a chat template that a text spells, or None. An answer that does is not one
    message: a server that cannot take its own template apart gives the prompt back along with the answer.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        key: str | None,
        *,
        template_in: Callable[[str], str | None] = lambda text: None,
        pauses: Pauses = Pauses(),
    ):
        self.counts = RequestCounts()
        self._template_in = template_in
        self.url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self._endpoint, self._key, self._pauses = endpoint, key, pauses
        self._names = (endpoint.model, endpoint.served_as) if endpoint.served_as else (endpoint.model,)
        self._answered, self._failures_in_a_row = False, 0
        self._thread: _LoopThread | None = None
        self._http: httpx2.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    def ask(self, bodies: Sequence[dict[str, Any]]) -> list[Completion | RequestFailed]:
        """The answer to each request, in order.

        Raises UserError where going on is of no use: the server wants another key, address or model, has answered
        nothing yet, not even a greeting, or has let too many requests in a row down.
        """
        if not bodies:
            return []
        if self._thread is None:
            self._thread = _LoopThread()
        results = self._thread.run(self._ask_all(bodies))
        # Where nothing was ever answered: is it the server, or these conversations?
        if not self._answered and not self._thread.run(self._greet(bodies[0])):
            raise self._error(f"not one of {len(bodies)} requests was answered, the first: {results[0].reason}")
        return results

    def close(self) -> None:
        """Drops what is in flight, closes the connections and ends the thread."""
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

    async def _ask_all(self, bodies: Sequence[dict[str, Any]]) -> list[Completion | RequestFailed]:
        if self._http is None:
            self._http, self._slots = self._connect(), asyncio.Semaphore(self._endpoint.requests_in_flight)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(body)) for body in bodies]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _connect(self) -> httpx2.AsyncClient:
        most = self._endpoint.requests_in_flight
        return httpx2.AsyncClient(
            # A compressed body could be of any size once unpacked.
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            # Every attempt has a deadline for the whole of it.
            timeout=httpx2.Timeout(None, connect=min(_CONNECT_SECONDS, self._endpoint.timeout_seconds)),
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        )

    async def _ask(self, body: dict[str, Any]) -> Completion | RequestFailed:
        # A request that waits for its next attempt keeps its slot: a server that cannot keep up is asked less.
        async with self._slots:
            attempts = tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(1 + self._endpoint.retries),
                wait=self._wait,
                retry=tenacity.retry_if_exception_type(TransientError),
                before_sleep=self._count_retry,
                reraise=True,
            )
            try:
                found: Completion | RequestFailed = await attempts(self._attempt, body)
                self._answered = True
            except TransientError as error:
                found = RequestFailed(f"{error} ({1 + self._endpoint.retries} attempts)")
            except PermanentError as error:
                found = error.failed
        if isinstance(found, Completion) or found.too_long:
            self._failures_in_a_row = 0
            return found
        self.counts.failures += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._endpoint.give_up_after:
            raise self._error(f"{self._failures_in_a_row} requests in a row failed, the last: {found.reason}")
        return found

    async def _greet(self, body: dict[str, Any]) -> bool:
        """Whether a request like this one is answered if it says next to nothing."""
        with contextlib.suppress(TransientError, PermanentError):
            await self._attempt(body | {"messages": [{"role": "user", "content": "Hello"}]})
            self._answered = True
        return self._answered

    def _wait(self, state: tenacity.RetryCallState) -> float:
        drawn = tenacity.wait_random_exponential(self._pauses.first, self._pauses.longest, min=self._pauses.first / 2)
        return max(drawn(state), min(state.outcome.exception().after, self._pauses.asked))

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.counts.retries += 1

    async def _attempt(self, body: dict[str, Any]) -> Completion:
        self.counts.requests += 1
        seconds = self._endpoint.timeout_seconds
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream("POST", self.url, content=json.dumps(body).encode()) as response,
            ):
                content = await _bounded(response)
        except TimeoutError:
            raise TransientError(f"no whole answer within {seconds:g} seconds") from None
        except httpx2.HTTPError as error:
            said = redact(str(error), self._key)
            raise TransientError(f"{type(error).__name__}{said and ': '}{said}") from None
        if response.status_code == HTTPStatus.OK:
            return self._read(content, response.headers.get("Content-Type", ""))
        raise self._failure(response, content)

    def _read(self, content: bytes, content_type: str) -> Completion:
        try:
            found = completion.read(content, content_type, self._names)
            if special := self._template_in(found.text):
                raise BadAnswer(f"the answer spells {special}, which no message may contain", found.usage)
        except BadAnswer as error:
            # It may have cost tokens all the same.
            self.counts.add(error.usage)
            reason = f"{error}: {completion.message(content, self._key)}"
            raise TransientError(redact(reason, self._key)) from None
        self.counts.add(found.usage)
        return found

    def _failure(self, response: httpx2.Response, content: bytes) -> Exception:
        status = response.status_code
        said = completion.message(content or response.headers.get("Location", "").encode(), self._key)
        reason = redact(f"status {status} {response.reason_phrase}".rstrip() + f": {said}", self._key)
        if status in _PASSING or status >= 500 or status < 300:
            return TransientError(reason, _seconds(response.headers.get("Retry-After", "")))
        if status in (401, 403):
            given = f"the key in {self._endpoint.api_key_env}" if self._key else "no key"
            fix = f"it was sent {given}; name the variable of a valid one in policy.endpoint.api_key_env"
        elif status == 404:
            fix = "see that policy.endpoint.base_url is what comes before /chat/completions, and policy.endpoint.model"
        elif status < 400 or status in (402, 405, 407, 410):
            fix = "mend policy.endpoint.base_url, or what the server asks for"
        else:
            return PermanentError(RequestFailed(reason, too_long=_TOO_LONG.search(said) is not None))
        return self._error(reason, fix)

    def _error(self, what: str, fix: str = "") -> UserError:
        fix = fix or "mend the server or policy.endpoint, and run the same command again: it goes on where it stopped"
        return UserError(f"policy at {self.url}, model {self._endpoint.model}: {what}; {fix}")


class _LoopThread:
    """An event loop in a daemon thread: it serves callers that have one themselves, and lets any program end."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C ends the wait, and with it what was waited for.
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _bounded(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_BYTES:
            raise TransientError(f"an answer of more than {MAX_BYTES} bytes")
    return bytes(content)


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 where it is neither."""
    try:
        return max(0.0, float(retry_after)) if not re.search(r"nan|inf", retry_after, re.IGNORECASE) else 0.0
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
