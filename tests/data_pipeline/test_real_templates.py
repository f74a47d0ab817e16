"""Chat templates like those of well-known models: they keep a trajectory, or an error says how to choose another."""

import pytest

from data_pipeline.errors import DataError

CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "door"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
TALK = [
    {"role": "user", "content": "open it"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nlook first"},
    {"role": "user", "content": "a door"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nopen"},
]
CALLING = [
    {"role": "user", "content": "open it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "a door", "tool_call_id": "c"},
    {"role": "tool", "content": "a key", "tool_call_id": "c"},
    {"role": "assistant", "content": "open"},
]
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
REPLY = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# As Qwen3's: thoughts of earlier turns are dropped.
DROPS_THOUGHTS = (
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}" + REPLY
)
# As Qwen2.5's: consecutive tool results are printed as a single user turn.
MERGES_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}{% for c in m.tool_calls %}"
    "{{ '\n<tool_call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + REPLY
)
# As Gemma's and older Mistral's: no system role, and roles must alternate.
IN_TURNS = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    + TURN
    + "{% endfor %}"
    + REPLY
)
# As Llama 2's: messages of an unknown role are silently left out.
NO_TOOLS = "{% for m in messages %}{% if m.role != 'tool' %}" + TURN + "{% endif %}{% endfor %}" + REPLY
PRINTS_DATE = (
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}{% for m in messages %}"
    + TURN
    + "{% endfor %}"
)
# As Llama 3.2's: today's date unless one is passed.
DATE_UNLESS_GIVEN = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday: ' + date_string + '<|im_end|>\n' }}{% for m in messages %}"
    + TURN
    + "{% endfor %}"
    + REPLY
)
BROKEN = "{% for m in messages %}{{ m.content[0].text + 1 }}{% endfor %}"


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        (DROPS_THOUGHTS, TALK, None, r"changes, moves or drops message 1 \(assistant: '<think>"),
        (
            IN_TURNS,
            [{"role": "system", "content": "rules"}, *TALK],
            None,
            r"fails at message 0 \(system\): System role not",
        ),
        (IN_TURNS, [*TALK[:2], *TALK], None, None),
        (IN_TURNS, [user("a"), *TALK], None, r"fails at message 1 \(user\): Conversation roles must alternate"),
        (IN_TURNS, [*TALK[:1], *CALLING], None, r"fails at message 1 \(user\): Conversation roles"),
        (
            NO_TOOLS,
            [*TALK[:2], {"role": "tool", "content": "a key"}, TALK[3]],
            None,
            r"changes, moves or drops message 2 \(tool: 'a key'\)",
        ),
        (NO_TOOLS, CALLING, None, r"fails at message 1 \(assistant\): "),
        (NO_TOOLS, TALK, TOOLS, "leaves out the tools"),
        (PRINTS_DATE, TALK, None, r"fails at message 0 \(user\): it prints today's date"),
        (BROKEN, TALK, None, r"fails at message 0 \(user\): "),
        (MERGES_TOOLS, CALLING, TOOLS, None),
        (DATE_UNLESS_GIVEN, TALK, None, None),
    ],
)
def test_templates_keep_every_message_or_the_error_names_template_row_message_and_fix(
    with_template, template, messages, tools, reason
):
    encoder = with_template(template)
    if reason is None:
        encoded = encoder.trajectory(messages, row="t.jsonl:7", tools=tools)
        assert len(encoded.read_positions) == sum(message["role"] == "assistant" for message in messages)
        return
    with pytest.raises(DataError, match=rf"^t\.jsonl:7: the chat template of test/template {reason}") as error:
        encoder.trajectory(messages, row="t.jsonl:7", tools=tools)
    assert str(error.value).endswith("with --chat-template chatml or FILE (docs/your-trajectories.md)")
    assert "\n" not in str(error.value)


def test_the_error_of_a_template_that_fails_only_for_the_reply_says_so(with_template):
    encoder = with_template(
        "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ none + 1 }}{% endif %}"
    )
    with pytest.raises(DataError, match="fails at the reply to come"):
        encoder.prompt(TALK[:1])


@pytest.mark.parametrize("messages", [TALK, CALLING, [{"role": "system", "content": "rules"}, *CALLING]])
def test_the_advised_template_renders_what_the_others_do_not(with_template, tmp_path, messages):
    from data_pipeline.encode import Encoder

    with_template(DROPS_THOUGHTS).tokenizer.save_pretrained(tmp_path)
    encoder = Encoder.load(tmp_path, "chatml")
    encoded = encoder.trajectory(messages, row="x", tools=TOOLS)
    assert len(encoded.read_positions) == 2
    assert encoder.fingerprint != Encoder.load(tmp_path).fingerprint  # so shards of the two are not confused
