"""The loss against naive loops, its weights and denominators, and its fixed points on small decision trees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.losses import LossSums, agent_prm_loss, agent_prm_sums
from jaxprm.targets import td_lambda_targets

compiled_loss = jax.jit(agent_prm_loss, static_argnames="progress_gradient")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def packed(seed, rows=2, length=16):
    """Rows of trajectories of 1 to 5 steps with gaps; everything in the gaps is garbage."""
    random = np.random.default_rng(seed)
    values, targets = random.normal(size=(2, rows, length))
    weights = random.integers(1, 5, size=(rows, length)).astype(float)
    is_first, valid = random.random((rows, length)) < 0.5, np.zeros((rows, length), bool)
    for row in range(rows):
        start = random.integers(0, 3)
        while start < length:
            stop = min(start + random.integers(1, 6), length)
            valid[row, start:stop] = True
            is_first[row, start:stop] = np.arange(stop - start) == 0
            start = stop + random.integers(0, 3)
    values[~valid] = targets[~valid] = weights[~valid] = np.nan
    return values, targets, is_first, valid, weights


def naive_losses(values, targets, is_first, valid, weights):
    value = progress = total = 0.0
    for row, t in zip(*np.nonzero(valid), strict=True):
        total += weights[row, t]
        value += weights[row, t] * (values[row, t] - targets[row, t]) ** 2 / 2
        if not is_first[row, t]:
            change = (values[row, t] - values[row, t - 1]) - (targets[row, t] - targets[row, t - 1])
            progress += weights[row, t] * change**2 / 2
    return value / total, progress / total, total


@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.sampled_from(["both", "previous"]))
@settings(max_examples=40, deadline=None)
def test_losses_equal_a_loop_over_steps(seed, beta, progress_gradient):
    values, targets, is_first, valid, weights = packed(seed)
    loss, parts = compiled_loss(
        values, targets, is_first, valid, beta=beta, weights=weights, progress_gradient=progress_gradient
    )
    value, progress, total = naive_losses(values, targets, is_first, valid, weights)
    np.testing.assert_allclose(parts["value_loss"], value, rtol=1e-12)
    np.testing.assert_allclose(parts["progress_loss"], progress, rtol=1e-12)
    np.testing.assert_allclose(parts["weight"], total)
    np.testing.assert_allclose(loss, value + beta * progress, rtol=1e-12)


def test_hand_computed_loss():
    # Errors e = 1, 3 | 2.  L_Q = (1 + 9 + 4) / 2 / 3;  L_A = (3 - 1)^2 / 2 / 3: first steps add nothing, but count.
    values, targets = np.array([1.0, 3.0, 2.0]), np.zeros(3)
    loss, parts = agent_prm_loss(values, targets, np.array([1, 0, 1], bool), np.ones(3, bool), beta=0.5)
    np.testing.assert_allclose([parts["value_loss"], parts["progress_loss"], loss], [7 / 3, 2 / 3, 8 / 3])


def test_hand_computed_gradients_of_both_variants():
    # e = 1, 3;  d L_Q = e / 2;  d L_A = (-(3 - 1), 3 - 1) / 2, and nothing through the later value for "previous".
    arguments = (np.zeros(2), np.array([1, 0], bool), np.ones(2, bool))
    gradient = lambda variant: jax.grad(
        lambda v: agent_prm_loss(v, *arguments, beta=1.0, progress_gradient=variant)[0]
    )(np.array([1.0, 3.0]))
    np.testing.assert_allclose(gradient("both"), [0.5 - 1, 1.5 + 1])
    np.testing.assert_allclose(gradient("previous"), [0.5 - 1, 1.5])


def test_garbage_in_empty_slots_reaches_no_gradient():
    values, targets, is_first, valid, weights = packed(0)
    gradient = jax.grad(lambda v: agent_prm_loss(v, targets, is_first, valid, beta=1.0, weights=weights)[0])(values)
    np.testing.assert_array_equal(gradient[~valid], 0)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[valid] != 0)


def test_no_gradient_flows_to_the_targets():
    values, targets, is_first, valid, _ = packed(1)
    gradient = jax.grad(lambda q: agent_prm_loss(values, q, is_first, valid, beta=1.0)[0])(targets)
    np.testing.assert_array_equal(gradient, 0)


def test_a_step_without_a_predecessor_in_the_row_has_no_progress():
    """The first slot never looks at the end of the row, nor a step at an empty slot, whatever the flags say."""
    values, nothing_first = np.array([1.0, 2.0, 4.0, 8.0]), np.zeros(4, bool)
    _, parts = agent_prm_loss(values, np.zeros(4), nothing_first, np.array([1, 0, 1, 1], bool), beta=1.0)
    np.testing.assert_allclose(parts["progress_loss"], (8 - 4) ** 2 / 2 / 3)


def test_a_batch_without_steps_has_no_loss_and_no_gradient():
    empty = np.zeros(3, bool)
    loss, gradient = jax.value_and_grad(lambda v: agent_prm_loss(v, np.ones(3), empty, empty, beta=1.0)[0])(np.ones(3))
    assert loss == 0 and not np.any(gradient)


@pytest.mark.parametrize("variant", ["both", "previous"])
def test_a_weight_of_three_equals_three_copies(variant):
    """Loss and gradient: a trajectory of weight 3 next to one of weight 1, against four rows of weight 1."""
    random = np.random.default_rng(5)
    targets, valid = random.normal(size=(2, 4)), np.ones((2, 4), bool)
    is_first = np.tile(np.arange(4) == 0, (2, 1))
    copies = np.array([0, 0, 0, 1])
    weighted = lambda v: agent_prm_loss(
        v, targets, is_first, valid, beta=0.7, weights=np.array([[3.0] * 4, [1.0] * 4]), progress_gradient=variant
    )[0]
    repeated = lambda v: agent_prm_loss(
        v[copies], targets[copies], is_first[copies], valid[copies], beta=0.7, progress_gradient=variant
    )[0]
    values = random.normal(size=(2, 4))
    np.testing.assert_allclose(weighted(values), repeated(values), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(weighted)(values), jax.grad(repeated)(values), rtol=1e-12)


def test_sums_of_microbatches_add_up_to_the_whole_batch():
    """Rows of very different weight: only sums divided once at the end give the loss and gradient of the batch."""
    values, targets, is_first, valid, weights = packed(7, rows=4)
    weights[0] *= 50
    beta = 0.5

    def scaled(v, rows):
        sums = agent_prm_sums(v, targets[rows], is_first[rows], valid[rows], weights=weights[rows])
        return sums.value + beta * sums.progress, sums

    total, gradients = LossSums(0.0, 0.0, 0.0), []
    for rows in (slice(0, 1), slice(1, 4)):
        gradient, sums = jax.grad(scaled, has_aux=True)(values[rows], rows)
        total = jax.tree.map(jnp.add, total, sums)
        gradients.append(gradient)
    loss, parts = total.means(beta)
    full_batch = lambda v: agent_prm_loss(v, targets, is_first, valid, beta=beta, weights=weights)
    expected, expected_parts = full_batch(values)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), parts, expected_parts)
    np.testing.assert_allclose(
        np.concatenate(gradients) / total.weight, jax.grad(lambda v: full_batch(v)[0])(values), rtol=1e-12
    )


def test_low_precision_values_give_a_float32_loss():
    loss, _ = agent_prm_loss(jnp.ones(2, jnp.bfloat16), jnp.float32([1.001, 1]), *np.ones((2, 2), bool), beta=0.0)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.001**2 / 4, rtol=1e-3)


# The expected problem of a stochastic policy: a table of promises, each trajectory weighted by its probability.


def semi_gradient(table, paths, rewards, weights, **variant):
    first, last = np.zeros(paths.shape, bool), np.zeros(paths.shape, bool)
    first[:, 0], last[:, -1] = True, True
    valid = np.ones(paths.shape, bool)

    def loss(table):
        values = table[paths]
        targets = td_lambda_targets(values, rewards, last, valid, gae_lambda=0.95, discount=1.0)
        return agent_prm_loss(values, targets, first, valid, beta=1.0, weights=weights, **variant)[0]

    return jax.grad(loss)(table)


def fixed_point(entries, *problem, **variant):
    """Where the expected gradient vanishes. It is affine in the table: its values at the unit vectors give its matrix.

    Differentiating it would not: the targets, which depend on the table, would count as constants.
    """
    gradients = jax.jit(jax.vmap(lambda table: semi_gradient(table, *problem, **variant)))
    constant, *columns = np.asarray(gradients(np.concatenate([np.zeros((1, entries)), np.eye(entries)])))
    return np.linalg.solve((np.array(columns) - constant).T, -constant)


def two_actions():
    """One first action (0), then one of two equally likely ones with outcomes 1 and 0."""
    return np.array([[0, 1], [0, 2]]), np.array([[0, 1.0], [0, 0.0]]), np.ones((2, 2))


def random_tree(seed, depth=3):
    """A binary tree under one first action; returns the problem and the true promise of each entry."""
    random = np.random.default_rng(seed)
    nodes = [path for t in range(depth + 1) for path in itertools.product((0, 1), repeat=t)]
    index = {path: i for i, path in enumerate(nodes)}
    chance = {path: random.uniform(0.2, 0.8) for path in nodes}  # of taking action 0 next
    leaves = list(itertools.product((0, 1), repeat=depth))
    paths = np.array([[index[leaf[:t]] for t in range(depth + 1)] for leaf in leaves])
    probability = np.array(
        [np.prod([chance[leaf[:t]] if leaf[t] == 0 else 1 - chance[leaf[:t]] for t in range(depth)]) for leaf in leaves]
    )
    outcome = random.integers(0, 2, len(leaves)).astype(float)
    rewards = np.zeros(paths.shape)
    rewards[:, -1] = outcome
    truth = np.array(
        [np.average(outcome, weights=probability * np.any(paths == entry, axis=1)) for entry in range(len(nodes))]
    )
    return (paths, rewards, np.tile(probability[:, None], depth + 1)), truth


def test_gradient_descent_reaches_the_biased_fixed_point():
    """.7625 and .2375 instead of 1 and 0; the last progress shrinks by (1 + beta (1 - lambda)) / (1 + beta) = .525."""
    problem = two_actions()
    step = lambda _, table: table - semi_gradient(table, *problem)
    table = jax.jit(lambda table: jax.lax.fori_loop(0, 2000, step, table))(jnp.array([0.9, -0.3, 0.1]))
    np.testing.assert_allclose(table, [0.5, 0.7625, 0.2375], atol=1e-9)
    np.testing.assert_allclose((table[1] - table[0]) / (1 - 0.5), 0.525, atol=1e-9)


def test_gradient_descent_reaches_the_truth_without_the_gradient_through_the_later_value():
    problem = two_actions()
    step = lambda _, table: table - semi_gradient(table, *problem, progress_gradient="previous")
    table = jax.jit(lambda table: jax.lax.fori_loop(0, 2000, step, table))(jnp.array([0.9, -0.3, 0.1]))
    np.testing.assert_allclose(table, [0.5, 1, 0], atol=1e-9)


def test_at_the_truth_the_bias_is_beta_lambda_advantage():
    problem = two_actions()
    # Entry 1 is visited in one of four equally weighted steps, with advantage 1/2.
    got = semi_gradient(np.array([0.5, 1, 0]), *problem)
    np.testing.assert_allclose(got, np.array([0, 0.95 * 0.5, -0.95 * 0.5]) / 4, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_previous_is_unbiased_and_both_is_not_on_random_trees(seed):
    problem, truth = random_tree(seed)
    np.testing.assert_allclose(fixed_point(len(truth), *problem, progress_gradient="previous"), truth, atol=1e-9)
    assert np.max(np.abs(fixed_point(len(truth), *problem) - truth)) > 0.05


@pytest.mark.parametrize("seed", range(4))
def test_the_bias_keeps_the_order_of_the_actions_of_one_state(seed):
    problem, truth = random_tree(seed)
    biased = fixed_point(len(truth), *problem)
    gaps, biased_gaps = truth[1::2] - truth[2::2], biased[1::2] - biased[2::2]  # siblings are neighbours in the table
    assert np.count_nonzero(gaps) >= 3
    np.testing.assert_array_equal(np.sign(biased_gaps.round(9)), np.sign(gaps.round(9)))


def test_the_bias_can_flip_actions_of_different_states_at_one_depth():
    """A better action of a poor state can end below a worse action of a good one: .8 after .1 against .7 after .9.

    States 0 and 1 (probability 1/2 each, their own first action) have true values .1 and .9.
    """
    paths = np.array([[0, 2], [0, 3], [1, 4], [1, 5]])
    rewards = np.array([[0, 0.8], [0, 0.0], [0, 0.7], [0, 1.0]])
    weights = np.tile(np.array([[0.125], [0.875], [1 / 3], [2 / 3]]), 2)
    truth = np.array([0.1, 0.9, 0.8, 0, 0.7, 1])
    biased = fixed_point(6, paths, rewards, weights)
    # M_t = V + .525 (Q - V), with V the state's value.
    np.testing.assert_allclose(biased[[2, 4]], [0.1 + 0.525 * 0.7, 0.9 - 0.525 * 0.2], atol=1e-9)
    assert truth[2] > truth[4] and biased[2] < biased[4]


def test_an_unknown_progress_gradient_is_refused_by_the_loss():
    with pytest.raises(ValueError, match="'none'.*both, previous"):
        agent_prm_loss(np.ones(2), np.ones(2), *np.ones((2, 2), bool), beta=1.0, progress_gradient="none")
