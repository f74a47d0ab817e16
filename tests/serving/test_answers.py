"""An error of one request does not affect the requests that are computed with it."""

from types import SimpleNamespace

import numpy as np

from jaxprm.api import ActionScore
from jaxprm.errors import UserError
from jaxprm.serving.batcher import Answers, Asked
from jaxprm.serving.requests import Classify, RequestLimits, ScoreActions, Values


class Stub:
    """Scorer and model in one. Values are tokens, promises are lengths; token 13 raises, token 14 gives NaN."""

    config, encoder, usage = SimpleNamespace(vocab_size=100), None, {}

    def __init__(self):
        self.engine, self.calls, self.forgotten, self.owners = self, [], 0, []

    def score_full(self, sequences, names, small_batches):
        self.calls.append(len(sequences))
        if any(13 in tokens for tokens in sequences):
            raise RuntimeError("broken")
        return [tokens.astype(np.float32) if tokens[-1] != 14 else np.asarray([np.nan]) for tokens in sequences]

    def question(self, messages, candidates, tools):
        if not messages:
            raise UserError("messages: is empty")
        return SimpleNamespace(longest=len(candidates), candidates=candidates)

    def answer(self, questions):
        return [
            [ActionScore(float(len(candidate)), None) for candidate in question.candidates] for question in questions
        ]

    def forget(self):
        self.forgotten += 1

    def isolate(self, owner):
        self.owners.append(owner)


def ids(*tokens: int) -> Classify:
    return Classify("vllm", [list(tokens)], None, None, True)


def actions(*candidates: str, messages=({"role": "user", "content": "x"},)) -> ScoreActions:
    return ScoreActions(messages=list(messages), candidates=list(candidates))


def answered(*asked):
    stub = Stub()
    requests = [request if isinstance(request, Asked) else Asked(request) for request in asked]
    return Answers(stub, stub, RequestLimits(tokens=3))(requests), stub


def test_all_is_computed_at_once_and_in_order():
    answers, stub = answered(ids(1, 2), actions("abc", "a"), ids(7))
    assert answers == [Values([2.0], [2]), [ActionScore(3.0, None), ActionScore(1.0, None)], Values([7.0], [1])]
    assert stub.calls == [2] and stub.forgotten == 0


def test_what_cannot_be_encoded_or_is_too_long_is_refused_before_the_batch():
    asked = (actions("a", messages=()), ids(100), ids(-1), ids(1, 2, 3, 4), actions("a", "b", "c", "d"), ids(5))
    answers, stub = answered(*asked)
    assert [answer.status for answer in answers[:-1]] == [400] * 5 and answers[-1] == Values([5.0], [1])
    assert "4 tokens, more than 3 (--max-tokens)" in answers[3].message and stub.calls == [1]


def test_one_that_breaks_the_batch_fails_alone():
    answers, stub = answered(ids(1), ids(13), actions("ab"), ids(2))
    assert (answers[0], answers[2], answers[3]) == (Values([1.0], [1]), [ActionScore(2.0, None)], Values([2.0], [1]))
    assert answers[1].status == 500 and "broken" not in answers[1].message
    assert stub.forgotten == 4


def test_a_score_that_is_no_number_is_an_error():
    answers, _ = answered(ids(14), ids(2))
    assert answers[0].status == 500 and "not finite" in answers[0].message and answers[1] == Values([2.0], [1])


def test_owners_are_computed_apart_and_answered_in_order():
    asked = [Asked(ids(1), 5), Asked(ids(2), 9), Asked(ids(3), 5), Asked(ids(13), 9)]
    answers, stub = answered(*asked)
    assert answers[:3] == [Values([1.0], [1]), Values([2.0], [1]), Values([3.0], [1])] and answers[3].status == 500
    assert stub.owners == [5, 9] and stub.calls[:2] == [2, 2]
