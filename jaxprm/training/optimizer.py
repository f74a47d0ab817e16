"""AdamW or Adafactor with a schedule, gradient clipping, and a faster head; all of them optax's."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

FINAL_RATE = 0.1  # of the learning rate, at the end of a schedule that decays


def make_schedule(
    name: Literal["cosine", "linear", "constant"], learning_rate: float, *, steps: int, warmup_steps: int
) -> optax.Schedule:
    """Linear warmup to `learning_rate`, then to a tenth of it along a cosine or a line, or nowhere."""
    warmup, steps = min(warmup_steps, max(steps - 1, 1)), max(steps, 2)
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=learning_rate,
            warmup_steps=warmup,
            decay_steps=steps,
            end_value=FINAL_RATE * learning_rate,
        )
    last = learning_rate if name == "constant" else FINAL_RATE * learning_rate
    after = optax.linear_schedule(learning_rate, last, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup])


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
    """Decays matrices only: no norm, bias or head. Vectors under `blocks` have a layer axis; they are still vectors.

    Updates of the value head are multiplied by `head_multiplier`. Adafactor keeps row and column means of a matrix's
    squared gradients in place of two moments, and no momentum; its learning rate is absolute, as AdamW's, not relative
    to the size of a parameter.
    """
    rates = make_schedule(schedule, learning_rate, steps=steps, warmup_steps=warmup_steps)

    def is_head(path: Any) -> bool:
        return getattr(path[0], "key", None) in ("head", "head_bias")

    def matrices(parameters: Any) -> Any:
        def is_matrix(path, leaf):
            stacked = any(getattr(key, "key", None) == "blocks" for key in path)
            return leaf.ndim - stacked >= 2 and not is_head(path)

        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    def speed_up(updates, state, parameters=None):
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
        optax.GradientTransformation(lambda _: optax.EmptyState(), speed_up),
    )
