"""Best-of-N against all subsets, the bootstrap against simulation, AUROC against a double loop, others by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.evaluation import statistics
from jaxprm.evaluation.statistics import (
    best_of_n_curve,
    bootstrap,
    bootstrap_statistic,
    equal_mass_bins,
    explained_variance_by_task,
    mean_by_task,
    oracle_curve,
    paired_difference,
    pearson_by_task,
    ranks,
    task_pairs,
    within_task_auroc,
)
from tests.evaluation import naive

few_levels = st.integers(0, 3).map(float)  # so that ties are common


def over_all_subsets(scores, outcomes, n):
    """Enumerates every draw; among its best-scored members each is chosen equally often."""
    results = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        results.append(np.mean([outcomes[i] for i in subset if scores[i] == top]))
    return np.mean(results)


@given(st.lists(st.tuples(few_levels, st.floats(0, 1)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_best_of_n_and_oracle_equal_the_mean_over_all_subsets(pool):
    scores, outcomes = np.array(pool).T
    ns = range(1, len(pool) + 1)
    expected = [over_all_subsets(scores, outcomes, n) for n in ns]
    np.testing.assert_allclose(best_of_n_curve(scores, outcomes, ns), expected, atol=1e-12)
    best = [np.mean([max(s) for s in itertools.combinations(outcomes, n)]) for n in ns]
    np.testing.assert_allclose(oracle_curve(outcomes, ns), best, atol=1e-12)


def test_best_of_two_of_three_by_hand():
    # Subsets {1, 2}, {1, 3}, {2, 3}: candidate 3 wins twice, 2 once.
    np.testing.assert_allclose(best_of_n_curve([0.1, 0.5, 0.9], [1, 0, 1], [1, 2, 3]), [2 / 3, 2 / 3, 1])


def test_equal_scores_give_the_plain_mean_at_every_n():
    np.testing.assert_allclose(best_of_n_curve(np.zeros(5), [1, 0, 0, 1, 0], range(1, 6)), np.full(5, 0.4))


def test_a_pool_of_128_is_exact():
    """Where one candidate alone succeeds and has the best score, it is in the draw with probability n / 128."""
    scores = np.random.default_rng(0).permutation(128)
    ns = [1, 2, 16, 64, 127, 128]
    np.testing.assert_allclose(best_of_n_curve(scores, scores == 127, ns), np.array(ns) / 128, rtol=1e-12)
    np.testing.assert_allclose(oracle_curve(scores == 3, ns), np.array(ns) / 128, rtol=1e-12)
    # The lowest-scored wins only alone: exactly 0 afterwards, not a rounding error.
    np.testing.assert_array_equal(best_of_n_curve(scores, scores == 0, ns), [1 / 128, 0, 0, 0, 0, 0])
    few = [1 - math.comb(118, n) / math.comb(128, n) for n in ns]
    np.testing.assert_allclose(oracle_curve(scores < 10, ns), few, rtol=1e-12)


def test_leading_axes_are_separate_tasks():
    random = np.random.default_rng(1)
    scores, outcomes = random.integers(0, 5, (2, 3, 10)), random.random((2, 3, 10))
    got = best_of_n_curve(scores, outcomes, [1, 4])
    assert got.shape == (2, 3, 2)
    np.testing.assert_array_equal(got[1, 2], best_of_n_curve(scores[1, 2], outcomes[1, 2], [1, 4]))


def test_impossible_pools_are_refused():
    with pytest.raises(ValueError, match="best of 5 from a pool of 4"):
        best_of_n_curve(np.zeros(4), np.zeros(4), [5])
    with pytest.raises(ValueError, match="best of 0"):
        oracle_curve(np.zeros(4), [0])
    with pytest.raises(ValueError, match="scores has 1 entries that are not finite"):
        best_of_n_curve([np.nan, 1], [0, 1], [1])
    with pytest.raises(ValueError, match="scores, outcomes have shapes"):
        best_of_n_curve(np.zeros(3), np.zeros(4), [1])


def test_bootstrap_of_a_mean_has_the_standard_error_of_the_mean():
    values = np.random.default_rng(2).normal(3, 1, 400)
    estimate = bootstrap(values, samples=8000)
    error = values.std() / np.sqrt(400)
    assert estimate["mean"] == pytest.approx(values.mean()) and estimate["n"] == 400
    np.testing.assert_allclose(
        [estimate["low"], estimate["high"]], values.mean() + 1.96 * error * np.array([-1, 1]), atol=0.01
    )


def test_bootstrap_covers_the_truth_at_about_its_level():
    """200 experiments: 40 tasks, with and without the spread of 12 seeds on the same tasks."""
    random = np.random.default_rng(3)
    hits = np.zeros(2)
    for _ in range(200):
        tasks = random.normal(0, 1, 40)
        seeds = tasks + random.normal(0, 0.3, (12, 1)) + random.normal(0, 0.5, (12, 40))
        for i, values in enumerate((tasks, seeds)):
            estimate = bootstrap(values, samples=400, seed=int(random.integers(1 << 30)))
            hits[i] += estimate["low"] <= 0 <= estimate["high"]
    assert np.all((hits / 200 >= 0.88) & (hits / 200 <= 0.99)), hits


def test_both_tasks_and_seeds_widen_the_interval():
    seeds, tasks = np.arange(6.0)[:, None], np.arange(30.0)[None, :]
    width = lambda values: (lambda e: e["high"] - e["low"])(bootstrap(values + np.zeros((6, 30))))
    assert width(seeds * 0) == 0
    assert width(seeds) == pytest.approx(2 * 1.96 * np.std(np.arange(6)) / np.sqrt(6), rel=0.1)
    assert width(tasks) == pytest.approx(2 * 1.96 * np.std(np.arange(30)) / np.sqrt(30), rel=0.1)
    assert width(seeds + tasks) > max(width(seeds), width(tasks))


def test_bootstrap_is_seeded_and_plain_json():
    values = np.random.default_rng(4).random((3, 20))
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert json.loads(json.dumps(bootstrap(values))) == bootstrap(values)


def test_weights_make_a_ratio_of_sums():
    estimate = bootstrap([0.0, 1.0, 0.5], weights=[3, 1, 0])
    assert estimate["mean"] == 0.25 and estimate["n"] == 2
    repeated = bootstrap(np.array([[0.2, 0.8], [0.4, 0.6]]), weights=np.full((2, 2), 7.0))
    assert repeated == pytest.approx(bootstrap(np.array([[0.2, 0.8], [0.4, 0.6]])))


def test_without_weight_there_is_no_estimate():
    assert bootstrap([1.0, 2.0], weights=[0, 0]) == {"mean": None, "low": None, "high": None, "n": 0}
    with pytest.raises(ValueError, match="0 tasks"):
        bootstrap([])
    with pytest.raises(ValueError, match="not finite"):
        bootstrap([np.nan])
    with pytest.raises(ValueError, match="no weight negative"):
        bootstrap([1.0], weights=[-1])


def test_paired_differences_cancel_what_tasks_share():
    random = np.random.default_rng(5)
    difficulty = random.normal(0, 5, 50)
    a, b = difficulty + 0.5 + random.normal(0, 0.1, (3, 50)), difficulty + random.normal(0, 0.1, (3, 50))
    estimate = paired_difference(a, b)
    assert estimate["mean"] == pytest.approx(a.mean() - b.mean()) and 0.4 < estimate["low"] < estimate["high"] < 0.6
    reverse = paired_difference(b, a)
    np.testing.assert_allclose([reverse["low"], reverse["high"]], [-estimate["high"], -estimate["low"]])


def test_a_method_without_seeds_is_paired_with_every_seed():
    a, policy = np.random.default_rng(6).random((3, 10)), np.arange(10) / 10
    assert paired_difference(a, policy) == paired_difference(a, np.tile(policy, (3, 1)))
    for other in (np.zeros((3, 9)), np.zeros((2, 10)), np.zeros((3, 1))):
        with pytest.raises(ValueError, match="same tasks"):
            paired_difference(a, other)


def test_a_mean_as_a_statistic_has_the_estimate_of_the_mean():
    values = np.random.default_rng(7).random((3, 25))
    means = [lambda counts, row=row: counts @ row / counts.sum(-1) for row in values]
    assert bootstrap_statistic(means, 25, seed=9) == pytest.approx(bootstrap(values, seed=9))


def test_undefined_statistics_are_left_out():
    undefined = lambda counts: np.full(len(counts), np.nan)
    sometimes = lambda counts: np.where(counts[:, 0] > 0, 2.0, np.nan)
    assert bootstrap_statistic([undefined], 5, n=0) == {"mean": None, "low": None, "high": None, "n": 0}
    assert bootstrap_statistic([sometimes, undefined], 5) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 5}


def on_all(statistic, tasks):
    """The statistic of the data itself: every task once."""
    return float(statistic(np.ones((1, tasks)))[0])


def auroc(scores, labels, weights=None):
    return on_all(task_pairs(scores, labels, np.zeros(np.size(scores), int), 1, weights).auroc, 1)


def explained_variance(values, targets, weights=None):
    return on_all(explained_variance_by_task(values, targets, np.zeros(np.size(values), int), 1, weights), 1)


@given(st.lists(st.tuples(few_levels, st.booleans(), st.integers(0, 3), st.integers(1, 3)), max_size=14))
@settings(max_examples=100, deadline=None)
def test_auroc_and_within_task_auroc_equal_the_double_loop(steps):
    scores, labels, tasks, weights = np.array(steps, float).reshape(-1, 4).T
    labels, tasks = labels.astype(bool), tasks.astype(int)
    np.testing.assert_allclose(auroc(scores, labels, weights), naive.auroc(scores, labels, weights), atol=1e-12)
    measure = within_task_auroc([task_pairs(scores, labels, tasks, 4, weights)], 4)
    expected = naive.auroc(scores, labels, weights, tasks)
    np.testing.assert_allclose(on_all(measure.statistic, 4), expected, atol=1e-12)
    assert measure.n == sum(len(set(labels[tasks == task])) == 2 for task in range(4))


def test_auroc_by_hand():
    # Positives 3 and 1 against negatives 2 and 1: two wins; a loss and a tie.
    assert auroc([3, 1, 2, 1], [1, 1, 0, 0]) == (1 + 1 + 0 + 0.5) / 4
    assert auroc([3, 1, 2, 1], [1, 1, 0, 0], [1, 2, 1, 1]) == (1 + 1 + 0 + 2 * 0.5) / 6
    assert math.isnan(auroc([1, 2], [1, 1]))


def test_knowing_only_which_tasks_are_hard_is_worth_nothing_within_tasks():
    tasks = np.repeat([0, 1], 10)
    labels = np.concatenate([np.arange(10) < 9, np.arange(10) < 1])
    assert auroc(1 - tasks, labels) == pytest.approx((9 * 9 + 0.5 * (9 * 1 + 1 * 9)) / 100)
    assert on_all(within_task_auroc([task_pairs(1 - tasks, labels, tasks, 2)], 2).statistic, 2) == 0.5


def test_groups_of_pairs_are_pooled_and_a_task_drawn_twice_counts_twice():
    # Task 0 wins its one pair; task 1 loses one pair in each of two groups.
    first = task_pairs([2, 1, 1, 2], [1, 0, 1, 0], [0, 0, 1, 1], 2)
    second = task_pairs([1, 2], [1, 0], [1, 1], 2)
    measure = within_task_auroc([first, second], 2)
    np.testing.assert_allclose(measure.statistic(np.array([[1.0, 1], [2, 1], [0, 3]])), [1 / 3, 2 / 4, 0])
    assert measure.n == 2


def test_task_pairs_of_a_resample_equal_auroc_of_the_repeated_steps():
    random = np.random.default_rng(8)
    scores, labels, tasks = random.integers(0, 6, 40), random.random(40) < 0.4, random.integers(0, 5, 40)
    counts = np.array([2, 0, 1, 3, 1])
    copies = np.repeat(np.arange(40), counts[tasks])
    got = task_pairs(scores, labels, tasks, 5).auroc(counts[None].astype(float))
    np.testing.assert_allclose(got, [auroc(scores[copies], labels[copies])])


def test_auroc_of_resamples_does_not_depend_on_the_block_size(monkeypatch):
    random = np.random.default_rng(1)
    scores, labels = random.integers(0, 5, 30), random.integers(0, 2, 30)
    pairs = task_pairs(scores, labels, random.integers(0, 6, 30), 6)
    counts = random.integers(0, 3, (11, 6)).astype(float)
    together = pairs.auroc(counts)
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    np.testing.assert_array_equal(pairs.auroc(counts), together)
    assert len(set(together)) > 5


def test_the_mean_of_a_resample_equals_the_mean_of_the_repeated_values():
    random = np.random.default_rng(0)
    values, tasks, weights = random.normal(size=20), random.integers(0, 4, 20), random.integers(0, 3, 20)
    counts = np.array([[1.0, 1, 1, 1], [2, 0, 3, 1]])
    got = mean_by_task(values, tasks, 4, weights)(counts)
    expected = [np.average(values, weights=weights * row[tasks]) for row in counts]
    np.testing.assert_allclose(got, expected)


def test_explained_variance_by_hand():
    targets = np.array([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(targets + 5, targets) == pytest.approx(1)
    assert explained_variance(np.zeros(4), targets) == pytest.approx(0)
    assert explained_variance(1 - targets, targets) == pytest.approx(1 - 4)
    assert explained_variance(targets / 2, targets) == pytest.approx(0.75)
    assert math.isnan(explained_variance([0.0, 1.0, 2.0], [0.1, 0.1, 0.1]))


def test_a_resample_with_one_target_only_has_no_explained_variance():
    """The variance that rounding leaves would otherwise make it as large as 1e16."""
    tasks, weights = np.repeat(np.arange(9), 3), np.random.default_rng(0).random(27)
    statistic = explained_variance_by_task(np.sin(np.arange(27)), tasks / 7, tasks, 9, weights)
    assert np.all(np.isnan(statistic(np.eye(9)))) and np.all(np.isfinite(statistic(np.eye(9) + 1)))


def test_explained_variance_weighs_steps_and_tasks_as_copies():
    random = np.random.default_rng(9)
    values, targets, tasks = random.random(12), 1e7 + random.random(12), np.repeat(np.arange(4), 3)
    weights, counts = random.integers(1, 4, 12), np.array([0, 2, 1, 3])
    on_copies = lambda copies: naive.explained_variance(values[copies], targets[copies])
    got = explained_variance(values, targets, weights)
    np.testing.assert_allclose(got, on_copies(np.repeat(np.arange(12), weights)), rtol=1e-6)
    got = explained_variance_by_task(values, targets, tasks, 4, weights)(counts[None].astype(float))
    np.testing.assert_allclose(got, [on_copies(np.repeat(np.arange(12), weights * counts[tasks]))], rtol=1e-6)


def test_the_correlation_is_numpys_and_equal_values_share_the_mean_rank():
    random = np.random.default_rng(0)
    x, tasks = random.normal(size=60), random.integers(0, 6, 60)
    y = x + random.normal(size=60) + 1e3
    counts = random.integers(0, 3, (4, 6)).astype(float)
    correlations = pearson_by_task(x, y, tasks, 6)(counts)
    expected = [np.corrcoef(*(np.repeat(column, row[tasks].astype(int)) for column in (x, y)))[0, 1] for row in counts]
    np.testing.assert_allclose(correlations, expected, atol=1e-9)
    assert np.isnan(pearson_by_task(np.full(60, 0.1), y, tasks, 6)(counts)).all()
    assert ranks(np.array([5.0, 1.0, 5.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_bins_have_equal_mass_and_never_split_equal_values():
    values = np.random.default_rng(10).permutation(100) / 100
    bins = equal_mass_bins(values, 10)
    np.testing.assert_array_equal(bins, (values * 10 + 1e-9).astype(int))
    np.testing.assert_array_equal(equal_mass_bins([0.5, 0.5, 0.5, 0.9], 4), [0, 0, 0, 1])
    np.testing.assert_array_equal(equal_mass_bins([0.1, 0.2, 0.3], 2, [2, 1, 1]), [0, 1, 1])
    np.testing.assert_array_equal(equal_mass_bins([1, 2, 2, 2], 2), [0, 1, 1, 1])  # by the middle of their mass
    np.testing.assert_array_equal(equal_mass_bins([], 3), [])
