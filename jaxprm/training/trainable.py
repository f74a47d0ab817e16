"""Splits a model's parameters into trained and frozen ones: all, low-rank adapters, the head alone, or the last layers.

Trained parameters are in the train state, with the optimizer's moments. Frozen ones are read from the policy and are in
no checkpoint. The head is trained with each. Shapes: L layers, I inputs and O outputs of a matrix, R rank.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model.config import TransformerConfig


def check_trainable(settings: config_lib.RewardModelConfig, config: TransformerConfig) -> None:
    """Raises UserError if `last_k` is larger than the number of layers."""
    if settings.trainable == "last_k" and settings.last_k > config.layers:
        raise UserError(
            f"reward model {settings.label}: last_k = {settings.last_k}, but the model has {config.layers} layers; "
            f'use at most {config.layers}, or trainable = "full"'
        )


def split(settings: config_lib.RewardModelConfig, parameters: nnx.State, key: jax.Array) -> tuple[nnx.State, nnx.State]:
    """Splits the parameters of a RewardModel into (trained, frozen). `key` initializes the adapters.

    With `last_k` the arrays of `blocks` are cut along their layer axis. The adapter of a matrix [L, I, O] is
    {"a": [L, I, R], "b": [L, R, O]}.
    """
    head = {name: part for name, part in parameters.items() if name != "transformer"}
    transformer = parameters["transformer"]
    if settings.trainable == "full":
        return parameters, nnx.State({})
    if settings.trainable == "head":
        return nnx.State(head), nnx.State({"transformer": transformer})
    if settings.trainable == "last_k":
        begin = transformer["blocks"]["attention_norm"][...].shape[0] - settings.last_k

        def blocks(layers: slice) -> dict:
            return {name: nnx.Param(leaf[...][layers]) for name, leaf in transformer["blocks"].items()}

        trained = {"blocks": blocks(slice(begin, None)), "norm": transformer["norm"]}
        frozen = {name: part for name, part in transformer.items() if name not in ("blocks", "norm")}
        frozen = {"blocks": blocks(slice(begin))} | frozen
        return nnx.State(head | {"transformer": trained}), nnx.State({"transformer": frozen})
    adapters = {}
    for index, name in enumerate(settings.lora.targets):
        layers, inputs, outputs = transformer["blocks"][name][...].shape
        a = jax.random.normal(jax.random.fold_in(key, index), (layers, inputs, settings.lora.rank)) * inputs**-0.5
        b = jnp.zeros((layers, settings.lora.rank, outputs))  # A B = 0: the model starts as the policy
        adapters[name] = {"a": nnx.Param(a), "b": nnx.Param(b)}
    return nnx.State(head | {"adapters": {"blocks": adapters}}), nnx.State({"transformer": transformer})


def join(settings: config_lib.RewardModelConfig, trained: nnx.State, frozen: nnx.State) -> tuple[nnx.State, Any]:
    """(parameters of a RewardModel, adapters by name or {}), the arguments of a forward pass."""
    if settings.trainable == "last_k":
        last, first = trained["transformer"], frozen["transformer"]
        blocks = {
            name: nnx.Param(jnp.concatenate([first["blocks"][name][...], leaf[...]]))
            for name, leaf in last["blocks"].items()
        }
        transformer = dict(first.items()) | {"blocks": blocks, "norm": last["norm"]}
        return nnx.State(dict(trained.items()) | {"transformer": transformer}), {}
    parameters = dict(frozen.items()) | {name: part for name, part in trained.items() if name != "adapters"}
    if settings.trainable != "lora":
        return nnx.State(parameters), {}
    scale = settings.lora.alpha / settings.lora.rank
    adapters = {
        name: {"a": pair["a"][...], "b": pair["b"][...] * scale} for name, pair in trained["adapters"]["blocks"].items()
    }
    return nnx.State(parameters), adapters


def merged(settings: config_lib.RewardModelConfig, trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """Parameters of a RewardModel without adapters that gives the same values: W + alpha / R * A B for each matrix."""
    parameters, adapters = join(settings, trained, frozen)
    if not adapters:
        return parameters
    blocks = dict(parameters["transformer"]["blocks"].items())
    for name, pair in adapters.items():
        # The default precision of a TPU would compute A B in bfloat16.
        product = jnp.einsum("lir,lro->lio", pair["a"], pair["b"], precision="highest")
        blocks[name] = nnx.Param(blocks[name][...] + product)
    transformer = dict(parameters["transformer"].items()) | {"blocks": blocks}
    return nnx.State(dict(parameters.items()) | {"transformer": transformer})
