"""Optimizers from optax: AdamW or Adafactor, with a schedule, gradient clipping and a higher rate for the head."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from jaxprm import config as config_lib

FINAL_RATE = 0.1  # last rate of a decaying schedule, as a fraction of the learning rate


def make_schedule(
    name: Literal["cosine", "linear", "constant"], learning_rate: float, *, steps: int, warmup_steps: int
) -> optax.Schedule:
    """Linear warmup from 0 to `learning_rate`, then cosine or linear decay to a tenth of it, or a constant rate."""
    # optax refuses a decay of no steps, so a run of one step has a schedule of two.
    warmup, steps = min(warmup_steps, max(steps - 1, 1)), max(steps, 2)
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=learning_rate,
            warmup_steps=warmup,
            decay_steps=steps,
            end_value=FINAL_RATE * learning_rate,
        )
    final_rate = learning_rate if name == "constant" else FINAL_RATE * learning_rate
    decay = optax.linear_schedule(learning_rate, final_rate, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), decay], [warmup])


def reward_model_optimizer(settings: config_lib.RewardModelConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a reward model's training run of `steps` steps."""
    return make_optimizer(
        learning_rate=settings.learning_rate,
        steps=steps,
        warmup_steps=round(settings.warmup_fraction * steps),
        weight_decay=settings.weight_decay,
        clip=settings.gradient_clip,
        head_multiplier=settings.head_multiplier,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
    )


def make_optimizer(
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    weight_decay: float,
    clip: float,
    head_multiplier: float = 1.0,
    optimizer: Literal["adamw", "adafactor"] = "adamw",
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
) -> optax.GradientTransformation:
    """Gradient clipping by global norm, AdamW or Adafactor, and updates of the head times `head_multiplier`.

    Only matrices are decayed: no norm, bias or head. Adafactor keeps row and column means of a matrix's squared
    gradients instead of two moments, and no momentum. Its learning rate is absolute, like AdamW's, not relative to the
    size of a parameter.
    """
    rates = make_schedule(schedule, learning_rate, steps=steps, warmup_steps=warmup_steps)

    def is_head(path: Any) -> bool:
        return getattr(path[0], "key", None) in ("head", "head_bias")

    def matrices(parameters: Any) -> Any:
        def is_matrix(path, leaf):
            # Arrays of `blocks` have a layer axis in front: a stack of vectors is no matrix.
            stacked = any(getattr(key, "key", None) == "blocks" for key in path)
            return leaf.ndim - stacked >= 2 and not is_head(path)

        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    def scale_head(updates, state, parameters=None):
        del parameters
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * head_multiplier if is_head(path) else leaf, updates
        )
        return scaled, state

    if optimizer == "adamw":
        update = optax.adamw(rates, b1=0.9, b2=0.98, eps=1e-8, weight_decay=weight_decay, mask=matrices)
    else:
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay, mask=matrices),
            optax.scale_by_learning_rate(rates),
        )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        update,
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_head),
    )
