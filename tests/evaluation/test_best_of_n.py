"""Scores of a trajectory by hand; best-of-N at equal budgets by hand and against a naive bootstrap."""

import numpy as np
import pytest

from jaxprm.evaluation.best_of_n import AGGREGATIONS, Cost, budget_for, budget_ratio, equal_budget


def test_a_budget_between_two_sizes_is_interpolated_in_the_logarithm():
    # From .2 at 1 over .4 at 2 to .8 at 8: .6 is half way from 2 to 8 in logarithms, so 4; .3 is half way from 1 to 2.
    budgets = budget_for([[0.2, 0.4, 0.8]] * 5, [1, 2, 8], [0.6, 0.3, 0.4, 0.8, 0.1])
    np.testing.assert_allclose(budgets, [4, 2**0.5, 2, 8, 1])


def test_a_score_that_is_not_reached_needs_an_infinite_budget():
    assert budget_for([0.2, 0.4], [1, 2], 0.41) == np.inf


def test_a_falling_curve_counts_from_where_it_first_reached_the_score():
    np.testing.assert_allclose(budget_for([0.2, 0.6, 0.1, 0.9], [1, 4, 16, 64], 0.4), 2)


def test_a_method_that_needs_a_quarter_has_a_ratio_of_four():
    tasks = 6
    curve = np.tile([0.2, 0.5, 0.8], (1, tasks, 1))  # at 2, 4, 8
    ratio = budget_ratio(curve, np.full((1, tasks), 0.5), [2, 4, 8], 16, samples=50)
    assert ratio == {"mean": pytest.approx(4), "low": pytest.approx(4), "high": pytest.approx(4), "n": 6, "reached": 1}
    never = budget_ratio(curve, np.full((1, tasks), 0.9), [2, 4, 8], 16, samples=50)
    assert (never["mean"], never["low"], never["high"], never["reached"]) == (0, 0, 0, 0)
    at_once = budget_ratio(curve, np.full((1, tasks), 0.1), [2, 4, 8], 16, samples=50)
    assert (at_once["mean"], at_once["high"]) == (8, 8)


def test_a_method_against_itself_has_a_ratio_of_at_least_one():
    """In every resample too: both are resampled together. A flat curve may reach the score earlier."""
    rng = np.random.default_rng(0)
    curve = np.sort(rng.uniform(size=(2, 20, 4)), axis=-1)
    ratio = budget_ratio(curve, curve[..., -1], [1, 2, 4, 8], 8, samples=200)
    assert ratio["low"] == pytest.approx(1) and ratio["high"] == pytest.approx(1) and ratio["reached"] == 1


def test_the_interval_equals_that_of_a_naive_bootstrap():
    rng = np.random.default_rng(1)
    curve = rng.uniform(size=(1, 12, 3)) * [0.5, 0.8, 1.0]
    scores = rng.uniform(size=(1, 12)) * 0.8
    ratio = budget_ratio(curve, scores, [1, 4, 16], 16, samples=4000)
    draws = []
    for _ in range(4000):
        tasks = rng.integers(0, 12, size=12)
        mean, target = curve[0, tasks].mean(0), scores[0, tasks].mean()
        above = np.flatnonzero(mean >= target)
        if not len(above):
            draws.append(0.0)
        elif above[0] == 0:
            draws.append(16.0)
        else:
            i = above[0]
            share = (target - mean[i - 1]) / (mean[i] - mean[i - 1])
            draws.append(16 / (4 ** (i - 1) * 4**share))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert ratio["low"] == pytest.approx(low, rel=0.1, abs=0.05)
    assert ratio["high"] == pytest.approx(high, rel=0.1)
    assert ratio["low"] < ratio["high"]


def test_a_budget_pays_for_the_prompt_once_and_for_each_candidate():
    # 100 tokens once and 50 each: 325 tokens are 4.5 candidates.
    assert Cost(100, 50).affords(325) == 4.5


def test_best_of_n_at_a_fraction_is_between_its_neighbours():
    """Two tasks, a pool of two: the better score wins in task 0 and loses in task 1."""
    scores, outcomes = [[[1, 2], [1, 2]]], [[0, 1], [1, 0]]
    options = {"budget": 25.0, "cost": Cost(10, 10), "samples": 20}
    comparison = equal_budget([[1.0, 1.0]], scores, outcomes, **options)
    assert (comparison["n"], comparison["capped"]) == (1.5, False)
    # Best of 1 is .5 on both, best of 2 is 1 and 0: at 1.5 it is .75 and .25.
    assert comparison["best_of_n"]["mean"] == pytest.approx(0.5)
    assert comparison["difference"]["mean"] == pytest.approx(0.5)
    (first, second) = (
        equal_budget([[1.0]], [[scores[0][task]]], [outcomes[task]], **options)["best_of_n"]["mean"] for task in (0, 1)
    )
    assert (first, second) == (pytest.approx(0.75), pytest.approx(0.25))


@pytest.mark.parametrize(("budget", "n", "capped"), [(5.0, 1, False), (30.0, 2, False), (31.0, 2, True)])
def test_a_budget_outside_the_pool_is_capped_and_reported(budget, n, capped):
    comparison = equal_budget([[1.0]], [[[1, 2]]], [[0, 1]], budget=budget, cost=Cost(10, 10), samples=20)
    assert (comparison["n"], comparison["capped"]) == (n, capped)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("final", 0.25), ("mean", 0.5), ("min", 0.25), ("max", 0.75), ("product", 0.09375), ("sum", 1.5)],
)
def test_aggregations_of_three_steps(how, expected):
    assert AGGREGATIONS[how]([0.5, 0.75, 0.25]) == expected


def test_two_negative_promises_make_no_good_product():
    assert AGGREGATIONS["product"]([-0.5, -0.5, 0.5]) == 0.0


def test_a_single_step_is_its_own_score_however_it_is_aggregated():
    assert {how([0.25]) for how in AGGREGATIONS.values()} == {0.25}
