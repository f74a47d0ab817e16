"""The padding token never ends a message, with tokenizers as those of Qwen and Llama."""

import pytest
from transformers import PreTrainedTokenizerFast

from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.packing import padding_id
from tests.data_pipeline.conftest import CHATML, make_tokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
)
QWEN = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|fim_pad|>": 3}
LLAMA_3 = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|reserved_special_token_0|>": 2,
    "<|eot_id|>": 3,
    "<|start_header_id|>": 4,
    "<|end_header_id|>": 5,
    "<|reserved_special_token_1|>": 6,
}
LLAMA_31 = LLAMA_3 | {"<|finetune_right_pad_id|>": 7}


@pytest.mark.parametrize(
    ("specials", "declared", "used", "template", "expected"),
    [
        (QWEN, 0, {2}, CHATML, "<|endoftext|>"),  # Qwen2.5-Instruct
        (QWEN, 0, {0}, CHATML, "<|fim_pad|>"),  # Qwen2.5, a base model: pad is eos
        (QWEN, 2, {2}, CHATML, "<|endoftext|>"),  # pad set to the end of a turn, as many scripts do
        (QWEN, 1, {2}, CHATML, "<|endoftext|>"),  # pad begins messages
        (LLAMA_31, None, {0, 3}, LLAMA, "<|finetune_right_pad_id|>"),
        (LLAMA_31, 3, {0, 3}, LLAMA, "<|finetune_right_pad_id|>"),
        (LLAMA_3, None, {0, 3}, LLAMA, "<|reserved_special_token_0|>"),  # Llama 3 has no padding token
        (LLAMA_3, 6, {0, 3}, LLAMA, "<|reserved_special_token_1|>"),  # the user's choice is kept
        ({"[PAD]": 5, "</s>": 1}, 1, {1}, "{{ eos_token }}", "[PAD]"),
        # SmolLM2: pad is the end of a turn, and no other token is named as padding.
        ({"<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3, "<gh_stars>": 7}, 2, {1, 2}, CHATML, "<repo_name>"),
        ({"<s>": 0, "</s>": 1, "<unk>": 2}, 1, {0, 1, 2}, "{{ eos_token }}", None),
    ],
)
def test_a_special_token_that_no_conversation_contains_is_chosen(specials, declared, used, template, expected):
    id = padding_id(specials, declared=declared, used=used, template=template)
    assert id == (None if expected is None else specials[expected])


def encoder(specials, template, end, pad) -> Encoder:
    base = make_tokenizer(template, specials, end)
    named = {"eos_token": end} | ({"pad_token": pad} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, chat_template=template, **named)
    return Encoder(tokenizer, source="the model")


def test_an_encoder_pads_with_it_and_reads_at_another_token():
    padded = encoder(("<|im_start|>", "<|im_end|>", "<|endoftext|>"), CHATML, "<|im_end|>", "<|im_end|>")
    assert padded.decode([padded.pad_id]) == "<|endoftext|>"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "get 1 log"}]
    encoded = padded.trajectory(messages, row="x")
    # ChatML ends a message with a newline.
    assert padded.decode([encoded.tokens[encoded.read_positions[-1]]]) == "\n"
    assert padded.pad_id not in encoded.tokens
    other = encoder(("<|eot_id|>", "<|reserved_special_token_0|>"), LLAMA[len("{{ bos_token }}") :], "<|eot_id|>", None)
    assert other.decode([other.pad_id]) == "<|pad|>"


def test_without_a_free_special_token_the_declared_one_is_kept_or_an_error():
    template = "{% for m in messages %}{{ m['content'] + '<|pad|>' + '<|im_end|>' }}{% endfor %}"
    assert encoder(("<|im_end|>",), template, "<|im_end|>", "<|pad|>").pad_id == 0
    with pytest.raises(DataError, match="the model needs a pad_token and an eos_token"):
        encoder(("<|im_end|>",), template, "<|im_end|>", None)


def test_a_token_that_the_template_puts_together_is_not_free():
    """The names of the roles are in the text of no template. The comment keeps the declared token from being free."""
    template = (
        "{# <|pad|> #}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if tools %}{{ '<|' + 'tools' + '|>' }}{% endif %}"
    )
    roles = ("<|user|>", "<|system|>", "<|assistant|>", "<|tool|>", "<|tools|>")
    padded = encoder(("<|end|>", *roles, "<|spare|>"), template, "<|end|>", "<|end|>")
    assert padded.decode([padded.pad_id]) == "<|spare|>"
