"""Hugging Face checkpoints of the supported families: read into our parameters; `save` writes them.

Only safetensors and JSON are read; anything the transformer cannot represent is refused with the field and its value.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.model import weights
from jaxprm.model.hf_config import is_reward_model, read_config
from jaxprm.model.save import write_model as write_model
from jaxprm.model.transformer import Head, RewardModel, Transformer, TransformerConfig


def load_transformer(
    directory: str | Path, *, unembedding: bool = True, dtype=jnp.float32, shardings: Any = None
) -> tuple[TransformerConfig, nnx.State]:
    """(config, nnx.State of a Transformer) from a causal language model, streamed: see weights.load.

    unembedding: without, the decoder alone, of a causal language model or of a reward model; its config is tied, so it
    holds no unembedding. shardings: a tree like `weights.abstract(config, reward=False)`.

    Raises UserError for what cannot be read, before any memory is spent.
    """
    config, source = read_config(directory)
    classifier = is_reward_model(source)
    if unembedding and classifier:
        raise UserError(
            f"model {directory}: architectures = {source['architectures']} is a reward model; "
            f"give a language model ({config.traits.causal})"
        )
    skipped = () if unembedding else ("score.weight", "score.bias") if classifier else ("lm_head.weight",)
    config = dataclasses.replace(config, head=Head(), tie_embeddings=config.tie_embeddings or not unembedding)
    options = {"skipped": skipped, "dtype": dtype, "shardings": shardings}
    return config, weights.load(Path(directory), config, reward=False, **options)


def load_reward_model(
    directory: str | Path, *, dtype=jnp.float32, shardings: Any = None
) -> tuple[TransformerConfig, nnx.State]:
    """(config, nnx.State of a RewardModel) from a sequence or token classifier of one or two labels, streamed.

    A reward model predicts no token: its config is tied, so it holds no unembedding. shardings: a tree like
    `weights.abstract(config, reward=True)`.

    Raises UserError for what cannot be read, before any memory is spent.
    """
    config, source = read_config(directory)
    if not is_reward_model(source):
        raise UserError(
            f"model {directory}: architectures = {source['architectures']} is no reward model and has no score.weight; "
            f"give one of {config.traits.sequence}, {config.traits.token}"
        )
    config = dataclasses.replace(config, tie_embeddings=True)
    return config, weights.load(Path(directory), config, reward=True, dtype=dtype, shardings=shardings)


def check_vocabulary(directory: str | Path, config: TransformerConfig, tokens: int) -> None:
    """Raises UserError where a tokenizer has ids that the embedding has not; JAX would read some other row."""
    if tokens > config.vocab_size:
        raise UserError(
            f"model {directory}: its tokenizer has {tokens} tokens, its embedding {config.vocab_size}; "
            "put the tokenizer it was trained with beside it"
        )


def reward_model_graph(config: TransformerConfig):
    """Static definition of a RewardModel, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0))))[0]


def transformer_graph(config: TransformerConfig):
    """Static definition of a Transformer, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
