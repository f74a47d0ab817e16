"""Targets of a step's promise: TD(lambda), return-to-go and outcome.

Every array is [..., S], with S steps. The last axis is a row in which several trajectories may be packed, one after the
other. `is_last` marks the last step of each. Slots where `valid` is false (between or after trajectories) may hold
anything, NaN included. The steps of a trajectory are contiguous. Its last step must be marked: a trajectory without the
mark would be treated as if it ended with no reward.

jaxprm/objectives.py says which targets an objective uses, docs/method.md (sections 3 to 5) what follows from them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprm.objectives import BOOTSTRAPS, Bootstrap, find_objective


def lambda_returns(
    rewards: jax.Array, discounts: jax.Array, next_values: jax.Array, lambda_: jax.Array | float
) -> jax.Array:
    """Lambda-returns: one-step bootstraps mixed with full returns (Sutton and Barto, eq. 12.18; as in rlax).

    Backwards over t = S-1, ..., 0, with v_{t+1} given at t:

        G_t = r_t + discount_t * ((1 - lambda_t) * v_{t+1} + lambda_t * G_{t+1}),    G_S = v_S

    Args:
        rewards: [..., S], r_t.
        discounts: [..., S], 0 at the last step of an episode.
        next_values: [..., S], v_{t+1} stored at t.
        lambda_: a scalar, or [..., S].

    Returns:
        G, [..., S], in the widest dtype of the arguments, at least float32. Gradients are not stopped.

    Raises:
        ValueError: shapes differ.
    """
    rewards, discounts, next_values = _floats(rewards, discounts, next_values)
    _check_shapes(rewards, discounts=discounts, next_values=next_values)
    mixes = jnp.broadcast_to(jnp.asarray(lambda_, rewards.dtype), rewards.shape)

    def backward(following: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reward, discount, next_value, mix = step
        current = reward + discount * ((1 - mix) * next_value + mix * following)
        return current, current

    # scan runs over the leading axis.
    steps = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, discounts, next_values, mixes))
    # The carry starts as G_S = v_S: past the row there is only the bootstrap.
    _, returns = jax.lax.scan(backward, steps[2][-1], steps, reverse=True)
    return jnp.moveaxis(returns, 0, -1)


def td_lambda_targets(
    values: jax.Array,
    rewards: jax.Array,
    is_last: jax.Array,
    valid: jax.Array,
    *,
    gae_lambda: float,
    discount: float,
    bootstrap: Bootstrap = "action",
    state_values: jax.Array | None = None,
) -> jax.Array:
    """TD(lambda) targets of the promises M_t = M(s_t, a_t), computed from the promises, without gradient.

    For the steps t = 0, ..., T of each trajectory, Q^_T = r_T, and for t < T

        action:  Q^_t = (1 - lambda) M_t + lambda (r_t + gamma Q^_{t+1})
        next:    Q^_t = r_t + gamma ((1 - lambda) M_{t+1} + lambda Q^_{t+1})
        state:   Q^_t = r_t + gamma ((1 - lambda) V(s_{t+1}) + lambda Q^_{t+1})

    "action" is AgentPRM (Xi et al., arXiv 2511.08325, eq. 12-14) without the M_T that eq. 12 would add to r_T: with it
    the fixed point is 2 r_T before the last step (docs/method.md, section 4). "next" is SARSA(lambda).

    Args:
        values: [..., S], M_t.
        rewards: [..., S], r_t; for a sparse outcome 0 except at the last step.
        is_last, valid: bool [..., S].
        gae_lambda, discount: lambda and gamma, in [0, 1].
        state_values: [..., S], V(s_t) stored at t (read before action t). Needed by, and only by, bootstrap "state".

    Returns:
        [..., S] of at least float32, 0 in slots that are not valid.

    Raises:
        ValueError: shapes differ, `bootstrap` is unknown, or `state_values` is missing.
    """
    rewards, discounts = _separated(rewards, is_last, valid, discount)
    values = _masked(values, valid)
    _check_shapes(rewards, values=values)
    if bootstrap == "action":
        # The bootstrap M_t is known at step t, so it is added to the reward, and nothing is read from the next step.
        mixed = (1 - gae_lambda) * values + gae_lambda * rewards
        rewards, next_values = jnp.where(is_last, rewards, mixed), jnp.zeros_like(values)
    elif bootstrap == "next":
        next_values = _shift_left(values)
    elif bootstrap == "state":
        if state_values is None:
            raise ValueError('bootstrap "state" needs state_values; pass V(s_t), or use bootstrap "action" or "next"')
        next_values = _shift_left(_masked(state_values, valid))
    else:
        raise ValueError(f"bootstrap is {bootstrap!r}; use one of {', '.join(BOOTSTRAPS)}")
    return jax.lax.stop_gradient(lambda_returns(rewards, discounts, next_values, gae_lambda))


def returns_to_go(rewards: jax.Array, is_last: jax.Array, valid: jax.Array, *, discount: float = 1.0) -> jax.Array:
    """Monte Carlo return of each step, without gradient: G_t = r_t + gamma G_{t+1} for t < T, and G_T = r_T.

    With gamma = 1 and a reward at the end only, this is the trajectory's outcome at every step.

    Args:
        rewards, is_last, valid: [..., S].

    Returns:
        [..., S] of at least float32, 0 in slots that are not valid.
    """
    rewards, discounts = _separated(rewards, is_last, valid, discount)
    return jax.lax.stop_gradient(lambda_returns(rewards, discounts, jnp.zeros_like(rewards), 1.0))


def outcomes(rewards: jax.Array, is_last: jax.Array, valid: jax.Array) -> jax.Array:
    """Outcome of each trajectory, r_0 + ... + r_T, at its last step; 0 elsewhere. All arrays are [..., S]."""
    rewards, _ = _separated(rewards, is_last, valid, 1.0)
    is_first = jnp.concatenate([jnp.ones_like(is_last[..., :1]), is_last[..., :-1]], axis=-1)
    # A sum from the front is a return-to-go of the reversed row, in which the first step of a trajectory is its last.
    # Rewards of empty slots are 0 by now, so all slots may count as valid.
    sums = jnp.flip(returns_to_go(jnp.flip(rewards, -1), jnp.flip(is_first, -1), jnp.ones_like(valid)), -1)
    return jnp.where(valid & is_last, sums, 0)


def objective_targets(
    name: str,
    values: jax.Array,
    rewards: jax.Array,
    is_last: jax.Array,
    valid: jax.Array,
    *,
    gae_lambda: float,
    discount: float,
    bootstrap: Bootstrap = "action",
    state_values: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Targets of a training objective, and the steps it trains.

    - agentprm: `td_lambda_targets` at every step.
    - pvm: `returns_to_go` at every step.
    - orm: `outcomes`, at the last step only.
    - any other objective of jaxprm/objectives.py, registered or "module:attribute".

    Args:
        values, rewards, is_last, valid, gae_lambda, discount, bootstrap, state_values: as in `td_lambda_targets`.

    Returns:
        (targets, mask), both [..., S]; pass the mask as `valid` to the loss.

    Raises:
        UserError: there is no such objective.
        ValueError: shapes differ, or an option of the targets is unknown or missing.
    """
    settings = _TargetSettings(name, gae_lambda=gae_lambda, discount=discount, bootstrap=bootstrap)
    return find_objective(name).targets(values, rewards, is_last, valid, settings, state_values)


