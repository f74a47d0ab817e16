"""The shipped chat templates: their renderings, the prefix property, and the choice of a template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipeline.chat_template import SHIPPED
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from tests.data_pipeline.conftest import CHATML, PLAIN, make_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "box"}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is in the box?"},
    {"role": "assistant", "content": "<think>hm</think>I look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "a stick"},
    {"role": "tool", "content": '{"n": 2}'},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "gone"},
    {"role": "assistant", "content": "A stick."},
]
# As the models' own templates print it, except where those rewrite or leave out messages.
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}\n</tools>'
    "\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nWhat is in the box?<|im_end|>\n"
    "<|im_start|>assistant\n<think>hm</think>I look.\n"
    '<tool_call>\n{"name": "look", "arguments": {"at": "box"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {"at": "box"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\na stick\n</tool_response>\n"
    '<tool_response>\n{"n": 2}\n</tool_response><|im_end|>\n'
    '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "box"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\ngone\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nA stick.<|im_end|>\n"
)
LLAMA_CALL = '{"name": "look", "parameters": {"at": "box"}}'


def headed(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


LLAMA_TEXT = "<|begin_of_text|>" + "".join(
    [
        headed(
            "system",
            "Environment: ipython\n\nYou have access to the following functions. To call a function, please respond "
            'with JSON for a function call. Respond in the format {"name": function name, "parameters": dictionary '
            "of argument name and its value}. Do not use variables.\n\n"
            f"{json.dumps(TOOLS[0], indent=4)}\n\nBe brief.",
        ),
        headed("user", "What is in the box?"),
        headed("assistant", f"<think>hm</think>I look.\n{LLAMA_CALL}\n{LLAMA_CALL}"),
        headed("ipython", "a stick"),
        headed("ipython", '{"n": 2}'),
        headed("assistant", LLAMA_CALL),
        headed("ipython", "gone"),
        headed("assistant", "A stick."),
    ]
)
OPENING = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
EXTRA = {"chatml": (), "llama3": ("<|finetune_right_pad_id|>",)}


@pytest.fixture(scope="module", params=SHIPPED)
def named(request, tmp_path_factory) -> tuple[str, Path]:
    """A shipped template, and a tokenizer directory with its tokens, another template and an end of text."""
    directory = tmp_path_factory.mktemp(request.param)
    specials = (*SHIPPED[request.param].tokens, "<|endoftext|>", *EXTRA[request.param])
    tokenizer = make_tokenizer(CHATML, specials, "<|endoftext|>")
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": PLAIN}))
    (directory / "chat_template.jinja").unlink()
    return request.param, directory


def test_a_conversation_with_tools_is_printed_as_by_the_model_family(named):
    name, directory = named
    encoder = Encoder.load(directory, name)
    text = {"chatml": CHATML_TEXT, "llama3": LLAMA_TEXT}[name]
    assert encoder.render(CHAT, tools=TOOLS) == text
    assert encoder.render(CHAT, tools=TOOLS, generation=True) == text + OPENING[name]
    without = encoder.render(CHAT[:2])
    assert "Tools" not in without and "Environment" not in without and "Be brief." in without


def test_every_step_has_its_positions(named):
    name, directory = named
    encoder = Encoder.load(directory, name)
    for chat, tools in ((CHAT, TOOLS), (CHAT[1:], TOOLS), (CHAT, None)):
        encoded = encoder.trajectory(chat, row="x", tools=tools)
        steps = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
        assert encoded.message_indices.tolist() == steps
        for step, read, state in zip(steps, encoded.read_positions, encoded.state_positions, strict=True):
            assert (
                encoded.tokens[: read + 1].tolist()
                == encoder.trajectory(chat[: step + 1], row="x", tools=tools).tokens.tolist()
            )
            assert encoded.tokens[: state + 1].tolist() == encoder.prompt(chat[:step], tools=tools)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_renderings_of_any_conversation_are_prefixes_and_contain_its_texts(named, data):
    name, directory = named
    encoder = _encoder(directory, name)
    letters = st.characters(exclude_categories=["Cs"])
    words = st.text(letters, min_size=1, max_size=12).filter(lambda text: "<|" not in text)
    roles = data.draw(st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), max_size=6))
    chat = [{"role": "user", "content": data.draw(words)}]
    chat += [{"role": role, "content": data.draw(words)} for role in roles]
    chat.append({"role": "assistant", "content": "done"})
    encoded = encoder.trajectory(chat, row="x")  # verifies texts and prefixes itself
    theirs = encoder.tokenizer.apply_chat_template(chat, tokenize=False)
    assert encoded.tokens.tolist() == encoder.tokenizer.encode(theirs, add_special_tokens=False)


_ENCODERS: dict[tuple[Path, str], Encoder] = {}


def _encoder(directory: Path, name: str) -> Encoder:
    return _ENCODERS.setdefault((directory, name), Encoder.load(directory, name))


def test_the_end_of_a_message_and_the_padding_come_with_the_template(named):
    name, directory = named
    encoder = Encoder.load(directory, name)
    assert encoder.decode([encoder.end_id]) == SHIPPED[name].end
    assert encoder.decode([encoder.pad_id]) not in SHIPPED[name].tokens


def test_a_written_tokenizer_encodes_as_the_encoder_did(named, tmp_path):
    """Tokens, template and padding are the same, with our encoder and with transformers."""
    name, directory = named
    encoder = Encoder.load(directory, name)
    encoder.write_tokenizer(directory, tmp_path)
    again = Encoder.load(tmp_path)
    assert again.fingerprint == encoder.fingerprint
    assert (again.pad_id, again.end_id) == (encoder.pad_id, encoder.end_id)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.apply_chat_template(CHAT, tools=TOOLS, tokenize=False) == encoder.render(CHAT, tools=TOOLS)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_tokenizer_with_its_own_template_is_copied_unchanged(tmp_path, chatml_tokenizer):
    chatml_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "copy").mkdir()
    for template in (None, "own"):
        encoder = Encoder.load(tmp_path / "base", template)
        encoder.write_tokenizer(tmp_path / "base", tmp_path / "copy")
        for file in (tmp_path / "base").iterdir():
            assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
        assert encoder.fingerprint == Encoder(chatml_tokenizer).fingerprint


def test_a_file_can_be_the_template(named, tmp_path):
    _, directory = named
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    encoder = Encoder.load(directory, path)
    assert encoder.render(CHAT[:2]) == "Be brief.<|endoftext|>What is in the box?<|endoftext|>"
    path.write_text("{% for %}")
    with pytest.raises(DataError, match=r"mine\.jinja\) is not valid Jinja"):
        Encoder.load(directory, path)


def test_a_template_that_is_missing_or_does_not_fit_is_refused(named, tmp_path):
    name, directory = named
    with pytest.raises(DataError, match=r"template chatlm: cannot be read .* own, chatml, llama3"):
        Encoder.load(directory, "chatlm")
    with pytest.raises(DataError, match="cannot be read"):
        Encoder.load(directory, tmp_path)
    other = next(shipped for shipped in SHIPPED if shipped != name)
    with pytest.raises(DataError, match=rf"template {other} needs the special token <\|"):
        Encoder.load(directory, other)
