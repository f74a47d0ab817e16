"""Scores of a trajectory from the promises of its steps, by hand."""

import pytest

from jaxprm.evaluation.best_of_n import AGGREGATIONS


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