class _TargetSettings(NamedTuple):
    """The arguments of `objective_targets` as the settings of an objective; the other fields are their defaults."""

    objective: str
    gae_lambda: float
    discount: float
    bootstrap: str
    beta: float = 1.0
    progress_gradient: str = "both"
    target_update: str = "online"


def _separated(
    rewards: jax.Array, is_last: jax.Array, valid: jax.Array, discount: float
) -> tuple[jax.Array, jax.Array]:
    """(rewards, discounts) of a packed row; a discount of 0 at last steps and empty slots separates trajectories."""
    rewards = _masked(rewards, valid)
    _check_shapes(rewards, is_last=is_last, valid=valid)
    return rewards, discount * (valid & ~is_last).astype(rewards.dtype)


def _masked(x: jax.Array, valid: jax.Array) -> jax.Array:
    (x,) = _floats(x)
    _check_shapes(x, valid=valid)
    # A selection, because a product would keep NaN.
    return jnp.where(valid, x, 0)


def _floats(*arrays: jax.Array) -> list[jax.Array]:
    # At least float32, also for promises computed in bfloat16.
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return [jnp.asarray(x, dtype) for x in arrays]


def _shift_left(x: jax.Array) -> jax.Array:
    # The 0 at the end is never used: a last step has discount 0.
    return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)


def _check_shapes(reference: jax.Array, **arrays: jax.Array) -> None:
    for name, array in arrays.items():
        if jnp.shape(array) != reference.shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, expected {reference.shape}: give all as [..., S]")
