"""Targets against naive float64 recursions, hand numbers, and every consequence of the equations (GAE, eq. 12-14)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.targets import BOOTSTRAPS, lambda_returns, objective_targets, outcomes, returns_to_go, td_lambda_targets

ROW = 24  # one shape for all property tests, so that each function compiles once
unit = st.floats(0, 1, width=32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gae_targets(values, outcome, lambda_, before_first=0.0, keep_last_value=False):
    """Equations (12)-(14) word for word for gamma = 1: a double loop over one trajectory."""
    last = len(values) - 1
    m = lambda t: values[t] if t >= 0 else before_first
    deltas = [m(t) - m(t - 1) for t in range(last)]
    deltas.append(outcome + (values[last] if keep_last_value else 0.0) - m(last - 1))
    targets = []
    for t in range(last):
        advantage = sum(lambda_ ** (k - t) * deltas[k] for k in range(t, last + 1))
        targets.append(advantage + m(t - 1))
    return np.array([*targets, outcome])


def naive_targets(values, rewards, states, lambda_, gamma, bootstrap):
    """The recursion of one trajectory, from the back."""
    targets = [0.0] * len(values)
    targets[-1] = rewards[-1]
    for t in reversed(range(len(values) - 1)):
        if bootstrap == "action":
            targets[t] = (1 - lambda_) * values[t] + lambda_ * (rewards[t] + gamma * targets[t + 1])
        else:
            ahead = values[t + 1] if bootstrap == "next" else states[t + 1]
            targets[t] = rewards[t] + gamma * ((1 - lambda_) * ahead + lambda_ * targets[t + 1])
    return targets


def single(length):
    valid = np.ones(length, bool)
    return np.arange(length) == length - 1, valid


compiled_targets = jax.jit(td_lambda_targets, static_argnames="bootstrap")  # property tests run it hundreds of times


def td(values, rewards, is_last, valid, gae_lambda=0.95, discount=1.0, **kwargs):
    kwargs |= {"gae_lambda": gae_lambda, "discount": discount}
    return np.asarray(compiled_targets(values, rewards, is_last, valid, **kwargs))


@st.composite
def packed_rows(draw):
    """A row of ROW slots: trajectories with gaps between and after, NaN and stray flags in the gaps."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 2)), min_size=1, max_size=5))
    row = {name: np.full(ROW, np.nan) for name in ("values", "rewards", "states")}
    row |= {"valid": np.zeros(ROW, bool), "is_last": random.random(ROW) < 0.5}
    spans, start = [], 0
    for length, gap in lengths:
        if start + length > ROW:
            break
        span = slice(start, start + length)
        for name in ("values", "rewards", "states"):
            row[name][span] = random.normal(size=length)
        row["valid"][span] = True
        row["is_last"][span] = np.arange(length) == length - 1
        spans.append(span)
        start += length + gap
    return row, spans


def test_lambda_returns_of_a_hand_computed_row():
    # From the back, with lambda .5: G_2 = 3 + .5 * 8 = 7;  G_1 = 2 + 1 * (.5 * 4 + .5 * 7) = 7.5;  G_0 = 1 + 0 = 1.
    got = lambda_returns(np.array([1.0, 2, 3]), np.array([0, 1, 0.5]), np.array([9.0, 4, 8]), 0.5)
    np.testing.assert_allclose(got, [1, 7.5, 7])


def test_lambda_returns_takes_one_lambda_per_step():
    # G_1 = 1 + 6 = 7;  G_0 = 1 + (.75 * 2 + .25 * 7) = 4.25.
    got = lambda_returns(np.ones(2), np.ones(2), np.array([2.0, 6.0]), np.array([0.25, 0.9]))
    np.testing.assert_allclose(got, [4.25, 7])


def test_hand_computed_targets_of_each_bootstrap():
    values, rewards, states = np.array([0.2, 0.6, 0.9]), np.array([0.0, 0.0, 1.0]), np.array([0.1, 0.4, 0.8])
    is_last, valid = single(3)
    arguments = dict(gae_lambda=0.5, state_values=states)
    np.testing.assert_allclose(td(values, rewards, is_last, valid, **arguments), [0.5, 0.8, 1])
    np.testing.assert_allclose(td(values, rewards, is_last, valid, bootstrap="next", **arguments), [0.775, 0.95, 1])
    np.testing.assert_allclose(td(values, rewards, is_last, valid, bootstrap="state", **arguments), [0.65, 0.9, 1])


