"""A base model for pages without one: small, random, and with a template without tools."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx

from data_pipeline.encode import Encoder
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import Transformer
from tests.data_pipeline.conftest import CHATML, make_tokenizer

SIZES = TransformerConfig(
    vocab_size=512, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48, rope_theta=500.0
)


def write(directory: Path) -> Path:
    """Writes the directory of a language model; returns it."""
    make_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>").save_pretrained(directory)
    encoder = Encoder.load(directory)
    parameters = jax.jit(lambda: nnx.state(Transformer(SIZES, rngs=nnx.Rngs(0))))()
    ids = {"pad_id": encoder.pad_id, "end_id": encoder.end_id}
    writer.write_model(directory, SIZES, parameters, max_length=2048, **ids)
    return directory
