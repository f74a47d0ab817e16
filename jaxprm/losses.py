"""The loss of AgentPRM (Xi et al., arXiv 2511.08325, eq. 4, 9 and 10) over packed rows of steps, and those of labels.

Arrays are [..., S], packed as in jaxprm/targets.py: M_t are the promises, Q^_t their targets, w_t the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprm.objectives import PROGRESS_GRADIENTS, ProgressGradient, check_objective

__all__ = ["LossSums", "agent_prm_loss", "agent_prm_sums", "check_objective", "label_sums", "preference_sums"]


class LossSums(NamedTuple):
    """Sums over steps, float scalars. For microbatches: add them and their gradients, then divide by the weight."""

    value: jax.Array  # sum of w_t * 1/2 (M_t - Q^_t)^2
    progress: jax.Array  # sum of w_t * 1/2 ((M_t - M_{t-1}) - (Q^_t - Q^_{t-1}))^2
    weight: jax.Array  # sum of w_t over all valid steps, the denominator of both

    def means(self, beta: float) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, {"value_loss", "progress_loss", "weight"}), scalars; all 0 for a batch without valid steps."""
        # A batch without valid steps would divide 0 by 0.
        total = jnp.where(self.weight > 0, self.weight, 1)
        value, progress = self.value / total, self.progress / total
        return value + beta * progress, {"value_loss": value, "progress_loss": progress, "weight": self.weight}


def agent_prm_loss(
    values: jax.Array,
    targets: jax.Array,
    is_first: jax.Array,
    valid: jax.Array,
    *,
    beta: float,
    weights: jax.Array | None = None,
    progress_gradient: ProgressGradient = "both",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """AgentPRM's loss L = L_Q + beta L_A (eq. 10): means over the valid steps of the whole batch.

    With sums over all trajectories and their steps t = 0, ..., T:

        L_Q = sum_{t >= 0} w_t 1/2 (M_t - Q^_t)^2 / sum_{t >= 0} w_t                                 (4)
        L_A = sum_{t >= 1} w_t 1/2 ((M_t - M_{t-1}) - (Q^_t - Q^_{t-1}))^2 / sum_{t >= 0} w_t        (9)

    L_A has no term at a trajectory's first step, but the same denominator as L_Q. With "both" (the paper) its gradient
    flows through M_t and M_{t-1}, which for a policy that samples pulls each promise towards the one before. With
    "previous" it flows through M_{t-1} alone, and the true promise is the fixed point (docs/method.md, section 4). The
    value of the loss is the same.

    The loss of a state readout, mean 1/2 (V(s_t) - Q^_t)^2, is this one with V(s_t) as the values and beta = 0.

    Args:
        values, targets: [..., S], M_t and Q^_t; no gradient flows through the targets.
        is_first, valid: bool [..., S]. Pass the mask of `targets.objective_targets` as `valid`.
        beta: the weight of L_A.
        weights: [..., S], w_t: how often the step's trajectory was sampled; default 1.
        progress_gradient: "both" or "previous".

    Returns:
        (loss, {"value_loss", "progress_loss", "weight"}), scalars; "weight" is the denominator.

    Raises:
        ValueError: `progress_gradient` is unknown.
    """
    sums = agent_prm_sums(values, targets, is_first, valid, weights=weights, progress_gradient=progress_gradient)
    return sums.means(beta)


def agent_prm_sums(
    values: jax.Array,
    targets: jax.Array,
    is_first: jax.Array,
    valid: jax.Array,
    *,
    weights: jax.Array | None = None,
    progress_gradient: ProgressGradient = "both",
) -> LossSums:
    """The sums of `agent_prm_loss`, for a caller that divides later (gradient accumulation). Same arguments."""
    if progress_gradient not in PROGRESS_GRADIENTS:
        raise ValueError(f"progress_gradient is {progress_gradient!r}; use one of {', '.join(PROGRESS_GRADIENTS)}")
    values = jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))
    # Masked before any arithmetic: NaN in an empty slot would otherwise reach the gradient, as 0 * NaN.
    error = jnp.where(valid, values, 0) - jnp.where(valid, jax.lax.stop_gradient(targets), 0)
    weight = jnp.where(valid, jnp.ones_like(values) if weights is None else weights, 0)
    current = jax.lax.stop_gradient(error) if progress_gradient == "previous" else error
    # The slot before must hold a step, whatever `is_first` says.
    has_previous = valid & ~is_first & _shift_right(valid)
    # (M_t - M_{t-1}) - (Q^_t - Q^_{t-1}) = e_t - e_{t-1} with the errors e_t = M_t - Q^_t.
    change = jnp.where(has_previous, current - _shift_right(error), 0)
    return LossSums(jnp.sum(weight * error**2) / 2, jnp.sum(weight * change**2) / 2, jnp.sum(weight))


def label_sums(
    values: jax.Array, targets: jax.Array, weights: jax.Array, *, log_odds: jax.Array | None = None
) -> LossSums:
    """The loss of step labels: with a target y in [0, 1] for each step,

        bce:  sum_t w_t (log(1 + exp(z_t)) - y_t z_t),    M_t = 1 / (1 + exp(-z_t))                     (H)
        mse:  sum_t w_t 1/2 (M_t - y_t)^2                                                               (I)

    (H) is the cross-entropy -y log M - (1 - y) log(1 - M) of a head of two labels, for y in {0, 1} that of TRL's
    PRMTrainer. It is computed from z_t, the difference of the two outputs, because log(1 - M) overflows near M = 1.

    Args:
        values, targets, weights: [..., S], M_t, y_t and w_t; only steps with a weight above 0 are read.
        log_odds: [..., S], z_t, for (H); None for (I).
    """
    trained = weights > 0
    targets = jnp.where(trained, targets, 0)
    if log_odds is None:
        losses = (jnp.where(trained, values, 0) - targets) ** 2 / 2
    else:
        log_odds = jnp.where(trained, log_odds, 0)
        losses = jax.nn.softplus(log_odds) - targets * log_odds
    weights = jnp.where(trained, weights, 0)
    return LossSums(jnp.sum(weights * losses), jnp.zeros(()), jnp.sum(weights))


class PairSums(NamedTuple):
    """The loss of pairs, and sums for metrics: w of the pairs in order, and w (M+ - M-)."""

    loss: LossSums
    ordered: jax.Array
    margins: jax.Array


def preference_sums(values: jax.Array, step_index: jax.Array, valid: jax.Array, weights: jax.Array) -> PairSums:
    """The Bradley-Terry loss of pairs: sum over pairs of w (-log sigmoid(M+ - M-))                     (J)

    M+ is the promise of the chosen action, M- that of a rejected one in the same state. A pair counts as ordered if
    M+ > M-, and half if they are equal.

    Args:
        values, valid, weights: [..., S]. The first step of a trajectory is its chosen action, the others are rejected.
        step_index: int [..., S], index of the step in its trajectory.
    """
    values = jnp.where(valid, values, 0)
    slots = jnp.arange(values.shape[-1]) - step_index
    margins = jnp.take_along_axis(values, jnp.where(valid, slots, 0), axis=-1) - values
    weights = jnp.where(valid & (step_index > 0), weights, 0)
    loss = LossSums(jnp.sum(weights * jax.nn.softplus(-margins)), jnp.zeros(()), jnp.sum(weights))
    ordered = jnp.sum(weights * ((margins > 0) + 0.5 * (margins == 0)))
    return PairSums(loss, jax.lax.stop_gradient(ordered), jax.lax.stop_gradient(jnp.sum(weights * margins)))


def _shift_right(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)
