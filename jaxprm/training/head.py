"""The start of a new value head: moved so that its values begin at the mean of the first batch's targets.

Hidden states of a pretrained transformer share one large mean vector, so a random head begins as a constant far from
all targets. Gradients then point along that vector, are clipped, and TD targets lean on the constant.

Shapes: B rows and S step slots of a batch, D model, K readouts of a step: the action's and, if trained, the state's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxprm import config as config_lib
from jaxprm.model.transformer import ForwardOptions
from jaxprm.objectives import find_objective, reads_states
from jaxprm.targets import returns_to_go
from jaxprm.training.step import NO_PARAMETERS, PLAIN, Batch, checked_targets, hidden_states, microbatches_of
from jaxprm.training.trainable import join


def make_centre_head(
    graph: nnx.GraphDef, settings: config_lib.RewardModelConfig, forward_options: ForwardOptions = PLAIN
) -> Callable[..., Any]:
    """The function (trained, batch, frozen) -> trained, with the head `centred` on the batch."""

    def centre_head(trained: Any, batch: Batch, frozen: Any = NO_PARAMETERS) -> Any:
        if "read_features" in batch:
            features, state_features = batch["read_features"], batch.get("state_features")
        else:
            features, state_features = _read(graph, join(settings, trained, frozen), batch, settings, forward_options)
        head = centred(trained["head"][...], features, state_features, batch, settings)
        # Leaf by leaf: the tree keeps its types, which compiled programs compare.
        return jax.tree_util.tree_map_with_path(lambda path, leaf: head if path[0].key == "head" else leaf, trained)

    return centre_head


def _read(
    graph: nnx.GraphDef,
    parameters_and_adapters: tuple[nnx.State, Any],
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions,
) -> tuple[jax.Array, jax.Array | None]:
    """`hidden_states` of a batch, in as many parts as a training step computes, so that it needs no more memory."""
    parameters, adapters = parameters_and_adapters
    options = {"states": reads_states(settings), "forward_options": forward_options, "adapters": adapters}

    def read(part: Batch) -> tuple[jax.Array, jax.Array | None]:
        return hidden_states(nnx.merge(graph, parameters), part, **options)

    if settings.microbatches == 1:
        return read(batch)
    parts = jax.lax.map(read, microbatches_of(batch, settings.microbatches))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def centred(
    weights: jax.Array,
    features: jax.Array,
    state_features: jax.Array | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
) -> jax.Array:
    """The head [D] with the smallest change of `weights` that gives a batch's mean features the mean of its targets.

    Only the weights are moved, so a model keeps the form of its export, which has no bias.

    Args:
        features, state_features: hidden states [B, S, D] that the head reads.
        batch: rewards, weights, is_last and valid, [B, S].
    """
    means, target = _means(features, state_features, batch, settings)
    with jax.default_matmul_precision("highest"):
        # Of all changes that fit the K means exactly, least squares gives the smallest; without a step it is 0.
        change, *_ = jnp.linalg.lstsq(means, target - means @ weights.astype(jnp.float32))
    return (weights.astype(jnp.float32) + change).astype(weights.dtype)


def _means(
    features: jax.Array, state_features: jax.Array | None, batch: Batch, settings: config_lib.RewardModelConfig
) -> tuple[jax.Array, jax.Array]:
    """(weighted mean features [K, D] of the trained steps, mean of their targets), float32."""
    rewards, is_last, valid = batch["rewards"], batch["is_last"], batch["valid"]
    returns = returns_to_go(rewards, is_last, valid, discount=settings.discount)
    # Targets that lean on the model's own values lean on the mean return here.
    values = jnp.full(valid.shape, _mean(returns, jnp.where(valid, batch["weights"], 0)))
    states = None if state_features is None else values
    returned = find_objective(settings.objective).targets(values, rewards, is_last, valid, settings, states)
    targets, mask = checked_targets(settings.objective, returned, valid.shape)
    weights = jnp.where(mask, batch["weights"], 0)
    read = [features] if state_features is None else [features, state_features]
    return jnp.stack([_mean(x.astype(jnp.float32), weights[..., None]) for x in read]), _mean(targets, weights)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over rows and steps; 0 if all weights are 0. Slots of weight 0 may hold anything."""
    total = jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=(0, 1))
    weight = jnp.sum(weights)
    return total / jnp.where(weight > 0, weight, 1)
