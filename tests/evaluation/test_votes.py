"""Votes against an exact count over all subsets."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.evaluation.best_of_n import VOTES, vote_curve


def naive(weights, answers, outcomes, size):
    """Mean over all subsets of the mean outcome of the answers that share the most votes."""
    results = []
    for chosen in combinations(range(len(weights)), size):
        votes, graded = defaultdict(float), defaultdict(list)
        for at in chosen:
            if answers[at] is not None:
                votes[answers[at]] += weights[at]
                graded[answers[at]].append(outcomes[at])
        most = max(votes.values(), default=0.0)
        winners = [answer for answer, vote in votes.items() if vote >= most - 1e-9]
        results.append(np.mean([np.mean(graded[answer]) for answer in winners]) if winners else 0.0)
    return float(np.mean(results))


def test_the_majority_is_right_where_the_best_promise_is_wrong():
    answers, outcomes = [["7", "7", "9"]], [[1.0, 1.0, 0.0]]
    promises = [[0.4, 0.3, 0.6]]
    assert vote_curve(VOTES["vote"](promises), answers, outcomes, [3]) == 1.0
    assert vote_curve(VOTES["weighted_vote"](promises), answers, outcomes, [3]) == 1.0
    promises = [[0.4, 0.1, 0.6]]
    assert vote_curve(VOTES["weighted_vote"](promises), answers, outcomes, [3]) == 0.0
    assert vote_curve(VOTES["vote"](promises), answers, outcomes, [3]) == 1.0


def test_who_has_no_answer_and_who_is_below_zero_does_not_vote():
    outcomes = [[1.0, 0.0, 0.0]]
    assert vote_curve([[1.0, 1.0, 1.0]], [["7", None, None]], outcomes, [3]) == 1.0
    assert vote_curve([[1.0, 1.0, 1.0]], [[None, None, None]], outcomes, [1, 3]).tolist() == [[0.0, 0.0]]
    assert VOTES["weighted_vote"]([-1e9, 0.5]).tolist() == [0.0, 0.5]


def test_one_attempt_has_the_only_vote():
    """Its outcome is then the mean of the pool's, as of the plain policy."""
    draws = np.random.default_rng(0)
    outcomes = draws.integers(0, 2, (3, 8)).astype(float)
    answers = [[str(answer) for answer in row] for row in draws.integers(0, 3, (3, 8))]
    found = vote_curve(np.ones((3, 8)), answers, outcomes, [1], subsets=4000)
    assert found[:, 0] == pytest.approx(outcomes.mean(1), abs=0.03)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3))
def test_all_of_the_pool_is_exact_and_subsets_come_near(seed, pool, kinds):
    draws = np.random.default_rng(seed)
    weights = draws.integers(0, 4, (1, pool)) / 3
    answers = [[None if kind == kinds else str(kind) for kind in draws.integers(0, kinds + 1, pool)]]
    outcomes = draws.random((1, pool))
    sizes = list(range(1, pool + 1))
    found = vote_curve(weights, answers, outcomes, sizes, subsets=3000, seed=seed)[0]
    expected = [naive(weights[0], answers[0], outcomes[0], size) for size in sizes]
    assert found[-1] == pytest.approx(expected[-1])
    assert found == pytest.approx(expected, abs=0.06)
