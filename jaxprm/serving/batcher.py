"""The queue between connections and the model: one thread computes what is waiting, all of it at once."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from jaxprm.serving.limits import Limits, Refused

# Weight of the last batch in the time that a request is expected to take.
_RECENT = 0.2


class _Stopped(Exception):
    """Raised out of a warm-up that nobody waits for any more."""


class Batcher:
    """Gives what several connections ask to `answer` together, from a thread of its own.

    answer: requests to an answer each, in order, of which one may be a Refused; warm_up: called first, with a function
    to call now and then, whose failure is kept as `error`; done: told of the requests of each batch and its seconds.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        warm_up: Callable[[Callable[[], None]], None],
        limits: Limits,
        *,
        done: Callable[[int, float], None] = lambda count, seconds: None,
    ):
        self._answer, self._warm_up, self._limits, self._done = answer, warm_up, limits, done
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._computing = 0
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.state = "warming up"
        self.error: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Answers what has been accepted, and ends the thread. A warm-up ends at its next program."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def unanswered(self) -> int:
        """Requests that were accepted and have no answer yet."""
        return len(self._waiting) + self._computing

    async def __call__(self, asked: Any) -> Any:
        """The answer to a request. Cancelled, it is not computed if it has not been begun.

        Raises Refused where the model is not ready, where too many are waiting, and where that is the answer.
        """
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed or self.state != "ready":
                state = "shutting down" if self._closed else self.state
                raise Refused(503, f"the model is {state}; try again", Retry_After="5")
            if self.unanswered >= self._limits.waiting:
                message = f"{self.unanswered} requests are waiting; try again"
                raise Refused(429, message, Retry_After=self._retry_after())
            self._waiting.append((asked, future))
            self._changed.notify()
        answer = await future
        if isinstance(answer, Refused):
            raise answer
        return answer

    def _retry_after(self) -> str:
        """When half of those that wait should be through."""
        return str(min(60, max(1, math.ceil(self._seconds * self.unanswered / 2))))

    def _run(self) -> None:
        try:
            self._warm_up(self._go_on)
        except _Stopped:
            return
        except Exception as error:  # whatever it is, the server ends with it
            self.error = error
            return
        self.state = "ready"
        while batch := self._next():
            began = time.perf_counter()
            answers = self._answered([asked for asked, _ in batch])
            # Before the answers are out: who has one may ask again at once.
            self._computing = 0
            self._deliver(batch, answers)
            seconds = time.perf_counter() - began
            self._seconds += _RECENT * (seconds / len(batch) - self._seconds)
            self._done(len(batch), seconds)

    def _go_on(self) -> None:
        if self._closed:
            raise _Stopped

    def _next(self) -> list[tuple[Any, asyncio.Future]]:
        """What is waiting, up to a batch, once there is something; nothing when closed and all is answered."""
        with self._changed:
            while True:
                batch: list[tuple[Any, asyncio.Future]] = []
                while self._waiting and len(batch) < self._limits.batch:
                    asked, future = self._waiting.popleft()
                    if not future.cancelled():
                        batch.append((asked, future))
                if batch or self._closed:
                    self._computing = len(batch)
                    return batch
                self._changed.wait()

    def _answered(self, asked: list[Any]) -> Sequence[Any]:
        try:
            answers = self._answer(asked)
            if len(answers) == len(asked):
                return answers
            logging.getLogger(__name__).error("%d answers to %d requests", len(answers), len(asked))
        except Exception:
            # The thread must outlive whatever happens in it: who waits now would wait for ever.
            logging.getLogger(__name__).exception("a batch failed")
        return [Refused(500, "internal error; the server's log has more")] * len(asked)

    def _deliver(self, batch: Sequence[tuple[Any, asyncio.Future]], answers: Sequence[Any]) -> None:
        def give() -> None:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

        with suppress(RuntimeError):  # told to end at once, the loop is closed already
            batch[0][1].get_loop().call_soon_threadsafe(give)
