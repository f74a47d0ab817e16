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
from jaxprm.serving.requests import INTERNAL_ERROR, Classify, RequestLimits, RequestRefused, ScoreActions, Values

# A third as many as a search has: all are compiled before the first answer, at the price of more padding.
SHAPES = Shapes(growth=(256,), packed=(256, 1024), ring_width=256, lengths=(0, 512, 2048, 8192))
# Weight of the latest batch in the moving average of seconds per request.
_AVERAGE_WEIGHT = 0.2

ScoringRequest = ScoreActions | Classify


class Asked(NamedTuple):
    """A request, and whose caches it uses: 0 for those that all clients share."""

    request: ScoringRequest
    owner: int = 0


Answer = list[ActionScore] | Values | RequestRefused


class Batcher:
    """Collects the requests of all connections and gives them to `answer` in batches, from its own thread.

    Args:
      answer: maps requests to answers, in order; a RequestRefused is an answer too.
      warm_up: called first, with a function that it must call regularly: it raises when the batcher is closed. An
        exception of the warm-up is kept as `error`.
      on_batch: called after each batch with its number of requests and its seconds.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        warm_up: Callable[[Callable[[], None]], None],
        limits: RequestLimits,
        *,
        on_batch: Callable[[int, float], None] = lambda count, seconds: None,
    ):
        self._answer, self._warm_up, self._limits, self._on_batch = answer, warm_up, limits, on_batch
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._computing = 0
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_a_request = 0.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.state = "warming up"
        self.error: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Answers the accepted requests and ends the thread. A warm-up is aborted before its next program."""
        # Notified so that a thread that waits for requests sees that there will be none.
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def unanswered(self) -> int:
        """Requests that were accepted and have no answer yet."""
        return len(self._waiting) + self._computing

    async def __call__(self, request: Any) -> Any:
        """The answer to a request. If it is cancelled before its batch starts, it is not computed.

        Raises RequestRefused if the model is not ready, if too many requests are waiting, or if that is the answer.
        """
        future = asyncio.get_running_loop().create_future()
        # The event loop may wait for this lock: it is held only to move requests, never while the model computes.
        with self._changed:
            if self._closed or self.state != "ready":
                state = "shutting down" if self._closed else self.state
                raise RequestRefused(503, f"the model is {state}; try again", Retry_After="5")
            if self.unanswered >= self._limits.waiting:
                message = f"{self.unanswered} requests are waiting; try again"
                raise RequestRefused(429, message, Retry_After=self._retry_after())
            self._waiting.append((request, future))
            self._changed.notify()
        answer = await future
        if isinstance(answer, RequestRefused):
            raise answer
        return answer

    def _retry_after(self) -> str:
        """Seconds until half of the waiting requests should be answered, 1 to 60."""
        return str(min(60, max(1, math.ceil(self._seconds_a_request * self.unanswered / 2))))

    def _run(self) -> None:
        try:
            self._warm_up(self._check_open)
        except _Closed:
            return
        except Exception as error:
            # The server reports it and ends; see server.run.
            self.error = error
            return
        self.state = "ready"
        while batch := self._next():
            began = time.perf_counter()
            answers = self._answers([request for request, _ in batch])
            # Before delivery: a client that has its answer may send the next request at once, and must find room.
            self._computing = 0
            self._deliver(batch, answers)
            seconds = time.perf_counter() - began
            self._seconds_a_request += _AVERAGE_WEIGHT * (seconds / len(batch) - self._seconds_a_request)
            self._on_batch(len(batch), seconds)

    def _check_open(self) -> None:
        if self._closed:
            raise _Closed

    def _next(self) -> list[tuple[Any, asyncio.Future]]:
        """Waits for requests and returns up to a batch of them; [] if the batcher is closed and all are answered."""
        with self._changed:
            while True:
                batch: list[tuple[Any, asyncio.Future]] = []
                while self._waiting and len(batch) < self._limits.batch:
                    request, future = self._waiting.popleft()
                    if not future.cancelled():
                        batch.append((request, future))
                if batch or self._closed:
                    self._computing = len(batch)
                    return batch
                self._changed.wait()

    def _answers(self, requests: list[Any]) -> Sequence[Any]:
        try:
            answers = self._answer(requests)
            if len(answers) == len(requests):
                return answers
            logging.getLogger(__name__).error("%d answers to %d requests", len(answers), len(requests))
        except Exception:
            # The thread must survive any failure: without it every later request would wait forever.
            logging.getLogger(__name__).exception("a batch failed")
        return [RequestRefused(500, INTERNAL_ERROR)] * len(requests)

    def _deliver(self, batch: Sequence[tuple[Any, asyncio.Future]], answers: Sequence[Any]) -> None:
        def set_results() -> None:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

        # Raised if the loop is closed already, after a second Ctrl-C.
        with suppress(RuntimeError):
            batch[0][1].get_loop().call_soon_threadsafe(set_results)


