"""The embedded tokenizer: small, reversible, and the same for everybody who reads it."""

import pytest
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from data_pipeline.encode import Encoder
from jaxprm.policies.tokenizer import QWEN2_PATTERN, train_tokenizer
from tests.model import tiny

TEXTS = ["craft 4 oak planks using 1 oak log", "Got 12 oak-log.\n\nI'd  need\t(3) more:\n", "naïve 木材 🪵 x²"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, directory)
    return directory


def test_words_are_those_that_transformers_gives_the_family():
    assert QWEN2_PATTERN == PRETOKENIZE_REGEX


@pytest.mark.parametrize("text", [*TEXTS, " 16", "a\r\n b", "e\u0301"])
def test_any_text_survives(directory, text):
    encoder = Encoder.load(directory)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    encoded = encoder.trajectory(messages, row="")
    assert encoder.decode(encoded.tokens.tolist()) == f"<|user|>{text}<|end|><|assistant|>{text}<|end|>"


def test_words_of_the_texts_become_tokens_and_digits_stand_alone(directory):
    encoder = Encoder.load(directory)
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.prompt([{"role": "user", "content": "oak 12"}]))
    assert tokens == ["<|user|>", "oak", "Ġ", "1", "2", "<|end|>", "<|assistant|>"]


def test_tools_and_systems_speak_as_users_and_other_roles_are_refused(directory):
    encoder = Encoder.load(directory)
    user, tool = ([{"role": role, "content": "Got 1 stick"}] for role in ("user", "tool"))
    assert encoder.prompt(user) == encoder.prompt(tool)


def test_a_qwen2_model_beside_it_does_not_change_its_tokens(tmp_path):
    """AutoTokenizer looks at config.json, and builds the tokenizer by the rules of the model's family."""
    directory = tiny.write_reward_model(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(directory), tiny.encoder()
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert theirs(rendered)["input_ids"] == ours.prompt(messages)
