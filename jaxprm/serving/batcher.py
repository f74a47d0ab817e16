"""The queue between connections and the model: one thread scores all waiting requests together."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from jaxprm.api import ActionScore, Model, Question
from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import Shapes
from jaxprm.scoring import loading
from jaxprm.scoring.scorer import Scorer
from jaxprm.serving.requests import Classify, RequestLimits, RequestRefused, ScoreActions, Values

# Few, as every shape is compiled before the first answer: a third of those that a search has, for more padding.
SHAPES = Shapes(growth=(256,), packed=(256, 1024), ring_width=256, lengths=(0, 512, 2048, 8192))

Asked = ScoreActions | Classify
Answer = list[ActionScore] | Values | RequestRefused


class _Encoded(NamedTuple):
    """A request ready to be computed: candidates of a conversation, or whole ones as tokens int32 [T] each."""

    question: Question | None
    sequences: list[np.ndarray]


class Answers:
    """A model that answers requests. To be used by one thread."""

    def __init__(self, scorer: Scorer, model: Model, limits: RequestLimits):
        self._scorer, self._model, self._limits = scorer, model, limits

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, see Engine.usage."""
        return self._scorer.usage

    def warm_up(self, each: Callable[[], None]) -> None:
        """Compiles what requests need; `each` is called before every program, and what it raises ends the warm-up."""
        self._scorer.engine.warm_up(self._limits.tokens, each)
        self._scorer.engine.warm_up_whole(self._limits.tokens, each)

    def __call__(self, asked: Sequence[Asked]) -> list[Answer]:
        """An answer for each request, in order: scores, values, or why there are none."""
        answers: list[Answer | _Encoded] = [self._encoded(one) for one in asked]
        ready = [index for index, one in enumerate(answers) if isinstance(one, _Encoded)]
        try:
            found = self._computed([answers[index] for index in ready])
        except Exception:
            # One of them, or the machine: those that can be answered are, each by itself and from an empty cache.
            logging.getLogger(__name__).exception("a batch of %d requests failed; one at a time now", len(ready))
            found = [self._alone(answers[index]) for index in ready]
        for index, one in zip(ready, found, strict=True):
            answers[index] = _finite(one)
        return answers

    def _encoded(self, asked: Asked) -> _Encoded | RequestRefused:
        try:
            one = self._prepared(asked)
        except (UserError, DataError) as error:
            return RequestRefused(400, str(error))
        except Exception:
            logging.getLogger(__name__).exception("a request could not be encoded")
            return RequestRefused(500, "internal error; the server's log has more")
        lengths = [len(tokens) for tokens in one.sequences] + ([one.question.longest] if one.question else [])
        if max(lengths) > self._limits.tokens:
            return RequestRefused(
                400, f"a conversation of {max(lengths)} tokens, more than {self._limits.tokens} (--max-tokens)"
            )
        return one

    def _prepared(self, asked: Asked) -> _Encoded:
        if isinstance(asked, ScoreActions):
            return _Encoded(self._model.question(asked.messages, asked.candidates, asked.tools), [])
        encoder = self._scorer.encoder
        if asked.messages is not None:
            encoded = encoder.trajectory(asked.messages, row="messages", tools=asked.tools)
            return _Encoded(None, [encoded.tokens[: encoded.read_positions[-1] + 1]])
        ids = [encoder.rendered(one) if isinstance(one, str) else one for one in asked.inputs]
        vocabulary = self._scorer.config.vocab_size
        for index, one in enumerate(ids):
            if not one or min(one) < 0 or max(one) >= vocabulary:
                raise UserError(f"number {index}: must have tokens, of 0 to {vocabulary - 1}")
        return _Encoded(None, [np.asarray(one, np.int32) for one in ids])

    def _computed(self, requests: Sequence[_Encoded]) -> list[Answer]:
        sequences = [tokens for one in requests for tokens in one.sequences]
        values = iter(self._scorer.engine.score_full(sequences, ["input"] * len(sequences), few=True))
        scores = iter(self._model.answer([one.question for one in requests if one.question]))
        return [
            next(scores)
            if one.question
            else Values([loading.plain(next(values)[-1]) for _ in one.sequences], [len(each) for each in one.sequences])
            for one in requests
        ]

    def _alone(self, one: _Encoded) -> Answer:
        self._scorer.forget()
        try:
            return self._computed([one])[0]
        except Exception:
            logging.getLogger(__name__).exception("a request failed")
            return RequestRefused(500, "internal error; the server's log has more")


def _finite(answer: Answer) -> Answer:
    if isinstance(answer, RequestRefused):
        return answer
    numbers = answer.values if isinstance(answer, Values) else [one.promise for one in answer]
    if np.isfinite(numbers).all():
        return answer
    return RequestRefused(500, "the model's scores are not finite; its weights are broken")


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
        limits: RequestLimits,
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
                raise RequestRefused(503, f"the model is {state}; try again", Retry_After="5")
            if self.unanswered >= self._limits.waiting:
                message = f"{self.unanswered} requests are waiting; try again"
                raise RequestRefused(429, message, Retry_After=self._retry_after())
            self._waiting.append((asked, future))
            self._changed.notify()
        answer = await future
        if isinstance(answer, RequestRefused):
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
        return [RequestRefused(500, "internal error; the server's log has more")] * len(asked)

    def _deliver(self, batch: Sequence[tuple[Any, asyncio.Future]], answers: Sequence[Any]) -> None:
        def give() -> None:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

        with suppress(RuntimeError):  # told to end at once, the loop is closed already
            batch[0][1].get_loop().call_soon_threadsafe(give)
