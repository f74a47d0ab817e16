"""The loss of AgentPRM (eq. 4, 9, 10) over packed rows of steps, and the check of its settings."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxprm.errors import UserError
from jaxprm.targets import BOOTSTRAPS, OBJECTIVES

ProgressGradient = Literal["both", "previous"]
PROGRESS_GRADIENTS: tuple[str, ...] = get_args(ProgressGradient)


class LossSums(NamedTuple):
    """Scalar sums over steps. Over microbatches add them and their gradients, then divide by the total weight."""

    value: jax.Array  # sum of w_t * 1/2 (M_t - Q^_t)^2
    progress: jax.Array  # sum of w_t * 1/2 ((M_t - M_{t-1}) - (Q^_t - Q^_{t-1}))^2
    weight: jax.Array  # sum of w_t over all valid steps: the denominator of both

    def means(self, beta: float) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, {"value_loss", "progress_loss", "weight"}); all 0 for a batch without valid steps."""
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
    """L = L_Q + beta L_A (eq. 10), means over the valid steps of the whole batch.

        L_Q = sum_t w_t 1/2 (M_t - Q^_t)^2 / sum_t w_t                                    (4)
        L_A = sum_{t > 0} w_t 1/2 ((M_t - M_{t-1}) - (Q^_t - Q^_{t-1}))^2 / sum_t w_t     (9)

    L_A has no term at a trajectory's first step, but the same denominator as L_Q. With "both" (the paper) its gradient
    flows through M_t and M_{t-1}, which for a stochastic policy pulls each promise towards the one before; with
    "previous" it flows through M_{t-1} alone, and the true promise is the fixed point. The loss's value is the same.

    The loss of a state readout, mean 1/2 (V(s_t) - Q^_t)^2, is this one with V(s_t) as the values and beta = 0.

    Args:
        values, targets: [..., S]; no gradient flows through the targets.
        is_first, valid: bool [..., S]. A mask from `objective_targets` is given as `valid`.
        beta: the weight of L_A.
        weights: [..., S], w_t: how often the step's trajectory was sampled; 1 if not given.
        progress_gradient: "both" or "previous".

    Returns:
        (loss, {"value_loss", "progress_loss", "weight"}), scalars; "weight" is the denominator.
    """
    options = {"weights": weights, "progress_gradient": progress_gradient}
    return agent_prm_sums(values, targets, is_first, valid, **options).means(beta)


def agent_prm_sums(
    values: jax.Array,
    targets: jax.Array,
    is_first: jax.Array,
    valid: jax.Array,
    *,
    weights: jax.Array | None = None,
    progress_gradient: ProgressGradient = "both",
) -> LossSums:
    """The sums behind `agent_prm_loss`, of the same arguments, for a caller that divides later (e.g. accumulation)."""
    if progress_gradient not in PROGRESS_GRADIENTS:
        raise ValueError(f"progress_gradient is {progress_gradient!r}; use one of {', '.join(PROGRESS_GRADIENTS)}")
    values = jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))
    # Masked before any arithmetic, so that garbage in an empty slot reaches neither the loss nor its gradient.
    error = jnp.where(valid, values, 0) - jnp.where(valid, jax.lax.stop_gradient(targets), 0)
    weight = jnp.where(valid, jnp.ones_like(values) if weights is None else weights, 0)
    current = jax.lax.stop_gradient(error) if progress_gradient == "previous" else error
    follows = valid & ~is_first & _shift_right(valid)
    change = jnp.where(follows, current - _shift_right(error), 0)
    return LossSums(jnp.sum(weight * error**2) / 2, jnp.sum(weight * change**2) / 2, jnp.sum(weight))


def check_objective(
    name: str,
    *,
    beta: float,
    gae_lambda: float,
    discount: float,
    bootstrap: str = "action",
    progress_gradient: str = "both",
    dense_rewards: bool = False,
) -> None:
    """Refuses settings that cannot be trained, or would train something other than what they say.

    Args:
        name: the objective: agentprm, pvm or orm.
        dense_rewards: whether any step but the last of some trajectory has a reward.

    Raises:
        UserError: one line with the field, its value, the bound and the fix.
    """
    _check_choice("objective", name, OBJECTIVES)
    _check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    _check_choice("progress_gradient", progress_gradient, PROGRESS_GRADIENTS)
    for field, value in (("gae_lambda", gae_lambda), ("discount", discount)):
        if not 0 <= value <= 1:
            raise UserError(f"{field} is {value}: it must be in [0, 1]")
    if not 0 <= beta < float("inf"):
        raise UserError(f"beta is {beta}: it must be finite and not negative; 0 leaves the progress loss out")
    if beta and name != "agentprm":
        raise UserError(
            f"beta is {beta} with objective {name}, which has no progress loss: set beta to 0 or use agentprm"
        )
    if beta and (discount != 1 or dense_rewards):
        cause = f"discount {discount}" if discount != 1 else "rewards before the last step"
        raise UserError(
            f"beta is {beta} with {cause}: progress needs discount 1 and a single final reward; set beta to 0"
        )
    if name == "agentprm" and bootstrap == "action" and gae_lambda == 0:
        raise UserError(
            "gae_lambda is 0 with bootstrap action: only last steps would learn; use gae_lambda > 0 or bootstrap next"
        )


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} is {value!r}: use one of {', '.join(choices)}")


def _shift_right(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)
