import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.trajectory import Message

CHAT = [
    {"role": "user", "content": "Goal: craft oak sign."},
    {"role": "assistant", "content": "get 2 oak log"},
    {"role": "user", "content": "Got 2 oak log"},
    {"role": "assistant", "content": "craft oak sign"},
]
# As Qwen3's: the thoughts of an assistant are printed in the last turn only.
FORGETS_THOUGHTS = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if not loop.last and '</think>' in text %}{% set text = text.split('</think>')[1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's: the system message moves to the last user message.
MOVES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def naive_ids(encoder: Encoder, messages, generation=False):
    """The ids that transformers itself gives for the conversation."""
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return encoder.tokenizer.encode(text, add_special_tokens=False)


def test_step_table_of_the_plain_template_by_hand(plain_encoder):
    encoded = plain_encoder.trajectory(CHAT, row="x")
    names = [plain_encoder.tokenizer.convert_ids_to_tokens(int(token)) for token in encoded.tokens]
    ends = [index for index, name in enumerate(names) if name == "<|end|>"]
    assistants = [index for index, name in enumerate(names) if name == "<|assistant|>"]
    assert encoded.read_positions.tolist() == [ends[1], ends[3]]
    assert encoded.state_positions.tolist() == assistants
    assert encoded.action_starts.tolist() == [index + 1 for index in assistants]
    assert encoded.message_indices.tolist() == [1, 3]
    assert {array.dtype for array in encoded} == {np.dtype(np.int32)}


def test_chatml_is_read_at_the_newline_after_the_turn(chatml_encoder):
    encoded = chatml_encoder.trajectory(CHAT, row="x")
    for read, state in zip(encoded.read_positions, encoded.state_positions, strict=True):
        assert chatml_encoder.decode(encoded.tokens[read - 1 : read + 1]) == "<|im_end|>\n"
        assert chatml_encoder.decode(encoded.tokens[: state + 1]).endswith("<|im_start|>assistant\n")


def test_prefixes_of_a_trajectory_are_the_prompts_and_the_shorter_trajectories(encoder):
    encoded = encoder.trajectory(CHAT, row="x")
    for step, count in enumerate((2, 4)):
        assert encoder.prompt(CHAT[: count - 1]) == encoded.tokens[: encoded.action_starts[step]].tolist()
        shorter = encoder.trajectory(CHAT[:count], row="x")
        assert shorter.tokens.tolist() == encoded.tokens[: encoded.read_positions[step] + 1].tolist()
        assert shorter.read_positions.tolist() == encoded.read_positions[: step + 1].tolist()


# hypothesis tries the strings of the project's own source, special tokens among them.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=25).filter(lambda text: "<|" not in text)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, min_size=2, max_size=7), st.sampled_from(["plain_encoder", "chatml_encoder"]))
def test_any_text_encodes_as_transformers_encodes_it(request, contents, name):
    encoder = request.getfixturevalue(name)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    assert encoder.prompt(messages) == naive_ids(encoder, messages, generation=True)
    encoded = encoder.trajectory(messages, row="x")
    assert encoded.tokens.tolist() == naive_ids(encoder, messages)
    for read, index in zip(encoded.read_positions, encoded.message_indices, strict=True):
        assert encoded.tokens[: read + 1].tolist() == naive_ids(encoder, messages[: index + 1])


def test_messages_may_be_structs_or_dictionaries(encoder):
    structs = [Message(**message) for message in CHAT]
    assert encoder.prompt(structs) == encoder.prompt(CHAT)
    assert encoder.trajectory(structs, row="x").tokens.tolist() == encoder.trajectory(CHAT, row="x").tokens.tolist()


def test_state_ends_with_the_message_before_where_the_prompt_is_no_prefix(chatml_encoder):
    # As with a template that opens a thought which the finished turns lack.
    template = chatml_encoder.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chatml_encoder.tokenizer.backend_tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=template,
    )
    encoded = Encoder(tokenizer).trajectory(CHAT, row="x")
    before = naive_ids(chatml_encoder, CHAT[:1])
    assert encoded.state_positions[0] == len(before) - 1


def test_parts_are_steps_read_at_their_own_ends(encoder):
    parts = [{"type": "text", "text": text} for text in ("2 + 2 = 4\n", "4 + 1 = 5\n", "so 5")]
    messages = [{"role": "user", "content": "2 + 2 + 1?"}, {"role": "assistant", "content": parts}]
    encoded = encoder.trajectory(messages, row="x")
    joined = [messages[0], {"role": "assistant", "content": "2 + 2 = 4\n4 + 1 = 5\nso 5"}]
    assert encoded.tokens.tolist() == naive_ids(encoder, joined)
    spans = zip(encoded.action_starts, encoded.read_positions, strict=True)
    texts = [encoder.decode(encoded.tokens[start : end + 1]) for start, end in spans]
    assert texts[:2] == ["2 + 2 = 4\n", "4 + 1 = 5\n"] and texts[2].startswith("so 5")
    assert encoded.message_indices.tolist() == [1, 1, 1]


def test_part_that_ends_inside_a_token_is_refused(plain_encoder):
    assert len(plain_encoder.tokenizer.encode(" oak")) == 1
    parts = [{"type": "text", "text": text} for text in ("get 2 o", "ak log")]
    with pytest.raises(DataError, match=r"^t\.jsonl:3: part 0 of message 1 ends inside a token .*newline"):
        plain_encoder.trajectory([CHAT[0], {"role": "assistant", "content": parts}], row="t.jsonl:3")


def test_messages_that_are_no_steps_get_no_position(encoder):
    acknowledged = {"role": "assistant", "content": "OK", "step": False}
    encoded = encoder.trajectory([CHAT[0], acknowledged, *CHAT], row="x")
    assert encoded.message_indices.tolist() == [3, 5]


@pytest.mark.parametrize("template", [FORGETS_THOUGHTS, MOVES_SYSTEM])
def test_template_that_rewrites_earlier_turns_is_refused_by_name(with_template, template):
    messages = [
        {"role": "system", "content": "Be brief."},
        CHAT[0],
        {"role": "assistant", "content": "<think>hm</think>get 2 oak log"},
        CHAT[2],
        {"role": "assistant", "content": "<think>so</think>craft oak sign"},
    ]
    with pytest.raises(DataError, match=r"^t\.jsonl:9: the chat template of test/template .* message \d"):
        with_template(template).trajectory(messages, row="t.jsonl:9")


def test_rewriting_that_changes_no_message_is_detected_by_the_prefix(with_template):
    template = "{% for m in messages %}{{ (messages | length) ~ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(DataError, match=r"rewrites earlier turns; the rendering up to message 0 is no prefix"):
        with_template(template).trajectory(CHAT, row="x")


def test_turns_that_run_into_each_other_are_refused(with_template):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [CHAT[0], {"role": "assistant", "content": "get 2 o"}, {"role": "user", "content": "ak log"}]
    with pytest.raises(DataError, match="message 1 ends inside a token"):
        with_template(template).trajectory(messages, row="x")


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_special_token_in_content_is_never_parsed(encoder, role):
    token = encoder.tokenizer.eos_token
    messages = [*CHAT, {"role": role, "content": f"look: {token} there"}]
    with pytest.raises(DataError, match=r"^t\.jsonl:4: message 4 .* special token"):
        encoder.trajectory(messages, row="t.jsonl:4")
    with pytest.raises(DataError, match="message 4"):
        encoder.prompt(messages)
    assert encoder.special_in(f"look: {token} there") == token
    assert encoder.special_in("look: <|en d|>") is None


def test_special_token_made_by_joining_content_and_template_is_refused(with_template):
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '|>' }}{% endfor %}"
    messages = [CHAT[0], {"role": "assistant", "content": "done <|im_end"}]
    with pytest.raises(DataError, match="changes, moves or drops message 1"):
        with_template(template).trajectory(messages, row="x")


