"""The embedded tokenizer: small, reversible, and the same in every process."""

import pytest

from data_pipeline.encode import Encoder
from jaxprm.training.imitate import train_tokenizer

TEXTS = ["craft 4 oak planks using 1 oak log", "Got 12 oak-log.\n\nI'd  need\t(3) more:\n", "naïve 木材 🪵 x²"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, directory)
    return directory


@pytest.mark.parametrize("text", [*TEXTS, " 16", "a\r\n b", "e\u0301"])
def test_any_text_survives(directory, text):
    encoder = Encoder.load(directory)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    encoded = encoder.trajectory(messages, row="")
    assert encoder.decode(encoded.tokens.tolist()) == f"<|user|>{text}<|end|><|assistant|>{text}<|end|>"


def test_frequent_words_are_tokens_with_the_space_before_them(directory):
    encoder = Encoder.load(directory)
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.prompt([{"role": "user", "content": "planks oak 1"}]))
    assert tokens == ["<|user|>", "plan", "ks", "Ġoak", "Ġ1", "<|end|>", "<|assistant|>"]


def test_tools_and_systems_speak_as_users(directory):
    encoder = Encoder.load(directory)
    user, tool, system = ([{"role": role, "content": "Got 1 stick"}] for role in ("user", "tool", "system"))
    assert encoder.prompt(user) == encoder.prompt(tool) == encoder.prompt(system)
