"""Rows of each format to messages, by hand; what cannot be kept is counted or refused by name."""

import json
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.importers import openai, sharegpt, trl
from data_pipeline.importers.fields import Path
from data_pipeline.importers.reader import Context

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "door"}'}}
GO = {"role": "user", "content": "go"}


def chat(*messages, notes=None, **fields):
    notes = Counter() if notes is None else notes
    return openai.parse({"messages": list(messages), **fields}, Context(Path.parse("messages"), notes))[0]


def turns(*conversation, parse=sharegpt.parse, notes=None, **fields):
    row = {
        "conversations": [
            turn if isinstance(turn, dict) else dict(zip(("from", "value", "loss"), turn, strict=False))
            for turn in conversation
        ],
        **fields,
    }
    return parse(row, Context(Path.parse("conversations"), Counter() if notes is None else notes))[0]


def steps(prompt="What is 1 + 2?", notes=None, **fields):
    row = {"prompt": prompt, "completions": ["one", "two"], "labels": [True, False], **fields}
    return trl.parse(row, Context(Path.parse("prompt"), Counter() if notes is None else notes))[0]


def refused(parse, *arguments, **fields):
    with pytest.raises(DataError) as error:
        parse(*arguments, **fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


def test_tool_calls_and_their_results_are_kept_unchanged():
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "a key", "tool_call_id": "c1", "name": "look"}
    last = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    parsed = chat(GO, called, result, last, tools=tools)
    assert parsed.messages == [GO, called, result, last]
    assert parsed.fields == {"tools": tools} and parsed.used == {"messages", "tools"}
    assert (
        chat(GO, tools=json.dumps(tools)).fields
        == chat(GO, functions=[tools[0]["function"]]).fields
        == {"tools": tools}
    )
    assert chat(GO, tools=[]).fields == chat(GO, tools=None).fields == {}


def test_older_names_and_other_roles_are_translated():
    old = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": ""}}
    parsed = chat(
        {"role": "developer", "content": "rules"}, GO, old, {"role": "function", "name": "look", "content": "x"}
    )
    assert [message["role"] for message in parsed.messages] == ["system", "user", "assistant", "tool"]
    assert parsed.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": ""}}]


def test_an_assistant_message_in_parts_is_one_step():
    parts = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"type": "text", "text": ""}]
    notes = Counter()
    assert chat(GO, {"role": "assistant", "content": parts}, notes=notes).messages[1]["content"] == "ab"
    assert notes == {"messages in several parts, joined to one text": 1}


def test_messages_that_are_not_trained_on_are_no_steps():
    marks = [{"weight": 0}, {"weight": 1}, {"step": False}, {"step": True}, {}]
    parsed = chat(GO, *({"role": "assistant", "content": "x", **mark} for mark in marks))
    assert [message.get("step", True) for message in parsed.messages[1:]] == [False, True, False, True, True]


def test_other_fields_are_kept_in_meta_and_counted_unless_empty():
    notes = Counter()
    extra = {"refusal": None, "audio": None, "annotations": [], "reasoning_content": "hm", "logprobs": {"a": 1}}
    parsed = chat(GO, {"role": "assistant", "content": "x", **extra}, {"role": "tool", "content": None}, notes=notes)
    reply = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    assert parsed.messages[1:] == [reply, {"role": "tool", "content": ""}]
    assert parsed.meta == {"message_fields": {"1": {"logprobs": {"a": 1}}}}
    assert notes == {
        "messages with reasoning, kept": 1,
        "message field `logprobs`, kept in meta": 1,
        "tool results without content, taken as empty": 1,
    }


def test_the_number_of_notes_is_bounded():
    notes = Counter()
    for number in range(500):
        chat({**GO, f"field {number}": 1}, notes=notes)
    assert len(notes) <= 101 and sum(notes.values()) == 500


