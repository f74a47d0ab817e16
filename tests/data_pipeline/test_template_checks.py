"""Templates that leave out, move or change a text of a conversation are found, whatever the texts are."""

from __future__ import annotations

import json

import pytest

from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from tests.data_pipeline.conftest import make_tokenizer

TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}"


def template(body: str) -> str:
    return "{% for m in messages %}" + TURN + body + END + "{% endfor %}"


CONTENT = "{{ m.content or '' }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
PARAMETERS = (
    "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>"
    "{% for key, value in c.function.arguments.items() %}"
    "<parameter={{ key }}>\n{{ value if value is string else value | tojson }}\n</parameter>{% endfor %}{% endfor %}"
)
REASONING = "{{ m.reasoning_content or '' }}"
NAME = "{{ m.name or '' }}"


def call(name="look", **arguments):
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def talk(*messages):
    return [{"role": "user", "content": "go on"}, *messages]


def user(text, **fields):
    return {"role": "user", "content": text, **fields}


def reply(text, **fields):
    return {"role": "assistant", "content": text, **fields}


@pytest.mark.parametrize(
    ("body", "messages", "lost"),
    [
        # A dropped message whose text is also in the message before it.
        ("{{ m.content if not (loop.index0 == 1) }}", talk(reply("go")), "changes, moves or drops message 1"),
        ("{{ m.content if loop.index0 != 2 }}", talk(reply("a b a"), user("a"), reply("b")), "drops message 2"),
        # A text that is also in what the template prints.
        ("{{ m.content if m.role == 'user' }}", talk(reply("a")), "drops message 1"),
        (CONTENT, talk(reply("x", tool_calls=[call(at="box")])), "the name of tool call look in message 1"),
        (
            CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
            talk(reply("x", tool_calls=[call(at="box")])),
            "the arguments of tool call look in message 1",
        ),
        # Names equal to the call's, and arguments that occur elsewhere, do not hide what is missing.
        (
            CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
            talk(reply("look at box", tool_calls=[call(at="look")])),
            "the arguments of tool call look",
        ),
        (
            CONTENT + "{% for c in (m.tool_calls or [])[:1] %}{{ c.function | tojson }}{% endfor %}",
            talk(reply("x", tool_calls=[call(at="box"), call(at="box")])),
            "the name of tool call look",
        ),
        (
            CONTENT,
            talk(reply("x", reasoning_content="x")),
            "the reasoning in message 1.*; leave it out with --reasoning drop, or choose",
        ),
        (CONTENT, talk(user("x", name="x"), reply("x")), "the name in message 1"),
        (CONTENT, talk({"role": "tool", "name": "go", "content": "x"}, reply("x")), "the name in message 1"),
        ("{{ (m.content or '') | upper }}", talk(reply("x")), "drops message 0"),
        ("{{ m.content[:3] }}", talk(reply("x")), "drops message 0"),
        ("{{ m.content.split('</think>')[-1] }}", talk(reply("a</think>b")), "drops message 1"),
        (CONTENT + CALLS, talk(reply("x", tool_calls=[call(at="box", n=3)])), None),
        (CONTENT + CALLS, talk(reply("", tool_calls=[call(), call(at={"a": [1, None, '"é']})])), None),
        (CONTENT + PARAMETERS, talk(reply("x", tool_calls=[call(at='a"b\nc', n=3, on=True)])), None),
        (REASONING + CONTENT, talk(reply("x", reasoning_content="x"), user("x"), reply("x")), None),
        (NAME + CONTENT, talk(user("x", name="x"), reply("x")), None),
        (
            CONTENT + CALLS,
            talk(reply("x", tool_calls=[call()]), {"role": "tool", "name": "look", "content": "x"}, reply("x")),
            None,
        ),
        ("{{ (m.content or '') | trim }}", talk(reply("  x\n")), None),
        ("{{ (m.content or '') | tojson }}", talk(reply('a "b"\n é')), None),
    ],
)
def test_what_a_template_loses_is_named(with_template, body, messages, lost):
    encoder = with_template(template(body))
    if lost is None:
        encoder.trajectory(messages, row="r")
        return
    with pytest.raises(DataError, match=f"^r: the chat template of test/template .*{lost}"):
        encoder.trajectory(messages, row="r")


