"""Metrics against step labels: compared with loops over single trajectories, and with numbers by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.evaluation import step_metrics
from jaxprm.evaluation.step_metrics import METRICS

few_levels = st.integers(0, 4).map(float)  # so that ties are common
# A trajectory: value and wrongness of each labelled step.
trajectory = st.lists(st.tuples(few_levels, st.booleans()), min_size=1, max_size=5)
some_trajectories = st.lists(trajectory, min_size=1, max_size=8)


def first(flags):
    """Index of the first true flag, -1 for none."""
    return next((index for index, flag in enumerate(flags) if flag), -1)


def naive(trajectories, threshold, name):
    """A metric as its benchmark defines it, from predicted labels; None where it is not defined."""
    step_hits, trajectory_hits = {True: [], False: []}, {True: [], False: []}
    for labelled_trajectory in trajectories:
        predicted = [value < threshold for value, _ in labelled_trajectory]
        labelled = [wrong for _, wrong in labelled_trajectory]
        for guess, wrong in zip(predicted, labelled, strict=True):
            step_hits[wrong].append(guess == wrong)
        trajectory_hits[any(labelled)].append(first(predicted) == first(labelled))
    hits = step_hits if METRICS[name].unit == "step" else trajectory_hits
    mean = lambda flags: sum(flags) / len(flags) if flags else None
    on_wrong, on_right = mean(hits[True]), mean(hits[False])
    if name in ("step_accuracy", "first_error_accuracy"):
        return mean(hits[True] + hits[False])
    if name in ("accuracy_on_erroneous", "accuracy_on_correct"):
        return on_wrong if name == "accuracy_on_erroneous" else on_right
    if on_wrong is None or on_right is None:
        return None
    if name == "balanced_accuracy":
        return (on_wrong + on_right) / 2
    return 0.0 if on_wrong + on_right == 0 else 2 * on_wrong * on_right / (on_wrong + on_right)


def columns(trajectories, tasks=None):
    """values, wrong, tasks, trajectories, all [N]."""
    rows = [index for index, labelled_trajectory in enumerate(trajectories) for _ in labelled_trajectory]
    flat = [step for labelled_trajectory in trajectories for step in labelled_trajectory]
    tasks = range(len(trajectories)) if tasks is None else tasks
    values, wrong = np.array([value for value, _ in flat]), np.array([wrong for _, wrong in flat])
    return values, wrong, np.array([tasks[row] for row in rows]), np.array(rows)


def verdicts_of(trajectories, name, tasks=None):
    values, wrong, task, rows = columns(trajectories, tasks)
    if METRICS[name].unit == "step":
        return step_metrics.step_verdicts(values, wrong, task)
    return step_metrics.first_error_verdicts(values, wrong, task, rows)


def ours(trajectories, threshold, name, tasks=None, counts=None):
    tasks = list(range(len(trajectories))) if tasks is None else tasks
    count = max(tasks) + 1
    statistic = step_metrics.rate_by_task(verdicts_of(trajectories, name, tasks), threshold, METRICS[name].rate, count)
    (rate,) = statistic(np.ones((1, count)) if counts is None else counts)
    return None if math.isnan(rate) else float(rate)


W, R = True, False
# At threshold .5 the first error is found in the first trajectory, too late in the second, too early in the third;
# the fourth is accepted, the fifth is rejected, the sixth is accepted.
BY_HAND = [
    [(0.9, R), (0.2, W), (0.1, W)],
    [(0.9, W), (0.2, R)],
    [(0.4, R), (0.3, W)],
    [(0.9, R), (0.8, R)],
    [(0.9, R), (0.1, R)],
    [(0.5, R)],
]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("accuracy_on_erroneous", 1 / 3),
        ("accuracy_on_correct", 2 / 3),
        ("f1", 2 * (1 / 3) * (2 / 3) / (1 / 3 + 2 / 3)),
        ("first_error_accuracy", 3 / 6),
        ("step_accuracy", 8 / 12),
        ("balanced_accuracy", (3 / 4 + 5 / 8) / 2),
    ],
)
def test_the_metrics_of_the_benchmarks_by_hand(name, expected):
    # Wrong steps: .2 .1 .3 are detected, .9 is missed. Right steps: .2 .4 .1 are rejected, .9 .9 .8 .9 .5 accepted.
    assert ours(BY_HAND, 0.5, name) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
@given(some_trajectories, st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 3.5, 4.0, 9.0]))
@settings(max_examples=30, deadline=None)
def test_every_metric_equals_the_loop(name, trajectories, threshold):
    expected = naive(trajectories, threshold, name)
    got = ours(trajectories, threshold, name)
    assert got is None if expected is None else got == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.chosen_by == name])
@given(some_trajectories)
@settings(max_examples=30, deadline=None)
def test_the_chosen_threshold_is_the_best_of_all(name, trajectories):
    thresholds = step_metrics.candidates(columns(trajectories)[0])
    chosen = step_metrics.best_threshold(verdicts_of(trajectories, name), thresholds, METRICS[name].rate)
    everywhere = [naive(trajectories, threshold, name) for threshold in np.arange(-0.75, 5.5, 0.25)]
    if everywhere[0] is None:
        assert chosen is None
    else:
        assert naive(trajectories, chosen, name) == pytest.approx(max(everywhere))


@given(some_trajectories, st.sampled_from([0.25, 1.0, 8.0]), st.sampled_from([-16.0, 0.0, 3.0]))
@settings(max_examples=30, deadline=None)
def test_rescaling_the_values_changes_no_verdict(trajectories, scale, shift):
    moved = [[(scale * value + shift, wrong) for value, wrong in steps] for steps in trajectories]
    hits = []
    for scaled in (trajectories, moved):
        verdicts = verdicts_of(scaled, "first_error_accuracy")
        chosen = step_metrics.best_threshold(
            verdicts, step_metrics.candidates(columns(scaled)[0]), step_metrics.accuracy
        )
        hits.append(verdicts.hits(chosen).tolist())
    assert hits[0] == hits[1]


@given(some_trajectories, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_trajectories_changes_nothing(trajectories, random):
    shuffled = random.sample(trajectories, len(trajectories))
    for name, metric in METRICS.items():
        results = []
        for ordered in (trajectories, shuffled):
            chosen = step_metrics.best_threshold(
                verdicts_of(ordered, metric.chosen_by),
                step_metrics.candidates(columns(ordered)[0]),
                METRICS[metric.chosen_by].rate,
            )
            results.append((chosen, None if chosen is None else ours(ordered, chosen, name)))
        assert results[0] == results[1]


@given(some_trajectories, st.data())
@settings(max_examples=30, deadline=None)
def test_a_resample_of_tasks_equals_the_repeated_trajectories(trajectories, data):
    tasks = data.draw(st.lists(st.integers(0, 2), min_size=len(trajectories), max_size=len(trajectories)))
    counts = data.draw(st.lists(st.integers(0, 2), min_size=max(tasks) + 1, max_size=max(tasks) + 1))
    repeated = [steps for steps, task in zip(trajectories, tasks, strict=True) for _ in range(counts[task])]
    for name in METRICS:
        expected = naive(repeated, 1.5, name)
        got = ours(trajectories, 1.5, name, tasks, np.array([counts], float))
        assert got is None if expected is None else got == pytest.approx(expected)


def test_a_first_step_without_progress_is_accepted_whatever_the_threshold():
    endless = [[(math.inf, R), (0.2, W)], [(math.inf, W)], [(math.inf, R)]]
    for threshold in (-1.0, 0.5, 1e9):
        assert ours(endless, threshold, "accuracy_on_correct") == 1.0
    assert ours(endless, 0.5, "accuracy_on_erroneous") == 0.5  # the error at the first step is missed
    assert step_metrics.candidates(np.array([math.inf])).tolist() == [0.0]


def test_candidates_split_neighbouring_floats_and_reach_both_ends():
    low, high = 1.0, np.nextafter(1.0, 2)
    thresholds = step_metrics.candidates(np.array([high, low, high, math.inf]))
    assert [[bool(value < t) for value in (low, high)] for t in thresholds] == [
        [False, False],
        [True, False],
        [True, True],
    ]


def test_without_wrong_steps_some_thresholds_are_not_defined():
    right = [[(0.1, R), (0.9, R)], [(0.5, R)]]
    thresholds = step_metrics.candidates(columns(right)[0])
    for name, defined in {"step_accuracy": True, "balanced_accuracy": False, "f1": False}.items():
        chosen = step_metrics.best_threshold(verdicts_of(right, name), thresholds, METRICS[name].rate)
        assert (chosen is not None) == defined
    assert ours(right, 0.0, "f1") is None and ours(right, 0.0, "accuracy_on_correct") == 1.0


@given(st.lists(st.tuples(few_levels, st.sampled_from([-1, 0, 1])), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_two_thresholds_are_the_best_pair_of_all(steps):
    values, labels = (np.array(column, float) for column in zip(*steps, strict=True))
    share = lambda low, high: np.mean(
        [(-1 if v < low else 0 if v < high else 1) == label for v, label in zip(values, labels, strict=True)]
    )
    low, high = step_metrics.best_ternary_thresholds(values, labels, step_metrics.candidates(values))
    grid = np.arange(-0.5, 6, 0.5)
    best = max(share(a, b) for a in grid for b in grid if a <= b)
    assert low <= high
    assert step_metrics.ternary_hits(values, labels, low, high).mean() == pytest.approx(best)
    assert share(low, high) == pytest.approx(best)
