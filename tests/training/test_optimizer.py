"""What is decayed, what is faster, and the schedule, in updates computed by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprm.training.optimizer import make_optimizer, make_schedule

SETTINGS = {"learning_rate": 0.1, "steps": 10, "warmup_steps": 0, "weight_decay": 0.5, "clip": 1e9}


def first_update(parameters, gradients, **changes):
    optimizer = make_optimizer(**SETTINGS | changes)
    return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]


def test_matrices_decay_and_vectors_do_not_stacked_or_not():
    parameters = {
        "head": jnp.ones(3),
        "transformer": {
            "blocks": {"query": jnp.ones((2, 3, 3)), "norm": jnp.ones((2, 3))},
            "embedding": jnp.ones((4, 3)),
            "norm": jnp.ones(3),
        },
    }
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates = first_update(parameters, zeros)
    # Without a gradient an update is the decay alone: minus learning rate times 0.5 times 1.
    np.testing.assert_allclose(updates["transformer"]["blocks"]["query"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["transformer"]["embedding"], -0.05, rtol=1e-6)
    for vector in (updates["head"], updates["transformer"]["norm"], updates["transformer"]["blocks"]["norm"]):
        np.testing.assert_array_equal(vector, 0)


def test_the_head_moves_faster_by_its_multiplier():
    parameters = {"head": jnp.zeros(2), "other": jnp.zeros(2)}
    gradients = {"head": jnp.array([1.0, -2.0]), "other": jnp.array([1.0, -2.0])}
    updates = first_update(parameters, gradients, head_multiplier=7.0)
    # Adam's first update is the learning rate against the sign of the gradient.
    np.testing.assert_allclose(updates["other"], [-0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(updates["head"], [-0.7, 0.7], rtol=1e-5)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    parameters, gradients = {"other": jnp.zeros(1)}, {"other": jnp.ones(1)}
    optimizer = make_optimizer(**SETTINGS | {"warmup_steps": 4, "steps": 12})
    state, rates = optimizer.init(parameters), []
    for _ in range(13):
        updates, state = optimizer.update(gradients, state, parameters)
        rates.append(-float(updates["other"][0]))
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1], rel=1e-4)
    assert rates[8] == pytest.approx((0.1 + 0.01) / 2, rel=1e-4)  # the middle of the cosine
    assert rates[12] == pytest.approx(0.01, rel=1e-4)


def test_a_run_of_one_step_has_a_schedule():
    updates = first_update({"other": jnp.zeros(1)}, {"other": jnp.ones(1)}, steps=1, warmup_steps=0)
    assert np.isfinite(updates["other"]).all()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [0, 0.05, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0, 0.05, 0.1, 0.0775, 0.055, 0.01]),
        ("cosine", [0, 0.05, 0.1, 0.1 * (0.1 + 0.9 * (1 + 2**-0.5) / 2), 0.055, 0.01]),
    ],
)
def test_schedules_by_name(name, expected):
    """Two steps of warmup to 0.1, then eight to a tenth: the rates after 0, 1, 2, 4, 6 and 10 steps."""
    schedule = make_schedule(name, 0.1, steps=10, warmup_steps=2)
    assert [float(schedule(step)) for step in (0, 1, 2, 4, 6, 10)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_without_warmup_the_first_step_has_the_whole_rate(name):
    assert float(make_schedule(name, 0.1, steps=10, warmup_steps=0)(0)) == pytest.approx(0.1)


def test_adafactor_keeps_rows_and_columns_and_its_rate_is_absolute():
    parameters = {"matrix": jnp.full((128, 256), 5.0), "head": jnp.zeros(2)}
    optimizer = make_optimizer(**SETTINGS | {"optimizer": "adafactor", "weight_decay": 0.0, "head_multiplier": 7.0})
    state = optimizer.init(parameters)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sizes) < 128 + 256 + 16
    gradients = {"matrix": jnp.ones((128, 256)), "head": jnp.array([1.0, -2.0])}
    updates, _ = optimizer.update(gradients, state, parameters)
    # A gradient over the root of its own mean square is one; times the rate, whatever the parameter's size.
    np.testing.assert_allclose(updates["matrix"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["head"], [-0.7, 0.7], rtol=1e-4)