def with_call(**function):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", **function}}]}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", "message 1 is a text, not an object"),
        ({"role": "robot", "content": "x"}, "message 1: role 'robot' is none of"),
        ({"role": ["user"], "content": "x"}, "message 1: role ['user'] is none of"),
        ({"from": "human", "value": "x"}, "message 1: role is missing"),
        ({"role": "user", "content": None}, "message 1 (user) has neither content nor tool_calls"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "it has a refusal"),
        ({"role": "user", "content": 3}, "content is a number"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content part 0 is 'image_url'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
            "part 1 is 'input_audio'",
        ),
        ({"role": "user", "content": [3]}, "content part 0 is 'a number'"),
        ({"role": "user", "content": [{"type": "text"}]}, "content part 0 has no text"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "message 1 (assistant) has `audio`"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only an assistant calls tools"),
        (
            {"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "f"}},
            "both tool_calls and function_call",
        ),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "tool_calls is an object, not a list"),
        (
            {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]},
            "tool call 0: the function's name is null",
        ),
        ({"role": "assistant", "tool_calls": [CALL, 7]}, "tool call 1 is a number, not an object"),
        (with_call(name=""), "the function's name is empty"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight is 0.5"),
        ({"role": "assistant", "content": "x", "step": "no"}, "step is 'no'"),
    ],
)
def test_a_message_that_cannot_be_kept_is_refused_by_name(message, reason):
    assert reason in refused(chat, GO, message)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"a": ', '{"a": '), ("[1]", "[1]"), (3, "3"), ("", ""), ({"a": 1}, '{"a":1}'), (None, "{}")],
)
def test_arguments_are_kept_as_the_text_they_are(arguments, text):
    (_, reply) = chat(GO, with_call(arguments=arguments)).messages
    assert reply["tool_calls"][0]["function"] == {"name": "f", "arguments": text}


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "1", "type": "custom", "custom": {"name": "f", "input": '{"a":1}'}},
        {"id": "1", "name": "f", "args": {"a": 1}, "type": "tool_call"},
        {"id": "1", "function": "f", "arguments": {"a": 1}, "type": "function"},
        {"id": "1", "name": "f", "arguments": '{"a":1}'},
        {"tool_call_id": "1", "function_name": "f", "arguments": {"a": 1}},
    ],
)
def test_calls_of_every_api_are_one_form(call):
    (_, reply) = chat(GO, {"role": "assistant", "content": None, "tool_calls": [call]}).messages
    assert reply["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": []}, "messages is empty"),
        ({"messages": {"a": 1}}, "messages is an object, not a list"),
        ({"messages": "hello"}, "messages are not JSON"),
        ({"messages": [GO], "tools": "x"}, "tools are not JSON"),
        ({"messages": [GO], "tools": [1]}, "tools[0] is a number"),
        ({"messages": [GO], "tools": {"a": 1}}, "tools is an object, not a list"),
    ],
)
def test_a_row_without_a_conversation_is_refused(fields, reason):
    assert reason in refused(openai.parse, fields, Context(Path.parse("messages"), Counter()))


def test_sharegpt_turns_become_messages():
    call = json.dumps({"name": "look", "arguments": {"at": "door"}})
    parsed = turns(
        ("human", "go"),
        ("function_call", call),
        ("observation", "a key"),
        ("gpt", "done"),
        system="rules",
        tools='[{"name": "look"}]',
    )
    assert [(message["role"], message["content"]) for message in parsed.messages] == [
        ("system", "rules"),
        ("user", "go"),
        ("assistant", None),
        ("tool", "a key"),
        ("assistant", "done"),
    ]
    function = parsed.messages[2]["tool_calls"][0]["function"]
    assert function["name"] == "look" and json.loads(function["arguments"]) == {"at": "door"}
    assert parsed.fields == {"tools": [{"type": "function", "function": {"name": "look"}}]} and "system" in parsed.used
    two = turns(("human", "go"), ("function_call", json.dumps([json.loads(call)] * 2))).messages[1]
    assert len(two["tool_calls"]) == 2


