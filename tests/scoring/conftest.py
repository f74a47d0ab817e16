"""Encoders with templates of all kinds, on the tests' own tokenizer."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from data_pipeline.encode import Encoder
from tests.model import tiny


@pytest.fixture
def with_template() -> Callable[[str], Encoder]:
    def make(template: str) -> Encoder:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.tokenizer_directory())
        tokenizer.chat_template = template
        return Encoder(tokenizer)

    return make