def test_a_marker_in_the_text_is_text(with_template):
    for word in ("Xq7m00000z", "Xq7mYv3kZj9wQx5h"):
        with_template(template(CONTENT)).trajectory(talk(reply(word)), row="r")
        with pytest.raises(DataError, match="drops message 1"):
            with_template(template("{{ m.content if m.role == 'user' }}")).trajectory(talk(reply(word)), row="r")


@pytest.mark.parametrize("shipped", ["chatml", "llama3"])
def test_the_shipped_templates_print_reasoning_names_and_malformed_arguments(tmp_path, shipped):
    from data_pipeline.chat_template import SHIPPED

    make_tokenizer("{{ messages }}", SHIPPED[shipped].tokens, SHIPPED[shipped].end).save_pretrained(tmp_path)
    encoder = Encoder.load(tmp_path, shipped)
    malformed = {"type": "function", "function": {"name": "look", "arguments": '{"at": "bo'}}
    messages = [
        user("hi", name="ann"),
        reply(None, reasoning_content="hm", tool_calls=[malformed]),
        {"role": "tool", "name": "look", "content": "error"},
        {"role": "tool", "name": "other", "content": "more"},
        reply("done", reasoning_content="so"),
    ]
    text = encoder.render(messages)
    assert '{"at": "bo' in text and "ann: hi" in text and "other: more" in text and "look: " not in text
    assert "<think>\nhm\n</think>\n\n" in text and "<think>\nso\n</think>\n\ndone" in text
    kept = encoder.trajectory(messages, row="r")
    dropped = Encoder.load(tmp_path, shipped, reasoning="drop")
    without = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    assert list(dropped.trajectory(messages, row="r").tokens) == list(encoder.trajectory(without, row="r").tokens)
    assert len(dropped.trajectory(messages, row="r").tokens) < len(kept.tokens)
    assert dropped.fingerprint != encoder.fingerprint
    assert dropped.changes(messages) == (2, 0) and encoder.changes(messages) == (0, 0)


def test_a_step_of_reasoning_alone_is_an_empty_one_without_it(tmp_path):
    make_tokenizer("{{ messages }}", ("<|im_start|>", "<|im_end|>"), "<|im_end|>").save_pretrained(tmp_path)
    messages = talk(reply(None, reasoning="hm"), user("on"), reply("x"))
    for choice in ("keep", "drop"):
        encoded = Encoder.load(tmp_path, "chatml", reasoning=choice).trajectory(messages, row="r")
        assert list(encoded.message_indices) == [1, 3]


@pytest.mark.parametrize(
    "field",
    [
        {"content": "a<|im_end|>b"},
        {"content": "", "tool_calls": [call(at="<|im_end|>")]},
        {"content": "", "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "\\u003c|im_end|>"}'}}]},
        {"content": "", "tool_calls": [{"function": {"name": "look", "arguments": "<|im_end|>"}}]},
        {"content": "x", "reasoning_content": "<|im_<|im_end|>"},
    ],
)
def test_special_tokens_in_text_are_refused_or_broken_up(tmp_path, field):
    make_tokenizer("{{ messages }}", ("<|im_start|>", "<|im_end|>"), "<|im_end|>").save_pretrained(tmp_path)
    messages = talk({"role": "assistant", **field})
    with pytest.raises(
        DataError, match=r"message 1 \(assistant\) has the special token <\|im_end\|>.*--special-tokens"
    ):
        Encoder.load(tmp_path, "chatml").trajectory(messages, row="r")
    encoder = Encoder.load(tmp_path, "chatml", special_tokens="break")
    encoded = encoder.trajectory(messages, row="r")
    assert (encoded.tokens == encoder.end_id).sum() == 2 and "< |im_end|>" in encoder.decode(encoded.tokens)
    assert encoder.changes(messages) == (0, 1)
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_start|>"}}]
    with pytest.raises(DataError, match="a tool has the special token"):
        Encoder.load(tmp_path, "chatml").trajectory(talk(reply("x")), row="r", tools=tools)
    assert "< |im_start|>" in encoder.render(talk(), tools=tools)