def test_special_token_in_the_arguments_of_a_call_is_refused(chatml_encoder):
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "<|im_end|>"}'}}
    with pytest.raises(DataError, match=r"message 1 \(assistant\) has the special token <\|im_end\|>"):
        chatml_encoder.prompt([CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_tool_calls_reach_the_template_as_objects_and_a_template_that_drops_them_is_refused(
    with_template, chatml_encoder
):
    template = chatml_encoder.tokenizer.chat_template.replace(
        "message['content'] +",
        "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
    )
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "chest"}'}}
    messages = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    encoder = with_template(template)
    assert '"arguments": {"at": "chest"}' in encoder.decode(encoder.trajectory(messages, row="x").tokens)
    with pytest.raises(DataError, match="leaves out, or changes, the name of tool call look in message 1"):
        chatml_encoder.trajectory(messages, row="x")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (CHAT[:1], "no assistant message is a step"),
        (CHAT[1:], "message 0 is a step; a state must come before"),
        ([{"role": "user", "content": 3}], r"message 0 \(user\): content is a number"),
        ([{"role": "user"}], r"message 0 \(user\) has neither"),
    ],
)
def test_conversations_that_cannot_be_scored_name_the_row(encoder, messages, reason):
    with pytest.raises(DataError, match=f"^t.jsonl:1: {reason}"):
        encoder.trajectory(messages, row="t.jsonl:1")


def test_template_that_fails_is_one_line_of_error(with_template):
    encoder = with_template("{{ raise_exception('roles must\nalternate') }}")
    message = (
        r"^x: the chat template of test/template fails at message 0 \(user\): roles must alternate; .* chatml .*\)$"
    )
    with pytest.raises(DataError, match=message):
        encoder.trajectory(CHAT, row="x")


