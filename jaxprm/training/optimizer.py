"""AdamW with warmup and cosine decay, gradient clipping, and a faster head."""

from __future__ import annotations

from typing import Any

import jax
import optax


def adamw(
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    weight_decay: float,
    clip: float,
    head_multiplier: float = 1.0,
) -> optax.GradientTransformation:
    """Decays matrices only: no norm, bias or head. Vectors under `blocks` have a layer axis; they are still vectors.

    Updates of the value head are multiplied by `head_multiplier`.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(warmup_steps, max(steps - 1, 1)),
        decay_steps=max(steps, 2),
        end_value=0.1 * learning_rate,
    )

    def is_head(path):
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

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-8, weight_decay=weight_decay, mask=matrices),
        optax.GradientTransformation(lambda _: optax.EmptyState(), speed_up),
    )