@given(st.lists(unit, min_size=1, max_size=20), unit, unit, st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_the_paper_s_gae_for_a_sparse_outcome(values, outcome, lambda_, before_first):
    count = len(values)
    padded, rewards = np.zeros(ROW), np.zeros(ROW)
    padded[:count], rewards[count - 1] = values, outcome
    is_last, valid = np.arange(ROW) == count - 1, np.arange(ROW) < count
    got = td(padded, rewards, is_last, valid, gae_lambda=lambda_)
    # M_{-1} does not exist; whatever stands for it cancels.
    expected = gae_targets(values, outcome, lambda_, before_first=before_first)
    np.testing.assert_allclose(got[:count], expected, rtol=0, atol=1e-13)


def test_the_last_value_is_not_added_to_the_outcome():
    """Equation (12) read literally has the fixed point 2r before the last step; without M_T it is the outcome."""
    is_last, valid = single(4)
    rewards = np.array([0, 0, 0, 0.7])
    literal, ours = np.zeros(4), np.zeros(4)
    for _ in range(400):
        literal = gae_targets(literal, 0.7, 0.9, keep_last_value=True)
        ours = gae_targets(ours, 0.7, 0.9)
    np.testing.assert_allclose(literal, [1.4, 1.4, 1.4, 0.7])
    np.testing.assert_allclose(td(ours, rewards, is_last, valid, gae_lambda=0.9), [0.7] * 4)
    changed = ours + np.array([0, 0, 0, 5.0])
    np.testing.assert_array_equal(
        td(changed, rewards, is_last, valid, gae_lambda=0.9), td(ours, rewards, is_last, valid, gae_lambda=0.9)
    )


@given(packed_rows(), unit, unit, st.sampled_from(BOOTSTRAPS))
@settings(max_examples=80, deadline=None)
def test_packed_rows_equal_each_trajectory_alone(packed, lambda_, gamma, bootstrap):
    """Dense rewards, any gamma, gaps full of NaN: nothing leaks across a boundary and empty slots get 0."""
    row, spans = packed
    got = td(
        row["values"],
        row["rewards"],
        row["is_last"],
        row["valid"],
        gae_lambda=lambda_,
        discount=gamma,
        bootstrap=bootstrap,
        state_values=row["states"],
    )
    expected = np.zeros(ROW)
    for span in spans:
        trajectory = (row[name][span] for name in ("values", "rewards", "states"))
        expected[span] = naive_targets(*trajectory, lambda_, gamma, bootstrap)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_a_trajectory_ignores_its_neighbours_in_the_row(bootstrap):
    random = np.random.default_rng(0)
    values, rewards, states = random.normal(size=(3, 9))
    is_last, valid = np.isin(np.arange(9), [2, 5, 8]), np.ones(9, bool)
    arguments = dict(bootstrap=bootstrap, discount=0.9)
    before = td(values, rewards, is_last, valid, state_values=states, **arguments)
    outside = (np.arange(9) < 3) | (np.arange(9) > 5)
    after = td(values + outside, rewards - outside, is_last, valid, state_values=states + 3 * outside, **arguments)
    np.testing.assert_array_equal(after[3:6], before[3:6])
    assert np.all(after[outside] != before[outside])


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_lambda_one_gives_the_outcome_at_every_step(bootstrap):
    random = np.random.default_rng(1)
    is_last, valid = np.isin(np.arange(7), [3, 6]), np.ones(7, bool)
    rewards = np.array([0, 0, 0, 0.25, 0, 0, 1.0])
    arguments = dict(gae_lambda=1.0, bootstrap=bootstrap, state_values=np.ones(7))
    got = td(random.normal(size=7), rewards, is_last, valid, **arguments)
    np.testing.assert_array_equal(got, [0.25] * 4 + [1.0] * 3)


def test_lambda_zero_makes_each_value_its_own_target_but_only_for_action():
    values, rewards, states = np.array([0.3, 0.5, 0.9]), np.array([0.0, 0.0, 1.0]), np.array([0.1, 0.6, 0.7])
    is_last, valid = single(3)
    np.testing.assert_array_equal(td(values, rewards, is_last, valid, gae_lambda=0.0), [0.3, 0.5, 1.0])
    sarsa = td(values, rewards, is_last, valid, gae_lambda=0.0, bootstrap="next")
    np.testing.assert_array_equal(sarsa, [0.5, 0.9, 1.0])
    state = td(values, rewards, is_last, valid, gae_lambda=0.0, bootstrap="state", state_values=states)
    np.testing.assert_array_equal(state, [0.6, 0.7, 1.0])


def test_lambda_weighs_every_residual_but_the_last():
    """M_t - Q^_t = lambda (M_t - Q^_{t+1}) before the last step, M_T - r_T at it."""
    random = np.random.default_rng(2)
    values, rewards = random.normal(size=6), np.eye(6)[5]
    targets = td(values, rewards, *single(6), gae_lambda=0.6)
    np.testing.assert_allclose((values - targets)[:-1], 0.6 * (values[:-1] - targets[1:]))
    assert targets[-1] == 1


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_true_values_of_a_deterministic_chain_are_their_own_targets(bootstrap, gae_lambda):
    rewards, gamma = np.array([0.5, -1.0, 0.25, 2.0]), 0.8
    truth = np.array([sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(4)])
    got = td(truth, rewards, *single(4), gae_lambda=gae_lambda, discount=gamma, bootstrap=bootstrap, state_values=truth)
    np.testing.assert_allclose(got, truth)


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_no_gradient_flows_through_the_targets(bootstrap):
    def total(values, rewards, states):
        arguments = dict(gae_lambda=0.5, discount=0.9, bootstrap=bootstrap, state_values=states)
        return jnp.sum(td_lambda_targets(values, rewards, *single(3), **arguments) ** 2)

    gradients = jax.grad(total, argnums=(0, 1, 2))(*np.ones((3, 3)))
    np.testing.assert_array_equal(gradients, np.zeros((3, 3)))


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_jit_vmap_and_leading_axes_agree(bootstrap):
    random = np.random.default_rng(3)
    values, rewards, states = random.normal(size=(3, 2, 4, 10))
    valid = random.random((2, 4, 10)) < 0.8
    is_last = random.random((2, 4, 10)) < 0.3

    def targets(*row):
        *row, state_values = row
        return td_lambda_targets(*row, gae_lambda=0.7, discount=0.9, bootstrap=bootstrap, state_values=state_values)

    rows = (values, rewards, is_last, valid, states)
    batched = targets(*rows)
    one_by_one = np.array([[targets(*(x[i, j] for x in rows)) for j in range(4)] for i in range(2)])
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(targets)(*rows), batched, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.vmap(targets))(*rows), batched, rtol=1e-12)


