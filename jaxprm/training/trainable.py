"""Which parameters are trained: all, adapters of low rank, the head alone, or the last layers; and how they are joined.

What is trained lies in the training state, with the optimizer's moments; what is frozen is read from the policy and
belongs to no checkpoint.
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
    """Raises UserError where there is less to train than is asked for."""
    if settings.trainable == "last_k" and settings.last_k > config.layers:
        raise UserError(
            f"reward model {settings.label}: last_k = {settings.last_k}, but the model has {config.layers} layers; "
            f'use at most {config.layers}, or trainable = "full"'
        )


def split(settings: config_lib.RewardModelConfig, parameters: nnx.State, key: jax.Array) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen) of a reward model's parameters; the key draws what is new, an adapter's first factor.

    Of the last layers, the arrays of `blocks` are cut along their layer axis. An adapter of a matrix [L, I, O] is
    {"a": [L, I, R], "b": [L, R, O]}; with b = 0 the model starts as it is.
    """
    head = {name: part for name, part in parameters.items() if name != "transformer"}
    backbone = parameters["transformer"]
    if settings.trainable == "full":
        return parameters, nnx.State({})
    if settings.trainable == "head":
        return nnx.State(head), nnx.State({"transformer": backbone})
    if settings.trainable == "last_k":
        begin = backbone["blocks"]["attention_norm"][...].shape[0] - settings.last_k

        def part(leaves: slice) -> dict:
            return {name: nnx.Param(leaf[...][leaves]) for name, leaf in backbone["blocks"].items()}

        trained = {"blocks": part(slice(begin, None)), "norm": backbone["norm"]}
        frozen = {"blocks": part(slice(begin))} | {n: p for n, p in backbone.items() if n not in ("blocks", "norm")}
        return nnx.State(head | {"transformer": trained}), nnx.State({"transformer": frozen})
    adapters = {}
    for index, name in enumerate(settings.lora.targets):
        layers, inputs, outputs = backbone["blocks"][name][...].shape
        first = jax.random.normal(jax.random.fold_in(key, index), (layers, inputs, settings.lora.rank))
        second = jnp.zeros((layers, settings.lora.rank, outputs))
        adapters[name] = {"a": nnx.Param(first * inputs**-0.5), "b": nnx.Param(second)}
    return nnx.State(head | {"adapters": {"blocks": adapters}}), nnx.State({"transformer": backbone})


def join(settings: config_lib.RewardModelConfig, trained: nnx.State, frozen: nnx.State) -> tuple[nnx.State, Any]:
    """(parameters of a RewardModel, adapters by name or {}): what a forward pass takes."""
    if settings.trainable == "last_k":
        ours, theirs = trained["transformer"], frozen["transformer"]
        blocks = {
            name: nnx.Param(jnp.concatenate([theirs["blocks"][name][...], leaf[...]]))
            for name, leaf in ours["blocks"].items()
        }
        backbone = dict(theirs.items()) | {"blocks": blocks, "norm": ours["norm"]}
        return nnx.State(dict(trained.items()) | {"transformer": backbone}), {}
    whole = dict(frozen.items()) | {name: part for name, part in trained.items() if name != "adapters"}
    if settings.trainable != "lora":
        return nnx.State(whole), {}
    scale = settings.lora.alpha / settings.lora.rank
    adapters = {
        name: {"a": pair["a"][...], "b": pair["b"][...] * scale} for name, pair in trained["adapters"]["blocks"].items()
    }
    return nnx.State(whole), adapters


def merged(settings: config_lib.RewardModelConfig, trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """The parameters of a plain RewardModel that computes what the trained one does: W + alpha / R * A B."""
    parameters, adapters = join(settings, trained, frozen)
    if not adapters:
        return parameters
    blocks = dict(parameters["transformer"]["blocks"].items())
    for name, pair in adapters.items():
        product = jnp.einsum("lir,lro->lio", pair["a"], pair["b"], precision="highest")
        blocks[name] = nnx.Param(blocks[name][...] + product)
    backbone = dict(parameters["transformer"].items()) | {"blocks": blocks}
    return nnx.State(dict(parameters.items()) | {"transformer": backbone})
