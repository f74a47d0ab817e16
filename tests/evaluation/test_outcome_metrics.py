"""Values against outcomes: by hand on four trajectories of two tasks, and against loops."""

import itertools

import numpy as np
import pytest

from jaxprm.evaluation import outcome_metrics
from jaxprm.evaluation.scored import ScoredTrajectory, returns, steps_of
from jaxprm.evaluation.statistics import Measure, Resampling
from tests.evaluation import naive

QUICK = Resampling(samples=40)


def row(task, outcome, *promises, rewards=None):
    return ScoredTrajectory(task, None, outcome, rewards, False, None, (np.array(promises, float),))


# Task "a": a success and a failure; task "b": a success and a failure, harder to tell.
ROWS = [
    row("a", 1.0, 0.6, 0.9),
    row("a", 0.0, 0.4, 0.1, 0.3),
    row("b", 1.0, 0.2),
    row("b", 0.0, 0.5),
]


def steps_and_records(rows=ROWS, discount=1.0):
    steps = steps_of(rows)
    return steps, outcome_metrics.records_of(rows, steps, 0, discount)


def point(measure: Measure, tasks: int) -> float:
    return float(measure.statistic(np.ones((1, tasks)))[0])


def test_the_steps_of_rows_know_their_depth_length_and_task():
    steps = steps_of(ROWS)
    assert steps.row.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert steps.depth.tolist() == [1, 2, 1, 2, 3, 1, 1]
    assert steps.length.tolist() == [2, 2, 3, 3, 3, 1, 1]
    assert steps.task.tolist() == [0, 0, 0, 0, 0, 1, 1] and steps.count == 2


def test_the_summary_by_hand():
    steps, records = steps_and_records()
    points = {
        name: point(measure, steps.count) for name, measure in outcome_metrics.summary(records, steps.count).items()
    }
    errors = [0.4, 0.1, 0.4, 0.1, 0.3, 0.8, 0.5]
    assert points["mse"] == points["brier"] == pytest.approx(sum(e * e for e in errors) / 7)
    assert points["explained_variance"] == pytest.approx(naive.explained_variance(records.values, records.targets))
    # Successful .6 .9 .2 against failed .4 .1 .3 .5: 4 + 4 + 1 of 12 pairs.
    assert points["auroc"] == pytest.approx(9 / 12)
    # Depth 1: .6 > .4 in a, .2 < .5 in b; depth 2: .9 > .1.
    assert points["auroc_within_task"] == pytest.approx(2 / 3)
    # Seven values, ten bins: each value has a bin.
    assert points["calibration_error"] == pytest.approx(sum(errors) / 7)


def test_brier_cuts_the_promise_to_a_probability():
    steps, records = steps_and_records([row("a", 1.0, 1.5), row("a", 0.0, -2.0), row("b", 0.75, 0.5)])
    measures = outcome_metrics.summary(records, steps.count)
    assert point(measures["brier"], 2) == pytest.approx(0.25 / 3)
    assert point(measures["mse"], 2) == pytest.approx((0.25 + 4 + 0.0625) / 3)


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    _, records = steps_and_records()
    bins = np.array([0, 1, 0, 1, 0, 0, 1])
    gap = lambda own: abs(sum(records.targets[own] - records.values[own]))
    for counts in ([1, 1], [2, 0], [1, 3]):
        times = np.array(counts)[records.tasks]
        steps = np.repeat(np.arange(7), times)
        expected = sum(gap(steps[bins[steps] == b]) for b in (0, 1)) / len(steps)
        error = outcome_metrics.calibration_error(records, bins, 2)(np.array([counts], float))
        assert error[0] == pytest.approx(expected)


def test_by_depth_counts_and_calibrates_the_steps_of_a_depth():
    _, records = steps_and_records()
    first, second, third = outcome_metrics.by_depth(records, QUICK)
    assert [row["steps"] for row in (first, second, third)] == [4, 2, 1]
    assert second["auroc"]["mean"] == 1.0 and third["auroc"]["mean"] is None
    assert first["calibration_error"]["mean"] == pytest.approx((0.4 + 0.4 + 0.8 + 0.5) / 4)
    assert [bin["predicted"] for bin in second["calibration"]] == [0.1, 0.9]
    assert third["calibration"][0]["observed"]["mean"] == 0.0 and third["calibration"][0]["observed"]["n"] == 1


def test_relative_depth_is_the_quarter_in_which_a_step_ends():
    steps, records = steps_and_records()
    rows = outcome_metrics.by_relative_depth(records, steps.length, QUICK)
    # Lengths 2, 3, 1, 1: quarters 2 4, 2 3 4, 4, 4.
    assert [row["quarter"] for row in rows] == [2, 3, 4]
    assert rows[0]["success"]["mean"] == 0.6 and rows[0]["failure"]["mean"] == 0.4
    assert rows[2]["success"]["mean"] == pytest.approx((0.9 + 0.2) / 2)


