"""A model as a Hugging Face checkpoint: config.json and its weights, of a language model or a reward model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.model import families
from jaxprm.model.hf_config import hf_config
from jaxprm.model.transformer import Head, TransformerConfig
from jaxprm.model.weights_writer import Tensor, write_weights

FORMATS = ("sequence", "token")


def write_model(
    directory: Path,
    config: TransformerConfig,
    state: Any,
    *,
    pad_id: int,
    end_id: int,
    max_length: int,
    source: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> list[str]:
    """Writes config.json and the weights into an existing directory; returns the names of the files.

    state: of a Transformer, written as a language model, or of a RewardModel, written as a classifier of sequences, or
    of tokens where its head has a bias. The other arguments are those of `hf_config` and `write_weights`.
    """
    described = hf_config(
        config, reward="transformer" in state, pad_id=pad_id, end_id=end_id, max_length=max_length, source=source,
        dtype=dtype,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(config, state)
    return ["config.json", *write_weights(directory, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)]


def in_format(config: TransformerConfig, state: Any, form: str) -> tuple[TransformerConfig, Any]:
    """(config, state) of a reward model with the head that a format has, and the same values.

    Classifiers of tokens have a bias, zero where the model has none: one that no checkpoint sets is drawn at random.
    Classifiers of sequences have none. Raises UserError for a bias that is not zero there.
    """
    head = config.head
    if form == "token" and not head.bias:
        state = nnx.State({**state, "head_bias": nnx.Param(jnp.zeros((head.labels,)))})
    elif form == "sequence" and head.bias:
        if np.any(np.asarray(state["head_bias"][...])):
            raise UserError(
                f"format sequence: the model's head has a bias, and {config.traits.sequence} has none; "
                "use --format token"
            )
        state = nnx.State({name: part for name, part in state.items() if name != "head_bias"})
    return dataclasses.replace(config, head=Head(head.labels, bias=form == "token")), state


def tensors_of(config: TransformerConfig, state: Any) -> list[Tensor]:
    """The parameters under their Hugging Face names and in their shapes, each to be made in its turn.

    A layer is cut from its stack on the device: the host holds one tensor of one layer at a time.
    """
    return [_tensor(one, state) for one in families.tensors(config, reward="transformer" in state)]


def _tensor(one: families.Tensor, state: Any) -> Tensor:
    parameter = state
    for name in one.path:
        parameter = parameter[name]
    values = parameter[...]

    def make() -> np.ndarray:
        ours = values if one.layer is None else jax.lax.dynamic_index_in_dim(values, one.layer, keepdims=False)
        ours = np.asarray(ours)
        return (ours.T if one.transposed else ours).reshape(one.shape)

    return Tensor(one.name, one.shape, make)
