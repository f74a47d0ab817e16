"""The functions of step.py, jitted for a mesh: training runs them, `plan` compiles them from shapes alone.

Shapes: B rows, T tokens and S step slots of a row, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model import sharding
from jaxprm.model.attention import BLOCKS, HEAD_DIM_DIVISOR, fits, packed_attention, splash_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.sharding import RULES, Rules
from jaxprm.model.transformer import ForwardOptions, reward_model_graph
from jaxprm.objectives import reads_states, trains_on_labels, trains_on_pairs
from jaxprm.training import features, reward_model, trainable
from jaxprm.training.head import make_centre_head
from jaxprm.training.optimizer import reward_model_optimizer
from jaxprm.training.step import (
    FIELDS,
    LABEL_FIELDS,
    NO_PARAMETERS,
    PAIR_FIELDS,
    initial_state,
    make_evaluation_step,
    make_features_step,
    make_train_step,
)

_TOKEN_FIELDS = ("tokens", "segments", "positions", "branches")
_DTYPES = dict.fromkeys(("rewards", "weights", "step_labels"), jnp.float32) | dict.fromkeys(
    ("is_first", "is_last", "valid"), jnp.bool_
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions of a training run, and the shapes of their arguments. Nothing is on a device.

    Attributes:
        graph, forward_options: the model, and how its forward pass is computed.
        split: (parameters) -> (trained, frozen); donates its argument unless `trainable` is last_k.
        centre_head: (trained, batch, frozen) -> trained, with the head centred on the batch; donates the first.
        init: (trained) -> state; donates its argument.
        train_step: (state, batch, frozen) -> (state, metrics); donates the state.
        evaluation_step: (trained, batch, frozen) -> (promises, returns-to-go), both [B, S].
        features_step: (parameters, batch) -> hidden states [B, S, D], for training the head alone.
        parameters: shapes of all parameters of the model; state, frozen: shapes of the arguments of `train_step`. All
            are trees of ShapeDtypeStructs with shardings.
    """

    graph: nnx.GraphDef
    forward_options: ForwardOptions
    split: Callable
    centre_head: Callable
    init: Callable
    train_step: Callable
    evaluation_step: Callable
    features_step: Callable
    parameters: Any
    state: Any
    frozen: Any


def make_programs(
    settings: config_lib.RewardModelConfig,
    config: TransformerConfig,
    mesh: Mesh,
    *,
    length: int,
    steps: int,
    seed: int,
    branches: int = 2,
) -> Programs:
    """The programs of a reward model on a mesh, whose devices may be described only.

    Args:
        length: T.
        steps: length of the learning rate's schedule.
        seed: initializes adapters.
        branches: the most actions of a state in pairs.

    Raises:
        UserError: the model does not divide over the mesh, or cannot be trained or computed as the settings say.
    """
    sharding.check_model(mesh, config)
    trainable.check_trainable(settings, config)
    graph = reward_model_graph(config)
    forward_options = make_forward_options(settings, config, mesh, length, branches=branches)
    optimizer = reward_model_optimizer(settings, steps)

    def split(parameters: Any) -> tuple[Any, Any]:
        return trainable.split(settings, parameters, jax.random.key(seed))

    def init(trained: Any) -> Any:
        return initial_state(trained, optimizer, settings)

    # Shapes with shardings, by the names of the parameters.
    parameters = sharding.with_shardings(mesh, reward_model.abstract(config))
    trained, frozen = sharding.with_shardings(mesh, jax.eval_shape(split, parameters))
    split_shardings = sharding.shardings((trained, frozen))
    if settings.trainable == "head":
        frozen = NO_PARAMETERS  # batches bring the hidden states of the frozen transformer
    state = sharding.with_shardings(mesh, jax.eval_shape(init, trained))
    state_shardings, frozen_shardings = sharding.shardings(state), sharding.shardings(frozen)
    batch_sharding, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return Programs(
        graph=graph,
        forward_options=forward_options,
        # A layer stack that is cut in two cannot reuse the buffer of the uncut one.
        split=jax.jit(split, donate_argnums=() if settings.trainable == "last_k" else 0, out_shardings=split_shardings),
        centre_head=jax.jit(
            make_centre_head(graph, settings, forward_options),
            donate_argnums=0,
            in_shardings=(state_shardings["parameters"], batch_sharding, frozen_shardings),
            out_shardings=state_shardings["parameters"],
        ),
        init=jax.jit(init, donate_argnums=0, out_shardings=state_shardings),
        # Pinned on both sides: left to the compiler, a parameter's sharding can drift, and the step compiles again.
        train_step=jax.jit(
            make_train_step(graph, optimizer, settings, forward_options),
            donate_argnums=0,
            in_shardings=(state_shardings, batch_sharding, frozen_shardings),
            out_shardings=(state_shardings, replicated),
        ),
        evaluation_step=jax.jit(
            make_evaluation_step(graph, settings, forward_options),
            in_shardings=(state_shardings["parameters"], batch_sharding, frozen_shardings),
            out_shardings=replicated,
        ),
        features_step=jax.jit(make_features_step(graph, settings, forward_options), out_shardings=replicated),
        parameters=parameters,
        state=state,
        frozen=frozen,
    )