def test_text_that_does_not_survive_the_tokenizer_is_refused(with_template):
    tokenizer = with_template("{{ messages[0]['content'] }}").tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="decoding the token ids does not give the text: at character 12, 'Goal"):
        Encoder(tokenizer).trajectory(CHAT, row="x")


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_special_tokens_that_absorb_their_surroundings_are_not_cut_at(with_template, chatml_encoder, flags):
    mark = AddedToken("<|mark|>", special=True, **{"normalized": False, **flags})
    template = chatml_encoder.tokenizer.chat_template.replace("'<|im_end|>", "' <|mark|> a<|mark|>s<|im_end|>")
    encoder = with_template(template, (mark,))
    assert encoder.prompt(CHAT[:3]) == naive_ids(encoder, CHAT[:3], generation=True)
    encoder = with_template(chatml_encoder.tokenizer.chat_template, (mark,))
    assert encoder.trajectory(CHAT, row="x").tokens.tolist() == naive_ids(encoder, CHAT)


def test_step_without_a_token_is_refused(with_template):
    messages = [*CHAT[:3], {"role": "assistant", "content": ""}]
    with pytest.raises(DataError, match="x: a step of message 3 adds no token"):
        with_template("{% for m in messages %}{{ m['content'] }}{% endfor %}").trajectory(messages, row="x")


def test_token_that_reaches_from_content_into_the_template_is_refused(with_template, chatml_encoder):
    reaching = AddedToken("sign<|im_end|>", special=False, normalized=False)
    encoder = with_template(chatml_encoder.tokenizer.chat_template, (reaching,))
    assert encoder.trajectory(CHAT[:3], row="x")
    with pytest.raises(DataError, match=r"^x: test/template encodes the full conversation differently from its turns"):
        encoder.trajectory(CHAT, row="x")


def test_pieces_of_tokenizers_that_mark_the_start_of_a_text_are_encoded_as_in_the_full_text():
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([f"{m['role']}: {m['content']}" for m in CHAT] * 2, trainer)
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<unk>", eos_token="<|end|>", chat_template=template
    )
    encoder = Encoder(tokenizer)
    assert encoder.prompt(CHAT) == naive_ids(encoder, CHAT)


def test_saving_and_loading_keep_fingerprint_and_ids(encoder, tmp_path):
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert loaded.fingerprint == encoder.fingerprint
    assert (loaded.pad_id, loaded.end_id, loaded.vocabulary_size) == (
        encoder.pad_id,
        encoder.end_id,
        encoder.vocabulary_size,
    )
    assert loaded.trajectory(CHAT, row="x").tokens.tolist() == encoder.trajectory(CHAT, row="x").tokens.tolist()


def test_fingerprints_of_tokenizers_and_templates_differ(plain_encoder, chatml_encoder, with_template):
    other = with_template(chatml_encoder.tokenizer.chat_template + " ")
    assert len({plain_encoder.fingerprint, chatml_encoder.fingerprint, other.fingerprint}) == 3


def test_truncation_and_padding_left_in_a_tokenizer_are_ignored(chatml_tokenizer, tmp_path):
    chatml_tokenizer.save_pretrained(tmp_path)
    plain = Encoder.load(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=99)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Encoder.load(tmp_path).prompt(CHAT) == plain.prompt(CHAT)
    assert Encoder.load(tmp_path).fingerprint == plain.fingerprint


def test_code_next_to_a_tokenizer_is_never_run(chatml_tokenizer, tmp_path):
    chatml_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert Encoder.load(tmp_path).prompt(CHAT)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer.json: cannot be read"),
        (lambda path: (path / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: "),
        (lambda path: (path / "tokenizer_config.json").unlink(), "needs a pad_token and an eos_token"),
        (lambda path: (path / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda path: (path / "chat_template.jinja").write_text("{% if %}"), "is not valid Jinja"),
    ],
)
def test_broken_tokenizer_directory_is_one_line_of_error(chatml_tokenizer, tmp_path, change, reason):
    chatml_tokenizer.save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        Encoder.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_growing_conversation_is_encoded_at_the_cost_of_its_new_turns(chatml_encoder, monkeypatch):
    calls = []
    original = Encoder._encode_piece
    monkeypatch.setattr(Encoder, "_encode_piece", lambda self, *piece: calls.append(piece) or original(self, *piece))
    encoder = Encoder(chatml_encoder.tokenizer)
    messages = list(CHAT[:1])
    encoder.prompt(messages)
    for turn in range(20):
        calls.clear()
        messages += [{"role": "assistant", "content": f"get {turn} log"}, {"role": "user", "content": f"Got {turn}"}]
        encoder.prompt(messages)
        assert len(calls) <= 3  # the two messages and, once, the newline between turns
