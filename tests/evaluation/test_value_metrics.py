"""The step-value parts of results.json from small records with numbers by hand, and from simulated ones."""

import json

import numpy as np
import pytest

from jaxprm.evaluation.value_metrics import StepRecords, calibration, validation, value_by_depth
from tests.evaluation import naive


def hand_records(**changes):
    """Task "a": a success (values .6, .9) and a failure sampled twice (.4, .5, .1). Task "b": a failure (.6, .2)."""
    columns = {
        "values": [0.6, 0.9, 0.4, 0.5, 0.1, 0.6, 0.2],
        "targets": [1, 1, 0, 0, 0, 0, 0],
        "depths": [1, 2, 1, 2, 3, 1, 2],
        "tasks": ["a", "a", "a", "a", "a", "b", "b"],
        "weights": [1, 1, 2, 2, 2, 1, 1],
        "success": [True, True, False, False, False, False, False],
    }
    return StepRecords(**{name: np.array(column) for name, column in (columns | changes).items()})


def simulated(seed, tasks=30, trajectories=16, depth=4, skill=1.0):
    """Tasks differ in difficulty; values know it, and the trajectory's outcome more and more with depth."""
    random = np.random.default_rng(seed)
    chance = random.uniform(0.1, 0.9, tasks)
    task = np.repeat(np.arange(tasks), trajectories)
    success = random.random(len(task)) < chance[task]
    depths = np.tile(np.arange(1, depth + 1), len(task))
    task, success = np.repeat(task, depth), np.repeat(success, depth)
    values = chance[task] + skill * 0.1 * depths * (success - chance[task]) + random.normal(0, 0.1, len(task))
    return StepRecords(values, success.astype(float), depths, task, random.integers(1, 3, len(task)), success)


def means(row):
    return {name: value["mean"] for name, value in row.items() if isinstance(value, dict)}


def test_value_by_depth_by_hand():
    rows = value_by_depth([hand_records()])
    assert [row["depth"] for row in rows] == [1, 2, 3]
    # Depth 1: .6 beats .4 (weight 2) and ties with .6 of task b.
    expected = {"success": 0.6, "failure": (2 * 0.4 + 0.6) / 3, "auroc": 2.5 / 3, "auroc_within_task": 1.0}
    assert means(rows[0]) == pytest.approx(expected)
    assert means(rows[1]) == pytest.approx({"success": 0.9, "failure": 0.4, "auroc": 1.0, "auroc_within_task": 1.0})
    assert rows[0]["success"]["n"] == 1 and rows[0]["failure"]["n"] == 2 and rows[0]["auroc_within_task"]["n"] == 1


def test_a_depth_without_successes_has_no_auroc():
    deepest = value_by_depth([hand_records()])[2]
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    assert deepest["success"] == nothing and deepest["auroc_within_task"] == nothing
    assert deepest["auroc"] == nothing | {"n": 1}
    assert deepest["failure"]["mean"] == pytest.approx(0.1)


def test_calibration_by_hand():
    # By weight: .1 x2, .2, .4 x2 | .5 x2, .6, .6, .9 is 5 of 10 each.
    low, high = calibration([hand_records()], bins=2)
    assert low["predicted"] == pytest.approx((0.2 + 0.2 + 0.8) / 5) and low["observed"]["mean"] == 0
    assert high["predicted"] == pytest.approx((1.0 + 1.2 + 0.9) / 5) and high["observed"]["mean"] == pytest.approx(
        2 / 5
    )


def test_calibration_bins_have_equal_weight_not_equal_count():
    rows = calibration([hand_records()], bins=5)
    assert [row["predicted"] for row in rows] == pytest.approx([0.1, 0.2, 0.4, 0.5, (0.6 + 0.6 + 0.9) / 3])


def test_validation_by_hand():
    got = means(validation([hand_records()]))
    squares = 0.4**2 + 0.1**2 + 2 * (0.4**2 + 0.5**2 + 0.1**2) + 0.6**2 + 0.2**2
    assert got["loss"] == pytest.approx(squares / 2 / 10)
    copies = np.repeat(np.arange(7), [1, 1, 2, 2, 2, 1, 1])
    records = hand_records().where(copies)
    assert got["explained_variance"] == pytest.approx(naive.explained_variance(records.values, records.targets))
    assert got["auroc"] == pytest.approx(naive.auroc(records.values, records.success))
    assert got["auroc_within_task"] == 1.0  # .6 > .4 and .9 > .5; .6 > .5 would be pairs of different depth


def test_within_task_auroc_of_validation_compares_equal_depths_only():
    """Values that only tell how deep a step is look informative over all steps, because failures are longer."""
    depths = np.array([1, 2, 1, 2, 3, 4])
    records = hand_records().where(np.arange(6))
    records = StepRecords(-depths / 10, records.targets, depths, np.zeros(6), np.ones(6), np.arange(6) < 2)
    got = means(validation([records]))
    assert naive.auroc(records.values, records.success, tasks=records.tasks) > 0.7
    assert got["auroc_within_task"] == 0.5 and got["auroc"] > 0.7


