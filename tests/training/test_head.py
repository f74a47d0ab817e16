"""The start of a value head: the first batch's values begin at the mean of its targets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprm.config import RewardModelConfig
from jaxprm.training.head import centred

ROWS, STEPS, WIDTH = 3, 6, 16


def batch(seed: int = 0) -> dict[str, jax.Array]:
    """Rows with two trajectories of two steps each, then two empty slots that hold NaN."""
    rng = np.random.default_rng(seed)
    valid = np.zeros((ROWS, STEPS), bool)
    valid[:, :4] = True
    is_last, rewards = np.zeros_like(valid), np.full((ROWS, STEPS), np.nan, np.float32)
    is_last[:, [1, 3]] = True
    rewards[:, [0, 2]], rewards[:, [1, 3]] = 0, rng.integers(0, 2, (ROWS, 2))
    weights = np.repeat(rng.integers(1, 4, (ROWS, 3)), 2, axis=1).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in vars_of(rewards, weights, is_last, valid).items()}


def vars_of(rewards, weights, is_last, valid) -> dict[str, np.ndarray]:
    return {"rewards": rewards, "weights": weights, "is_last": is_last, "valid": valid}


def features(seed: int, mean: float = 50.0) -> jax.Array:
    """Hidden states as of a real model: small differences around one large vector; NaN in empty slots."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=WIDTH)
    states = mean * shared / np.linalg.norm(shared) + rng.normal(size=(ROWS, STEPS, WIDTH))
    states[:, 4:] = np.nan
    return jnp.asarray(states, jnp.float32)


def mean(values, weights) -> float:
    return float(np.average(np.asarray(values, np.float64), weights=np.asarray(weights, np.float64)))


def outcomes_per_step(steps) -> np.ndarray:
    """The outcome of each step's trajectory, [ROWS, 4]."""
    return np.repeat(np.asarray(steps["rewards"])[:, [1, 3]], 2, axis=1)


HEAD = jnp.asarray(np.random.default_rng(5).normal(size=WIDTH) * 0.02 * 5, jnp.float32)


def test_the_mean_value_of_the_trained_steps_is_the_mean_outcome():
    steps, hidden = batch(), features(1)
    head = centred(HEAD, hidden, None, steps, RewardModelConfig(label="x", objective="pvm", beta=0.0))
    weights = np.asarray(steps["weights"])[:, :4]
    expected = mean(outcomes_per_step(steps), weights)
    assert mean(hidden[:, :4] @ head, weights) == pytest.approx(expected, abs=1e-5)
    assert abs(mean(hidden[:, :4] @ HEAD, weights) - expected) > 0.1  # without it the start is elsewhere


def test_only_the_last_steps_count_for_an_objective_that_trains_only_them():
    steps, hidden = batch(2), features(3)
    head = centred(HEAD, hidden, None, steps, RewardModelConfig(label="x", objective="orm", beta=0.0))
    weights = np.asarray(steps["weights"])[:, [1, 3]]
    expected = mean(np.asarray(steps["rewards"])[:, [1, 3]], weights)
    assert mean(hidden[:, [1, 3]] @ head, weights) == pytest.approx(expected, abs=1e-5)


def test_targets_that_lean_on_values_lean_on_the_mean_outcome():
    """By hand, for two steps: the last target is r, the first (1 - lambda) c + lambda r; c is the mean outcome."""
    steps, hidden, rate = batch(4), features(5), 0.5
    settings = RewardModelConfig(label="x", gae_lambda=rate)
    head = centred(HEAD, hidden, None, steps, settings)
    weights, outcomes = np.asarray(steps["weights"])[:, :4], outcomes_per_step(steps)
    targets = outcomes.copy()
    targets[:, [0, 2]] = (1 - rate) * mean(outcomes, weights) + rate * outcomes[:, [0, 2]]
    assert mean(hidden[:, :4] @ head, weights) == pytest.approx(mean(targets, weights), abs=1e-5)


def test_values_of_states_begin_at_the_same_mean():
    steps, hidden, states = batch(6), features(7), features(8)
    settings = RewardModelConfig(label="x", bootstrap="state", gae_lambda=1.0)
    head = centred(HEAD, hidden, states, steps, settings)
    weights = np.asarray(steps["weights"])[:, :4]
    expected = mean(outcomes_per_step(steps), weights)
    for read in (hidden, states):
        assert mean(read[:, :4] @ head, weights) == pytest.approx(expected, abs=1e-4)


def test_the_head_moves_along_the_mean_alone():
    """Differences between hidden states at a right angle to the mean vector keep the values of the random head."""
    steps, hidden = batch(), features(1)
    settings = RewardModelConfig(label="x", objective="pvm", beta=0.0)
    change = np.asarray(centred(HEAD, hidden, None, steps, settings) - HEAD, np.float64)
    weights = np.asarray(steps["weights"], np.float64)[:, :4, None]
    direction = (np.asarray(hidden, np.float64)[:, :4] * weights).sum((0, 1))
    cosine = abs(change @ direction) / np.linalg.norm(change) / np.linalg.norm(direction)
    assert cosine == pytest.approx(1, abs=1e-4)


def test_a_batch_without_a_step_leaves_the_head_as_it_is():
    steps = batch() | {"valid": jnp.zeros((ROWS, STEPS), bool)}
    head = centred(HEAD, features(1), None, steps, RewardModelConfig(label="x"))
    np.testing.assert_array_equal(head, HEAD)