def test_agentgym_turns_without_loss_are_no_steps_and_the_item_names_the_task():
    conversation = [("human", "rules", None), ("gpt", "OK", False), ("human", "room", None), ("gpt", "go", True)]
    parsed = turns(*conversation, parse=sharegpt.parse_agentgym, item_id="webshop_123")
    assert [message.get("step", True) for message in parsed.messages] == [True, False, True, True]
    assert parsed.fields == {"environment": "webshop", "task": "webshop/123", "id": "webshop/123"}
    assert "item_id" not in parsed.used  # it stays in meta
    other = turns(*conversation, parse=sharegpt.parse_agentgym, item_id="pick_and_place-Mug-308")
    assert other.fields == {"task": "pick_and_place-Mug-308", "id": "pick_and_place-Mug-308"}
    many = turns(*conversation, parse=sharegpt.parse_agentgym, item_id="lmrlgym_maze_7")
    assert many.fields["environment"] == "lmrlgym_maze" and many.fields["task"] == "lmrlgym_maze/7"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (7 * [1], "turn 1 is a list"),
        ({"from": "alien", "value": "x"}, "turn 1: from 'alien' is none of"),
        ({"role": "user", "content": "x"}, "use --format openai"),
        ({"from": "gpt", "value": None}, "turn 1 (gpt): value is null"),
        ({"from": "gpt", "value": "x", "loss": "yes"}, "loss is 'yes'"),
        ({"from": "function_call", "value": "look()"}, "turn 1 (function_call): the calls are not JSON"),
        ({"from": "function_call", "value": "[3]"}, "call 0 is a number"),
    ],
)
def test_a_turn_that_cannot_be_read_is_refused_by_name(turn, reason):
    row = {"conversations": [{"from": "human", "value": "go"}, turn]}
    assert reason in refused(sharegpt.parse, row, Context(Path.parse("conversations"), Counter()))


def test_two_system_messages_are_refused():
    assert "keep one" in refused(turns, ("system", "a"), ("human", "go"), system="b")


def test_every_completion_is_a_part_that_ends_with_a_newline_and_labels_stay_soft():
    parsed = steps(completions=["one", "\n\ntwo\n", "three"], labels=[0.7, None, True])
    prompt, answer = parsed.messages
    assert prompt == {"role": "user", "content": "What is 1 + 2?"}
    assert [part["text"] for part in answer["content"]] == ["one\n\n", "two\n", "three\n"]
    assert parsed.fields["step_labels"] == [0.7, None, 1.0]
    assert all(type(label) is not bool for label in parsed.fields["step_labels"])


def test_a_prompt_of_messages_and_completions_as_messages_are_the_same():
    answer = [{"role": "assistant", "content": "one"}, [{"role": "assistant", "content": "two"}]]
    prompt = [{"role": "system", "content": "rules"}, GO]
    parsed = steps(prompt, completions=answer)
    assert parsed.messages[:2] == prompt and parsed.messages[2] == steps().messages[1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"completions": "x"}, "completions is a text, not a list"),
        ({"completions": []}, "completions is empty"),
        ({"completions": ["a", 3]}, "completions[1] is a number"),
        ({"completions": ["a", "\n"]}, "completions[1] has no text"),
        ({"labels": None}, "labels is missing"),
        ({"labels": [True]}, "labels has 1 values, completions 2"),
        ({"labels": ["+", "-"]}, "labels[0] is a text"),
        ({"labels": [True, float("nan")]}, "labels[1] = NaN"),
        ({"labels": [10**400, 1]}, "labels[0] = a number beyond"),
    ],
)
def test_stepwise_rows_that_do_not_fit_are_refused(fields, reason):
    assert reason in refused(steps, **fields)


texts = st.text(min_size=1, max_size=15).filter(str.strip)


@given(st.lists(texts, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_text_of_the_steps_is_that_of_the_completions_but_for_newlines(completions):
    parsed = steps(completions=completions, labels=[0.5] * len(completions))
    parts = [part["text"] for part in parsed.messages[1]["content"]]
    assert len(parts) == len(completions) and all(part.endswith("\n") for part in parts)
    for part, completion in zip(parts, completions, strict=True):
        assert completion.strip("\r\n") in part


arguments = st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4), max_size=2)


@given(st.lists(st.tuples(st.text(max_size=9), arguments, st.text(max_size=9)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_sharegpt_and_openai_rows_of_a_conversation_give_equal_messages(rounds):
    """Both formats are written by hand from the same conversation."""
    ours, theirs = [GO], [("human", "go")]
    for number, (text, values, result) in enumerate(rounds):
        call = {
            "type": "function",
            "function": {"name": f"f{number}", "arguments": msgspec.json.encode(values).decode()},
        }
        ours += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "on"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": result},
        ]
        theirs += [
            ("gpt", text),
            ("human", "on"),
            ("function_call", json.dumps({"name": f"f{number}", "arguments": values})),
            ("observation", result),
        ]
    assert chat(*ours).messages == turns(*theirs).messages == ours