def make_forward_options(
    settings: config_lib.RewardModelConfig,
    config: TransformerConfig,
    mesh: Mesh,
    length: int,
    rules: Rules = RULES,
    branches: int = 2,
) -> ForwardOptions:
    """dtype, rematerialisation, attention and sharding of a forward pass over rows of `length` tokens.

    Raises UserError if the attention that is asked for cannot be computed.
    """
    return ForwardOptions(
        dtype=jnp.dtype(settings.dtype),
        remat=settings.remat,
        attend=_attention(settings.attention, config, mesh, length, rules, branches),
        constrain=sharding.constraints(mesh, rules),
        frozen_layers=config.layers - settings.last_k if settings.trainable == "last_k" else 0,
    )


def data_fields(settings: config_lib.RewardModelConfig) -> tuple[str, ...]:
    """Fields of a batch from the shards that training with these settings reads."""
    return FIELDS + LABEL_FIELDS * trains_on_labels(settings) + PAIR_FIELDS * trains_on_pairs(settings)


def batch_fields(settings: config_lib.RewardModelConfig) -> tuple[str, ...]:
    """Fields of a batch that the step functions read: hidden states replace tokens if the transformer is frozen."""
    fields = data_fields(settings)
    if settings.trainable != "head":
        return fields
    fields = tuple(field for field in fields if field not in features.REPLACED_FIELDS)
    return fields + features.NAMES[: 1 + reads_states(settings)]


def batch_shapes(
    fields: Sequence[str], data: config_lib.DataConfig, config: TransformerConfig, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of these fields of a batch of `data.rows` rows, sharded as by `sharding.put_batch`."""
    placed = sharding.batch_sharding(mesh)

    def shape(field: str) -> jax.ShapeDtypeStruct:
        if field in features.NAMES:
            size, dtype = (data.rows, data.steps_per_row, config.hidden_size), jnp.float32
        else:
            size = (data.rows, data.length if field in _TOKEN_FIELDS else data.steps_per_row)
            dtype = _DTYPES.get(field, jnp.int32)
        return jax.ShapeDtypeStruct(size, dtype, sharding=placed)

    return {field: shape(field) for field in fields}


def _attention(name: str, config: TransformerConfig, mesh: Mesh, length: int, rules: Rules, branches: int) -> Callable:
    """The attention function; `auto` is splash attention on TPUs if it supports the shapes, else the reference."""
    platform = mesh.devices.flat[0].platform
    if name == "reference" or (name == "auto" and platform != "tpu"):
        return packed_attention
    if platform != "tpu":
        raise UserError(f'attention = "splash" needs a TPU, the devices are {platform}; use "auto" or "reference"')
    shards = mesh.shape["sequence"]
    if not fits(length, config.head_dim, shards):
        if name == "auto":
            return packed_attention
        raise UserError(
            f'attention = "splash" needs data.length = {length} to be a multiple of {BLOCKS[-1] * shards} and the '
            f'model\'s head_dim = {config.head_dim} of {HEAD_DIM_DIVISOR}; use "auto" or "reference"'
        )
    axes = {name: getattr(rules, name) for name in ("batch", "heads", "kv_heads", "length")}
    return splash_attention(mesh, **axes, most_branches=branches)
