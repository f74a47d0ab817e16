"""Requests and responses of vLLM's and SGLang's shapes, from their documentation and source."""

import msgspec
import pytest

from jaxprm.api import ActionScore
from jaxprm.serving import requests
from jaxprm.serving.requests import Classify, RequestLimits, RequestRefused, Values

LIMITS = RequestLimits(candidates=3)
CHAT = [{"role": "user", "content": "Goal"}, {"role": "assistant", "content": "get"}]


def test_actions_are_scored_in_the_order_of_the_candidates():
    asked = requests.parse_score_actions({"messages": CHAT[:1], "candidates": ["a", CHAT[1]], "tools": [{}]}, LIMITS)
    assert (asked.messages, asked.candidates, asked.tools) == (CHAT[:1], ["a", CHAT[1]], [{}])
    response = requests.score_actions_response([ActionScore(0.5, None), ActionScore(0.25, -0.125)], "m")
    assert response == {
        "model": "m",
        "scores": [{"promise": 0.5, "progress": None}, {"promise": 0.25, "progress": -0.125}],
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "Expected `object`"),
        ({"messages": CHAT}, "missing required field `candidates`"),
        ({"messages": CHAT, "candidates": "a"}, "candidates"),
        ({"messages": CHAT, "candidates": [1]}, "candidates"),
        ({"messages": CHAT, "candidates": []}, "candidates: 0 of them, must be 1 to 3"),
        ({"messages": CHAT, "candidates": ["a"] * 4}, "candidates: 4 of them, must be 1 to 3"),
        ({"messages": CHAT, "candidates": ["a"], "candidate": "b"}, "unknown field `candidate`"),
        ({"messages": ["hello"], "candidates": ["a"]}, "messages"),
    ],
)
def test_other_shapes_of_actions_are_refused(value, words):
    with pytest.raises(RequestRefused, match=words) as caught:
        requests.parse_score_actions(value, LIMITS)
    assert caught.value.status == 400


@pytest.mark.parametrize(("name", "form"), [("input", "vllm"), ("text", "sglang"), ("input_ids", "sglang")])
@pytest.mark.parametrize(
    ("value", "inputs", "is_single"),
    [
        ("ab", ["ab"], True),
        (["ab"], ["ab"], False),
        ([1, 2], [[1, 2]], True),
        ([[1, 2], [3]], [[1, 2], [3]], False),
    ],
)
def test_texts_and_token_ids_are_accepted_alone_and_in_lists(name, form, value, inputs, is_single):
    asked = requests.parse_classify(
        {"model": "m", name: value, "user": "me", "rid": "1", "use_activation": True}, LIMITS
    )
    assert (asked.form, asked.inputs, asked.messages, asked.is_single) == (form, inputs, None, is_single)


def test_messages_are_vllms_chat_form():
    asked = requests.parse_classify({"messages": CHAT, "add_generation_prompt": False, "text": None}, LIMITS)
    assert (asked.form, asked.messages, asked.inputs) == ("vllm", CHAT, [])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "give one of input, messages, text, input_ids, got none"),
        ({"input": "a", "text": "b"}, "got input and text"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens is not supported"),
        ({"input": "a", "add_special_tokens": "yes"}, "add_special_tokens: must be true or false"),
        ({"messages": CHAT, "chat_template": "{{ x }}"}, "chat_template is not supported"),
        ({"messages": CHAT, "add_generation_prompt": True}, "add_generation_prompt is not supported"),
        ({"messages": CHAT[:1]}, "the last one must be the assistant's"),
        ({"messages": [CHAT[0], CHAT[1] | {"step": False}]}, "the last one must be the assistant's"),
        ({"messages": []}, "the last one must be the assistant's"),
        ({"messages": {"role": "user"}}, "messages: Expected `array`"),
        ({"messages": CHAT, "tools": "x"}, "tools"),
        ({"input": []}, "number 0 is empty"),
        ({"input": ""}, "number 0 is empty"),
        ({"input": [[], [1]]}, "number 0 is empty"),
        ({"input": [1, "a"]}, "number 0 is neither"),
        ({"input": ["a", [1]]}, "number 1 is neither"),
        ({"input": [[1], [True]]}, "number 1 is neither"),
        ({"input": [1.5]}, "number 0 is neither"),
        ({"input": 7}, "must be a text"),
        ({"input": {"text": "a"}}, "must be a text"),
        ({"text": [["question", "answer"]]}, "number 0 is neither"),
        ({"input": ["a"] * 4}, "input: 4 of them"),
        ("a", "Expected `object`"),
    ],
)
def test_options_that_would_change_the_answer_are_refused(value, words):
    with pytest.raises(RequestRefused, match=words) as caught:
        requests.parse_classify(value, LIMITS)
    assert caught.value.status == 400


def test_vllms_answer():
    asked = requests.parse_classify({"input": ["ab", "c"]}, LIMITS)
    response = requests.classify_response(asked, Values([0.5, 0.25], [2, 1]), "m", 0.1)
    assert response.pop("id").startswith("classify-") and response.pop("created") > 1.7e9
    assert response == {
        "object": "list",
        "model": "m",
        "data": [
            {"index": 0, "label": "LABEL_0", "probs": [0.5], "num_classes": 1},
            {"index": 1, "label": "LABEL_0", "probs": [0.25], "num_classes": 1},
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0, "prompt_tokens_details": None},
    }


def test_sglangs_answer_is_an_object_or_a_list_as_asked():
    for value, several in (("ab", False), (["ab"], True)):
        response = requests.classify_response(
            requests.parse_classify({"text": value}, LIMITS), Values([0.5], [2]), "m", 0.1
        )
        (item,) = response if several else [response]
        assert item["embedding"] == [0.5]
        assert {"id", "prompt_tokens", "e2e_latency"} <= item["meta_info"].keys()
        assert item["meta_info"]["prompt_tokens"] == 2


def test_a_candidate_without_a_score_has_nulls_and_its_error():
    scores = [ActionScore(0.5, None), ActionScore.failed("candidate 1: a byte")]
    response = requests.score_actions_response(scores, "m")
    assert response["scores"] == [
        {"promise": 0.5, "progress": None},
        {"promise": None, "progress": None, "error": "candidate 1: a byte"},
    ]
    msgspec.json.encode(response)
    with pytest.raises(RequestRefused, match="candidate 1: a byte") as refused:
        requests.score_actions_response(scores[1:], "m")
    assert refused.value.status == 400


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_an_input_without_a_value_has_none_and_its_error(form):
    request = Classify(form, [[1], [2]], None, None, False)
    answer = Values([0.5, float("nan")], [1, 0], {1: "number 1: a byte"})
    response = requests.classify_response(request, answer, "m", 0.1)
    items = response["data"] if form == "vllm" else response
    value = "probs" if form == "vllm" else "embedding"
    assert [item[value] for item in items] == [[0.5], []]
    assert [item.get("error") for item in items] == [None, "number 1: a byte"]
    with pytest.raises(RequestRefused, match="number 1: a byte"):
        requests.classify_response(request, Values([float("nan")], [0], {0: "number 1: a byte"}), "m", 0.1)