def test_seeds_are_averaged_and_their_pairs_never_mixed():
    """Seed two is seed one shifted up by 10: every seed ranks as before, though all its values exceed the other's."""
    first = hand_records()
    second = hand_records(values=first.values + 10)
    alone, both = value_by_depth([first]), value_by_depth([first, second])
    for a, b in zip(alone, both, strict=True):
        assert b["auroc"]["mean"] == a["auroc"]["mean"] and b["auroc_within_task"] == a["auroc_within_task"]
        assert b["failure"]["mean"] == pytest.approx(a["failure"]["mean"] + 5)
    assert means(validation([first, second]))["explained_variance"] == pytest.approx(
        means(validation([first]))["explained_variance"]
    )


def test_seeds_may_have_different_steps_and_tasks():
    first, second = hand_records(), hand_records().where(np.arange(7) >= 5)
    rows = value_by_depth([first, second])
    assert rows[0]["failure"]["mean"] == pytest.approx((2 * 0.4 + 0.6 + 0.6) / 4)
    assert rows[0]["auroc"]["mean"] == pytest.approx(2.5 / 3)  # not defined for seed two
    assert calibration([second, first], bins=1)[0]["observed"]["mean"] == pytest.approx(2 / 12)


def test_steps_of_weight_zero_change_nothing():
    records = hand_records()
    more = StepRecords(
        *(
            np.append(getattr(records, name), extra)
            for name, extra in [
                ("values", 99.0),
                ("targets", 5.0),
                ("depths", 9),
                ("tasks", "z"),
                ("weights", 0),
                ("success", True),
            ]
        )
    )
    assert validation([more]) == validation([records])
    assert value_by_depth([more]) == value_by_depth([records])
    assert calibration([more]) == calibration([records])


def test_intervals_narrow_with_tasks_and_contain_the_mean():
    def interval(tasks):
        row = value_by_depth([simulated(0, tasks=tasks)], samples=500)[3]
        for name in ("success", "failure", "auroc", "auroc_within_task"):
            assert row[name]["low"] < row[name]["mean"] < row[name]["high"]
        assert row["auroc"]["n"] == tasks
        return np.array([row[name]["high"] - row[name]["low"] for name in ("success", "auroc", "auroc_within_task")])

    assert np.all(interval(160) < 0.8 * interval(40))


def test_within_task_auroc_shows_skill_and_not_difficulty():
    skilled, unskilled = (value_by_depth([simulated(1, tasks=60, skill=s)], samples=300) for s in (1.0, 0.0))
    within = [row["auroc_within_task"] for row in unskilled]
    assert all(r["low"] < 0.5 < r["high"] for r in within)
    assert all(row["auroc"]["low"] > 0.6 for row in unskilled)
    assert skilled[3]["auroc_within_task"]["low"] > 0.8
    assert skilled[0]["auroc_within_task"]["mean"] < skilled[3]["auroc_within_task"]["mean"]


def test_calibrated_values_are_on_the_diagonal_and_bins_ascend():
    random = np.random.default_rng(2)
    values = random.random(4000)
    targets = (random.random(4000) < values).astype(float)
    records = StepRecords(values, targets, np.ones(4000, int), np.arange(4000) // 20, np.ones(4000), targets > 0)
    rows = calibration([records], bins=8)
    predicted = [row["predicted"] for row in rows]
    assert len(rows) == 8 and predicted == sorted(predicted)
    off = [not row["observed"]["low"] <= row["predicted"] <= row["observed"]["high"] for row in rows]
    assert sum(off) <= 1
    shifted = StepRecords(values / 2, targets, np.ones(4000, int), np.arange(4000) // 20, np.ones(4000), targets > 0)
    assert calibration([shifted], bins=8)[-1]["observed"]["low"] > 0.6


def test_results_are_plain_json():
    records = [simulated(seed, tasks=5) for seed in range(2)]
    parts = [value_by_depth(records, samples=50), calibration(records, samples=50), validation(records, samples=50)]
    assert json.loads(json.dumps(parts, allow_nan=False)) == parts


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": [0.0] * 6}, "shape"),
        ({"values": [0.0] * 6 + [np.nan]}, "step 6: values is not finite"),
        ({"weights": [-1] * 7}, "negative"),
        ({"depths": [0] * 7}, "depths count from 1"),
    ],
)
def test_bad_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hand_records(**changes)


def test_no_steps_are_an_error():
    with pytest.raises(ValueError, match="no steps"):
        validation([hand_records(weights=[0] * 7)])
