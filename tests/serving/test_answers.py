"""An error of one request does not affect the requests that are computed with it."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data_pipeline.encode import Encoder
from jaxprm.api import ActionScore
from jaxprm.errors import UserError
from jaxprm.serving.batcher import Answers, Asked
from jaxprm.serving.requests import Classify, RequestLimits, ScoreActions, Values
from tests.model import tiny


class Question(NamedTuple):
    """Stands for a conversation of as many tokens as it has candidates."""

    candidates: list[str]
    error: str | None = None

    @property
    def longest(self) -> int:
        return len(self.candidates)

    def within(self, limit: int, why: str):
        return self._replace(error=why)


class Stub:
    """Scorer and model in one. Values are tokens, promises are lengths; token 13 raises, token 14 gives NaN."""

    config, encoder, usage = SimpleNamespace(vocab_size=100), SimpleNamespace(bos_id=None), {}

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
        return Question(candidates)

    def answer(self, questions):
        return [
            [
                ActionScore.failed(question.error) if question.error else ActionScore(float(len(candidate)), None)
                for candidate in question.candidates
            ]
            for question in questions
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
    assert answers[0].status == 400 and answers[-1] == Values([5.0], [1])
    for answer in answers[1:4]:
        assert np.isnan(answer.values).all() and answer.tokens == [0] and list(answer.errors) == [0]
    assert "0 to 99" in answers[1].errors[0] and "4 tokens, more than 3 (--max-tokens)" in answers[3].errors[0]
    assert all("more than 3 tokens" in score.error for score in answers[4]) and stub.calls == [1]


def test_one_bad_input_of_a_request_has_an_error_and_the_others_values():
    answers, _ = answered(Classify("vllm", [[1], [100], [2]], None, None, False))
    assert answers[0].values[::2] == [1.0, 2.0] and answers[0].tokens == [1, 0, 1]
    assert list(answers[0].errors) == [1] and answers[0].errors[1].startswith("number 1: ")


BOS = SimpleNamespace(bos_id=7, tokenizer=SimpleNamespace(bos_token="<bos>"), rendered=lambda text: [int(text)])


@pytest.mark.parametrize(
    ("tokens", "words"), [([5], "lacks <bos>, .*--add-bos"), ([7, 7, 5], "begins with <bos> twice")]
)
def test_inputs_begin_with_the_token_that_the_template_writes_first(monkeypatch, tokens, words):
    monkeypatch.setattr(Stub, "encoder", BOS)
    answers, _ = answered(ids(7, 5), ids(*tokens), Classify("vllm", ["5"], None, None, True))
    assert answers[0] == Values([5.0], [2])
    assert re.search(words, answers[1].errors[0])
    assert "lacks <bos>" in answers[2].errors[0]


@pytest.mark.parametrize("by_server", [True, False])
def test_a_missing_first_token_is_added_on_request(monkeypatch, by_server):
    monkeypatch.setattr(Stub, "encoder", BOS)
    stub, request = Stub(), Classify("vllm", ["5", "7"], None, None, False, add_bos=not by_server)
    (answer,) = Answers(stub, stub, RequestLimits(tokens=3), add_bos=by_server)([Asked(request)])
    assert answer == Values([5.0, 7.0], [2, 1])


def test_one_that_breaks_the_batch_fails_alone():
    answers, stub = answered(ids(1), ids(13), actions("ab"), ids(2))
    assert (answers[0], answers[2], answers[3]) == (Values([1.0], [1]), [ActionScore(2.0, None)], Values([2.0], [1]))
    assert answers[1].status == 500 and "broken" not in answers[1].message
    assert stub.forgotten == 4


def test_a_score_that_is_no_number_is_an_error():
    answers, _ = answered(ids(14), ids(2))
    assert answers[0].status == 500 and "not finite" in answers[0].message and answers[1] == Values([2.0], [1])


def test_the_token_that_the_template_writes_first_is_found_in_its_rendering():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.tokenizer_directory())
    assert Encoder(tokenizer).bos_id is None
    tokenizer.bos_token = tokenizer.pad_token
    assert Encoder(tokenizer).bos_id is None
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encoder = Encoder(tokenizer)
    assert encoder.bos_id == tokenizer.pad_token_id
    assert encoder.rendered(encoder.render([{"role": "user", "content": "x"}]))[0] == encoder.bos_id


def test_owners_are_computed_apart_and_answered_in_order():
    asked = [Asked(ids(1), 5), Asked(ids(2), 9), Asked(ids(3), 5), Asked(ids(13), 9)]
    answers, stub = answered(*asked)
    assert answers[:3] == [Values([1.0], [1]), Values([2.0], [1]), Values([3.0], [1])] and answers[3].status == 500
    assert stub.owners == [5, 9] and stub.calls[:2] == [2, 2]
