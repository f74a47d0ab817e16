"""Answers of several clients computed together, and an error of one of them kept to itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from jaxprm.api import ActionScore, Model, Question
from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import Shapes
from jaxprm.scoring import loading
from jaxprm.scoring.scorer import Scorer
from jaxprm.serving.limits import Limits, Refused
from jaxprm.serving.requests import Classify, ScoreActions, Values

# Few, as every shape is compiled before the first answer: a third of those that a search has, for more padding.
SHAPES = Shapes(growth=(256,), packed=(256, 1024), kept=256, lengths=(0, 512, 2048, 8192))

Asked = ScoreActions | Classify
Answer = list[ActionScore] | Values | Refused


class _Encoded(NamedTuple):
    """A request ready to be computed: candidates of a conversation, or whole ones as tokens int32 [T] each."""

    question: Question | None
    sequences: list[np.ndarray]


class Answers:
    """A model that answers requests. To be used by one thread."""

    def __init__(self, scorer: Scorer, model: Model, limits: Limits):
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

    def _encoded(self, asked: Asked) -> _Encoded | Refused:
        try:
            one = self._prepared(asked)
        except (UserError, DataError) as error:
            return Refused(400, str(error))
        except Exception:
            logging.getLogger(__name__).exception("a request could not be encoded")
            return Refused(500, "internal error; the server's log has more")
        lengths = [len(tokens) for tokens in one.sequences] + ([one.question.longest] if one.question else [])
        if max(lengths) > self._limits.tokens:
            return Refused(
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
        values = iter(self._scorer.engine.whole(sequences, ["input"] * len(sequences), few=True))
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
            return Refused(500, "internal error; the server's log has more")


def _finite(answer: Answer) -> Answer:
    if isinstance(answer, Refused):
        return answer
    numbers = answer.values if isinstance(answer, Values) else [one.promise for one in answer]
    if np.isfinite(numbers).all():
        return answer
    return Refused(500, "the model's scores are not finite; its weights are broken")
