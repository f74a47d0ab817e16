"""Step records of packed batches, against a list written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from jaxprm.training.evaluate import step_values, summary


def batches(outcomes):
    """Two rows of five slots: trajectories 0 (two steps) and 2 (two steps), then 1 (three steps)."""
    batch = {
        "valid": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool),
        "example": np.array([[0, 0, 2, 2, -1], [1, 1, 1, -1, -1]]),
        "step_index": np.array([[0, 1, 0, 1, 0], [0, 1, 2, 0, 0]]),
        "is_first": np.array([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0]], bool),
        "weights": np.array([[3, 3, 1, 1, 0], [2, 2, 2, 0, 0]], np.float32),
    }

    class Batches(list):
        split = SimpleNamespace(tasks=["walk/a", "walk/b", "walk/a"], outcomes=np.array(outcomes, np.float32))

    return Batches([batch])


VALUES = np.array([[0.1, 0.2, 0.3, 0.4, np.nan], [0.5, 0.6, 0.7, np.nan, np.nan]], np.float32)
RETURNS = np.array([[1, 1, 0.4, 0.9, 0], [0, 0, 0, 0, 0]], np.float32)


def test_records_are_the_valid_steps_in_order():
    records = step_values(lambda batch: (VALUES, RETURNS), batches([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(records.values, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    np.testing.assert_allclose(records.targets, [1, 1, 0.4, 0.9, 0, 0, 0])
    assert records.depths.tolist() == [1, 2, 1, 2, 1, 2, 3]
    assert records.tasks.tolist() == ["walk/a"] * 4 + ["walk/b"] * 3
    assert records.weights.tolist() == [3, 3, 1, 1, 2, 2, 2]
    assert records.success.tolist() == [True, True, False, False, False, False, False]


def test_success_without_an_outcome_is_the_return_of_the_first_step():
    # The second trajectory earns 0.4 in all; that its last step alone earns 0.9 does not make it a success.
    records = step_values(lambda batch: (VALUES, RETURNS), batches([np.nan, np.nan, np.nan]))
    assert records.success.tolist() == [True, True, False, False, False, False, False]


def test_a_value_that_is_not_finite_is_an_error():
    broken = VALUES.copy()
    broken[0, 1] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        step_values(lambda batch: (broken, RETURNS), batches([1.0, 0.0, 0.0]))


def test_the_summary_is_the_weighted_statistics_of_all_steps():
    records = step_values(lambda batch: (VALUES, RETURNS), batches([1.0, 0.0, 0.0]))
    numbers = summary(records)
    weights, errors = records.weights, records.values - records.targets
    assert numbers["loss"] == pytest.approx((weights * errors**2).sum() / 2 / weights.sum(), rel=1e-6)
    # The successful steps (0.1, 0.2) are below every other: no pair is ranked rightly.
    assert numbers["auroc"] == 0.0
    assert set(numbers) == {"loss", "explained_variance", "auroc", "auroc_within_task"}
