"""How a reward model's forward passes are computed: its settings, on its mesh."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model.attention import packed_attention
from jaxprm.model.transformer import Compute, TransformerConfig
from jaxprm.training import sharding
from jaxprm.training.sharding import RULES, Rules


def make_compute(
    settings: config_lib.RewardModel, config: TransformerConfig, mesh: Mesh, length: int, rules: Rules = RULES
) -> Compute:
    """dtype, rematerialisation, attention and layout for rows of `length` tokens."""
    return Compute(
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
    from jaxprm.model.splash import BLOCKS, HEAD_DIMS, fits, splash_attention

    if platform != "tpu":
        raise UserError(f'attention = "splash" needs a TPU, the devices are {platform}; use "auto" or "reference"')
    shards = mesh.shape["sequence"]
    if not fits(length, config.head_dim, shards):
        if name == "auto":
            return packed_attention
        raise UserError(
            f'attention = "splash" needs data.length = {length} to be a multiple of {BLOCKS[-1] * shards} and the '
            f'model\'s head_dim = {config.head_dim} of {HEAD_DIMS}; use "auto" or "reference"'
        )
    axes = {name: getattr(rules, name) for name in ("batch", "heads", "kv_heads", "length")}
    return splash_attention(mesh, **axes)