class _Closed(Exception):
    """Aborts the warm-up of a batcher that is being closed."""


class Answers:
    """Answers batches of requests with a model. For use by one thread.

    add_bos: put the begin-of-text token before inputs that lack it, whatever the request says.
    """

    def __init__(self, scorer: Scorer, model: Model, limits: RequestLimits, *, add_bos: bool = False):
        self._scorer, self._model, self._limits, self._add_bos = scorer, model, limits, add_bos

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, see Scorer.usage."""
        return self._scorer.usage

    def warm_up(self, on_program: Callable[[], None]) -> None:
        """Compiles all that requests need. on_program: called before each program; its exception ends the warm-up."""
        self._scorer.engine.warm_up(self._limits.tokens, on_program)
        self._scorer.engine.warm_up_full(self._limits.tokens, on_program)

    def __call__(self, requests: Sequence[Asked]) -> list[Answer]:
        """The answer to each request, in order: scores, values, or a refusal."""
        answers: dict[int, Answer] = {}
        for owner in dict.fromkeys(asked.owner for asked in requests):
            # Requests of different owners are not computed together: a batch reads the caches of one owner.
            self._scorer.isolate(owner)
            indices = [index for index, asked in enumerate(requests) if asked.owner == owner]
            answers |= zip(indices, self._of_owner([requests[index].request for index in indices]), strict=True)
        return [answers[index] for index in range(len(requests))]

    def _of_owner(self, requests: Sequence[ScoringRequest]) -> list[Answer]:
        encoded = [self._encode_checked(request) for request in requests]
        ready = [request for request in encoded if isinstance(request, _Encoded)]
        try:
            computed = self._compute(ready)
        except Exception:
            # Either one request breaks the batch, or the device failed. Retry each alone, so that only the faulty one
            # fails.
            logging.getLogger(__name__).exception("a batch of %d requests failed; one at a time now", len(ready))
            computed = [self._compute_alone(request) for request in ready]
        answers = map(_checked_finite, computed)
        return [next(answers) if isinstance(request, _Encoded) else request for request in encoded]

    def _encode_checked(self, request: ScoringRequest) -> _Encoded | RequestRefused:
        try:
            encoded = self._encode(request)
        except (UserError, DataError) as error:
            return RequestRefused(400, str(error))
        except Exception:
            logging.getLogger(__name__).exception("a request could not be encoded")
            return RequestRefused(500, INTERNAL_ERROR)
        return encoded

    def _encode(self, request: ScoringRequest) -> _Encoded:
        if isinstance(request, ScoreActions):
            question = self._model.question(request.messages, request.candidates, request.tools)
            # Checked before the batch is computed: there it would fail all requests of the batch.
            if question.longest > self._limits.tokens:
                why = f"its conversation has more than {self._limits.tokens} tokens (--max-tokens)"
                question = question.within(self._limits.tokens, why)
            return _Encoded(question, [], {})
        if request.messages is not None:
            encoded = self._scorer.encoder.trajectory(request.messages, row="messages", tools=request.tools)
            tokens = encoded.tokens[: encoded.read_positions[-1] + 1]
            if len(tokens) > self._limits.tokens:
                raise UserError(self._too_long(len(tokens)))
            return _Encoded(None, [tokens], {})
        sequences: list[np.ndarray | None] = []
        errors: dict[int, str] = {}
        for index, item in enumerate(request.inputs):
            try:
                sequences.append(self._input_tokens(item, request.add_bos or self._add_bos))
            except UserError as error:
                sequences.append(None)
                errors[index] = f"number {index}: {error}"
        return _Encoded(None, sequences, errors)

    def _input_tokens(self, item: str | list[int], add_bos: bool) -> np.ndarray:
        """Token ids of an input of /classify, int32 [T]. Raises UserError for one that cannot be scored."""
        encoder, vocabulary = self._scorer.encoder, self._scorer.config.vocab_size
        ids = encoder.rendered(item) if isinstance(item, str) else item
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise UserError(f"must be token ids from 0 to {vocabulary - 1}, at least one")
        if (bos := encoder.bos_id) is not None:
            if ids[0] != bos and not add_bos:
                raise UserError(
                    f"lacks {encoder.tokenizer.bos_token}, with which the model's chat template begins every "
                    "conversation; send the template's output unchanged, or have it added: add_special_tokens true in "
                    "the request, or serve --add-bos"
                )
            if ids[:2] == [bos, bos]:
                raise UserError(f"begins with {encoder.tokenizer.bos_token} twice; the template writes it once")
            ids = ids if ids[0] == bos else [bos, *ids]
        if len(ids) > self._limits.tokens:
            raise UserError(self._too_long(len(ids)))
        return np.asarray(ids, np.int32)

    def _too_long(self, tokens: int) -> str:
        return f"a conversation of {tokens} tokens, more than {self._limits.tokens} (--max-tokens)"

    def _compute(self, requests: Sequence[_Encoded]) -> list[Answer]:
        sequences = [tokens for request in requests for tokens in request.sequences if tokens is not None]
        values = iter(self._scorer.engine.score_full(sequences, ["input"] * len(sequences), small_batches=True))
        scores = iter(self._model.answer([request.question for request in requests if request.question]))
        answers: list[Answer] = []
        for request in requests:
            if request.question:
                answers.append(next(scores))
            else:
                lengths = [0 if tokens is None else len(tokens) for tokens in request.sequences]
                last = [loading.shortest_float(next(values)[-1]) if length else math.nan for length in lengths]
                answers.append(Values(last, lengths, request.errors))
        return answers

    def _compute_alone(self, request: _Encoded) -> Answer:
        # The failed call may have left the cache in any state.
        self._scorer.forget()
        try:
            return self._compute([request])[0]
        except Exception:
            logging.getLogger(__name__).exception("a request failed")
            return RequestRefused(500, INTERNAL_ERROR)


class _Encoded(NamedTuple):
    """A request ready to compute: candidates of a conversation, or whole conversations as tokens, int32 [T] each.

    A conversation that cannot be scored is None, and its error is in `errors` by its index.
    """

    question: Question | None
    sequences: Sequence[np.ndarray | None]
    errors: dict[int, str]


def _checked_finite(answer: Answer) -> Answer:
    if isinstance(answer, RequestRefused):
        return answer
    if isinstance(answer, Values):
        numbers = [value for index, value in enumerate(answer.values) if index not in answer.errors]
    else:
        numbers = [score.promise for score in answer if score.error is None]
    # JSON has no NaN and no infinity.
    if np.isfinite(numbers).all():
        return answer
    return RequestRefused(500, "the model's scores are not finite; its weights are broken")
