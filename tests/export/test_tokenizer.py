"""Tokenizers like Llama's: no padding token, a token that begins every text, a template that prints the date."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer

import jaxprm
from data_pipeline.encode import Encoder
from jaxprm.export.export import export
from jaxprm.export.tokenizer import pin_date
from tests.data_pipeline.conftest import make_tokenizer
from tests.model import tiny

TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{% if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{% else %}{%- set date_string = '26 Jul 2024' %}{% endif %}"
    "{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>")
CONFIG = dataclasses.replace(tiny.CONFIG, family="llama", vocab_size=512)
CONVERSATION = tiny.conversation(2, turns=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama with such a tokenizer, which adds the begin token itself unless add_special_tokens is False."""
    directory = tiny.write_reward_model(tmp_path_factory.mktemp("model"), tiny.reward_model(CONFIG), CONFIG)
    trained = make_tokenizer(TEMPLATE, SPECIALS, "<|eot_id|>")
    trained.save_pretrained(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {
                "id": "<|begin_of_text|>",
                "ids": [trained.convert_tokens_to_ids("<|begin_of_text|>")],
                "tokens": ["<|begin_of_text|>"],
            }
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_it_is_exported_with_a_padding_token_and_the_date_of_training(model, tmp_path):
    encoder = Encoder.load(model)
    recipe = json.loads((model / "reward_model.json").read_text())
    (model / "reward_model.json").write_text(json.dumps(recipe | {"fingerprints": {"tokenizer": encoder.fingerprint}}))
    export(model, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.pad_token == "<|finetune_right_pad_id|>"
    text = theirs.apply_chat_template(CONVERSATION, tokenize=False)
    assert "Today Date: 26 Jul 2024" in text
    today = AutoTokenizer.from_pretrained(model).apply_chat_template(CONVERSATION, tokenize=False)
    assert "Today Date: " in today and "26 Jul 2024" not in today
    ours = encoder.trajectory(CONVERSATION, row="").tokens.tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours
    # Without add_special_tokens=False there is a second begin token.
    assert theirs(text)["input_ids"] == [encoder.tokenizer.convert_tokens_to_ids("<|begin_of_text|>"), *ours]
    # The export scores like the model, and a second export is the same.
    assert jaxprm.load(tmp_path / "out").score([CONVERSATION]) == jaxprm.load(model).score([CONVERSATION])
    export(tmp_path / "out", tmp_path / "again")
    templates = [(tmp_path / name / "chat_template.jinja").read_text() for name in ("out", "again")]
    assert templates[0] == templates[1]


@pytest.mark.parametrize("reads", ["{{ date_string }}", "{{ strftime_now('%Y') }}"])
def test_a_date_is_pinned_once(reads):
    assert pin_date(reads) == "{%- set date_string = '26 Jul 2024' -%}\n" + reads
    assert pin_date(pin_date(reads)) == pin_date(reads)


def test_a_template_without_a_date_is_not_changed():
    assert pin_date("{{ messages }}") == "{{ messages }}"