def test_a_promise_estimates_the_discounted_return():
    assert returns(row("a", 1.0, 0, 0, 0), 0.5).tolist() == [0.25, 0.5, 1.0]
    assert returns(row("a", 1.0, 0, 0, rewards=(2.0, -1.0)), 1.0).tolist() == [1.0, -1.0]


def test_baselines_by_hand():
    steps, records = steps_and_records()
    measures = outcome_metrics.baselines(ROWS, steps, records)
    points = {
        name: {key: point(measure, steps.count) for key, measure in by_name.items()}
        for name, by_name in measures.items()
    }
    mean = 3 / 7
    assert points["constant"]["auroc"] == 0.5 and points["constant"]["explained_variance"] == pytest.approx(0)
    assert points["constant"]["mse"] == pytest.approx(mean * (1 - mean))
    # The values are 1/2, 1/2 and 0 by depth: the only pairs without a tie are those with the one step of depth 3.
    assert points["depth"]["auroc"] == pytest.approx((3 * 1 + 9 * 0.5) / 12)
    assert points["depth"]["mse"] == pytest.approx((6 * 0.25 + 0) / 7)
    assert points["depth"]["auroc_within_task"] == points["constant"]["auroc_within_task"] == 0.5
    # The other attempt at either task had the opposite outcome: always wrong.
    assert points["other_attempts"]["auroc"] == 0.0 and points["other_attempts"]["mse"] == 1.0
    assert "auroc_within_task" not in measures["other_attempts"]
    assert "calibration_error" not in measures["depth"]


def test_the_other_attempts_baseline_needs_two_attempts_at_a_task():
    alone = [row("a", 1.0, 0.5), row("b", 0.0, 0.5)]
    assert "other_attempts" not in outcome_metrics.baselines(alone, *steps_and_records(alone))


def test_knowing_which_tasks_are_hard_gives_a_high_auroc_and_no_gain():
    """Four easy and four hard tasks; the value says which, and nothing about the attempt."""
    rows = []
    for task in range(8):
        easy = task < 4
        for attempt in range(4):
            rows.append(row(f"t{task}", float((attempt < 3) == easy), 0.75 if easy else 0.25))
    steps, records = steps_and_records(rows)
    measures = outcome_metrics.summary(records, steps.count)
    assert point(measures["auroc"], 8) == pytest.approx(0.75) and point(measures["auroc_within_task"], 8) == 0.5
    (two, four) = outcome_metrics.best_of_n(outcome_metrics.choices(rows, 0), QUICK)
    assert two["gain"]["mean"] == pytest.approx(0) and four["final"]["mean"] == pytest.approx(0.5)
    # The other three: 2/3 for an easy success, 1 for an easy failure, 0 and 1/3 for the hard ones. Twelve successes at
    # 2/3 win against twelve failures at 1/3, of 16 by 16: with few attempts, leaving one out costs much.
    others = outcome_metrics.baselines(rows, steps, records)["other_attempts"]["auroc"]
    assert point(others, 8) == pytest.approx(144 / 256)


def test_best_of_n_by_hand():
    tables = outcome_metrics.choices(ROWS, 0)
    assert list(tables) == [2]
    # a: final .9 > .3 chooses the success; mean and min too. b: .2 < .5 chooses the failure.
    expected = {"random": [0.5, 0.5], "oracle": [1, 1], "final": [1, 0], "mean": [1, 0], "min": [1, 0]}
    assert {name: values.tolist() for name, values in tables[2].items()} == expected
    (estimates,) = outcome_metrics.best_of_n(tables, QUICK)
    assert (
        estimates["n"] == 2
        and estimates["final"]["mean"] == 0.5
        and estimates["gain"]["mean"] == 0
        and estimates["oracle"]["n"] == 2
    )


def test_final_mean_and_min_choose_differently_and_n_grows_with_the_pool():
    pool = [row("a", 0.9, 0.1, 1.0), row("a", 0.6, 0.65, 0.95), row("a", 0.3, 0.7, 0.6), row("a", 0.0, 0.0, 0.1)]
    tables = outcome_metrics.choices([*pool, row("b", 1.0, 0.5)], 0)
    assert list(tables) == [2, 4]
    expected = {"random": 0.45, "oracle": 0.9, "final": 0.9, "mean": 0.6, "min": 0.6}
    assert {name: values[0] for name, values in tables[4].items()} == pytest.approx(expected)
    draws = list(itertools.combinations(pool, 2))
    chosen = [max(draw, key=lambda attempt: attempt.promises[0].min()).outcome for draw in draws]
    assert tables[2]["min"][0] == pytest.approx(np.mean(chosen))


def test_a_paired_difference_is_on_the_same_resamples():
    random = np.random.default_rng(0)
    tasks = np.arange(30)
    values = random.normal(size=30)
    a, b = (Measure(lambda counts, x=x: counts @ x / counts.sum(-1), 30) for x in (values + 1, values))
    difference = QUICK.difference(a, b, len(tasks))
    assert difference == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0, "n": 30})
    assert QUICK.estimate(a, 30)["high"] - QUICK.estimate(a, 30)["low"] > 0.1
