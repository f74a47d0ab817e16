"""The jitted functions of a training run, built from shapes alone: training runs them, `plan` compiles them."""

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
from jaxprm.model.attention import packed_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.sharding import RULES, Rules
from jaxprm.model.transformer import ForwardOptions, reward_model_graph
from jaxprm.training import features, reward_model, trainable
from jaxprm.training.optimizer import make_optimizer
from jaxprm.training.step import (
    FIELDS,
    hidden_states,
    initial_state,
    make_evaluation_step,
    make_train_step,
    reads_states,
)


def make_forward_options(
    settings: config_lib.RewardModelConfig, config: TransformerConfig, mesh: Mesh, length: int, rules: Rules = RULES
) -> ForwardOptions:
    """dtype, rematerialisation, attention and layout for rows of `length` tokens."""
    return ForwardOptions(
        dtype=jnp.dtype(settings.dtype),
        remat=settings.remat,
        attend=_attention(settings.attention, config, mesh, length, rules),
        constrain=sharding.constraints(mesh, rules),
        frozen_layers=config.layers - settings.last_k if settings.trainable == "last_k" else 0,
    )


def _attention(name: str, config: TransformerConfig, mesh: Mesh, length: int, rules: Rules):
    """`auto` is splash attention on TPUs where it takes the shapes. Raises UserError where `splash` cannot be."""
    platform = mesh.devices.flat[0].platform
    if name == "reference" or (name == "auto" and platform != "tpu"):
        return packed_attention
    from jaxprm.model.attention import BLOCKS, HEAD_DIM_DIVISOR, fits, splash_attention

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
    return splash_attention(mesh, **axes)


_TOKEN_FIELDS = ("tokens", "segments", "positions")
_TYPES = {"rewards": jnp.float32, "weights": jnp.float32} | dict.fromkeys(("is_first", "is_last", "valid"), jnp.bool_)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions with their shardings, and the shapes that they are called with; nothing is on a device.

    split: (parameters) -> (trained, frozen); init: (trained) -> state; train_step: (state, batch, frozen) ->
    (state, metrics); evaluation_step: (trained, batch, frozen) -> (promises, returns); features_step: (parameters,
    batch) -> hidden states, for the head alone. The first three donate their first argument where they can.
    parameters: of the whole model; state, frozen: as train_step takes them; all ShapeDtypeStructs with shardings.
    """

    graph: nnx.GraphDef
    forward_options: ForwardOptions
    split: Callable
    init: Callable
    train_step: Callable
    evaluation_step: Callable
    features_step: Callable
    parameters: Any
    state: Any
    frozen: Any


def make_programs(
    settings: config_lib.RewardModelConfig, config: TransformerConfig, mesh: Mesh, *, length: int, steps: int, seed: int
) -> Programs:
    """Of a reward model on a mesh, of devices that are there or only described.

    length: tokens of a row; steps: of the learning rate's schedule; seed: of adapters.

    Raises UserError where the model does not divide over the mesh or cannot be trained or computed as asked.
    """
    sharding.check_model(mesh, config)
    trainable.check_trainable(settings, config)
    graph = reward_model_graph(config)
    forward_options = make_forward_options(settings, config, mesh, length)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def split(parameters: Any) -> tuple[Any, Any]:
        return trainable.split(settings, parameters, jax.random.key(seed))

    parameters = sharding.with_shardings(mesh, reward_model.abstract(config))
    trained, frozen = sharding.with_shardings(mesh, jax.eval_shape(split, parameters))
    # Layers that are cut in two fit into no buffer of the whole.
    donated = () if settings.trainable == "last_k" else 0
    jitted_split = jax.jit(split, donate_argnums=donated, out_shardings=sharding.shardings((trained, frozen)))
    if settings.trainable == "head":  # batches bring what the frozen transformer said
        frozen = nnx.State({})
    optimizer = make_optimizer(
        learning_rate=settings.learning_rate,
        steps=steps,
        warmup_steps=round(settings.warmup_fraction * steps),
        weight_decay=settings.weight_decay,
        clip=settings.gradient_clip,
        head_multiplier=settings.head_multiplier,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
    )

    def init(trained: Any) -> Any:
        return initial_state(trained, optimizer, settings)

    def features_step(parameters: Any, batch: dict[str, jax.Array]) -> Any:
        model = nnx.merge(graph, parameters)
        found = hidden_states(model, batch, states=reads_states(settings), forward_options=forward_options)
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    state = sharding.with_shardings(mesh, jax.eval_shape(init, trained))
    places, frozen_at = sharding.shardings(state), sharding.shardings(frozen)
    return Programs(
        graph=graph,
        forward_options=forward_options,
        split=jitted_split,
        init=jax.jit(init, donate_argnums=0, out_shardings=places),
        # Pinned on both sides: left to the compiler, a parameter's sharding can drift, and the step compiles again.
        train_step=jax.jit(
            make_train_step(graph, optimizer, settings, forward_options),
            donate_argnums=0,
            in_shardings=(places, rows, frozen_at),
            out_shardings=(places, whole),
        ),
        evaluation_step=jax.jit(
            make_evaluation_step(graph, settings, forward_options),
            in_shardings=(places["parameters"], rows, frozen_at),
            out_shardings=whole,
        ),
        features_step=jax.jit(features_step, out_shardings=whole),
        parameters=parameters,
        state=state,
        frozen=frozen,
    )


def batch_fields(settings: config_lib.RewardModelConfig) -> tuple[str, ...]:
    """What the step functions read of a batch: with a frozen transformer its hidden states instead of tokens."""
    if settings.trainable != "head":
        return FIELDS
    kept = tuple(field for field in FIELDS if field not in features.Features.replaces)
    return kept + features.NAMES[: 1 + reads_states(settings)]


def batch_shapes(
    fields: Sequence[str], data: config_lib.DataConfig, config: TransformerConfig, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """These fields of a batch of `data.rows` rows, as `sharding.put_batch` makes it."""
    place = sharding.batch_sharding(mesh)

    def shape(field: str) -> jax.ShapeDtypeStruct:
        if field in features.NAMES:
            size, dtype = (data.rows, data.steps_per_row, config.hidden_size), jnp.float32
        else:
            size = (data.rows, data.length if field in _TOKEN_FIELDS else data.steps_per_row)
            dtype = _TYPES.get(field, jnp.int32)
        return jax.ShapeDtypeStruct(size, dtype, sharding=place)

    return {field: shape(field) for field in fields}