def test_low_precision_values_give_float32_targets():
    values = jnp.asarray([0.5, 0.5], jnp.bfloat16)
    got = td_lambda_targets(values, jnp.float32([0, 1]), *single(2), gae_lambda=0.95, discount=1.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [0.975, 1], rtol=1e-6)


def test_soft_outcomes_are_not_rounded():
    np.testing.assert_array_equal(returns_to_go(np.array([0, 0, 0.7]), *single(3)), [0.7, 0.7, 0.7])


@given(packed_rows(), unit)
@settings(max_examples=40, deadline=None)
def test_returns_to_go_and_outcomes_of_packed_rows(packed, gamma):
    row, spans = packed
    returns, sums = np.zeros(ROW), np.zeros(ROW)
    for span in spans:
        rewards = row["rewards"][span]
        returns[span] = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        sums[span.stop - 1] = rewards.sum()
    flags = row["is_last"], row["valid"]
    got = jax.jit(returns_to_go)(row["rewards"], *flags, discount=gamma)
    np.testing.assert_allclose(got, returns, rtol=0, atol=1e-12)
    np.testing.assert_allclose(jax.jit(outcomes)(row["rewards"], *flags), sums, rtol=0, atol=1e-12)


def test_objectives_name_their_targets_and_steps():
    values = np.array([0.2, 0.6, 9.0, 0.4, 0.5])
    rewards = np.array([0, 1.0, 9.0, 0.5, 0.25])
    is_last, valid = np.array([0, 1, 0, 0, 1], bool), np.array([1, 1, 0, 1, 1], bool)
    run = lambda name: objective_targets(name, values, rewards, is_last, valid, gae_lambda=0.5, discount=1.0)
    targets, mask = run("agentprm")
    np.testing.assert_allclose(targets, [0.6, 1, 0, 0.5 * 0.4 + 0.5 * 0.75, 0.25])
    np.testing.assert_array_equal(mask, valid)
    targets, mask = run("pvm")
    np.testing.assert_allclose(targets, [1, 1, 0, 0.75, 0.25])
    np.testing.assert_array_equal(mask, valid)
    targets, mask = run("orm")
    np.testing.assert_allclose(targets[mask], [1, 0.75])
    np.testing.assert_array_equal(mask, is_last)


def test_mistakes_are_named():
    row = (np.ones(3), np.ones(3), *single(3))
    with pytest.raises(ValueError, match="state_values"):
        td(*row, bootstrap="state")
    with pytest.raises(ValueError, match="'mean'.*action, next, state"):
        td(*row, bootstrap="mean")
    with pytest.raises(ValueError, match=r"is_last has shape \(2,\)"):
        td(np.ones(3), np.ones(3), np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ValueError, match="discounts has shape"):
        lambda_returns(np.ones(3), np.ones(()), np.ones(3), 1.0)
    with pytest.raises(ValueError, match="'mc'.*agentprm, pvm, orm"):
        objective_targets("mc", *row, gae_lambda=1.0, discount=1.0)
