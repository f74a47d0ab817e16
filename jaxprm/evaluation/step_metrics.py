"""Metrics against step labels: thresholds chosen on validation tasks, accuracies at them, and threshold-free rankings.

A step is judged wrong if its value is below a threshold. The rates are those of ProcessBench (arXiv 2412.06559) and
AgentProcessBench (arXiv 2603.14465). Shapes: K labelled steps of several trajectories, U units to judge (steps or
trajectories), T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxprm.evaluation.labels import wrong_steps
from jaxprm.evaluation.scored import ScoredTrajectory, steps_of
from jaxprm.evaluation.statistics import (
    Array,
    Measure,
    TaskStatistic,
    mean_by_task,
    pearson_by_task,
    ranks,
    ratio,
    sums_by_task,
    task_pairs,
    within_task_auroc,
)

# A number between 0 and 1 from four counts of any one shape: hits among the wrong units, number of wrong units, hits
# among the right units, number of right units.
Rate = Callable[[Array, Array, Array, Array], Array]
Threshold = float | tuple[float, float]
# The threshold of each metric; None where it is not defined on the validation tasks.
Thresholds = Mapping[str, Threshold | None]

# The values that a threshold can be set on: those of the model, and those of baselines that do not look at the text.
MODEL_CRITERIA = ("promise", "progress")
BASELINES = ("constant", "depth")


@dataclass(frozen=True)
class LabelledSteps:
    """The labelled steps of several trajectories, all [K]."""

    labels: Array
    wrong: NDArray[np.bool_]
    depth: NDArray[np.int64]
    row: NDArray[np.int64]
    task: NDArray[np.int64]
    tasks: int
    model_values: tuple[dict[str, Array], ...]  # MODEL_CRITERIA of each model; the progress of a first step is infinite
    complete: LabelledSteps | None = None  # the same trajectories with their unlabelled steps, which are not wrong

    def values(self, criterion: str, model: int = 0) -> Array:
        """The values that a threshold is set on, [K]. model: index of the model; baselines ignore it."""
        if criterion == "constant":
            return np.zeros(len(self.labels))
        return -self.depth.astype(float) if criterion == "depth" else self.model_values[model][criterion]

    def verdicts(self, unit: str, values: Array) -> Verdicts:
        if unit == "step":
            return step_verdicts(values, self.wrong, self.task)
        return first_error_verdicts(values, self.wrong, self.task, self.row)


def labelled_steps(rows: Sequence[ScoredTrajectory], kind: str, starts: Sequence[float] | None = None) -> LabelledSteps:
    """The steps with a label, of trajectories that have at least one.

    starts: value of each model before the first step; by default -inf, so that first steps are always accepted.
    """
    steps = steps_of(rows)
    labels = np.concatenate([row.labels.values for row in rows])
    labelled = ~np.isnan(labels)
    model_values = []
    for model, start in enumerate(starts or [-np.inf] * len(rows[0].promises)):
        promise = np.concatenate([row.promises[model] for row in rows])
        # Before unlabelled steps are dropped: progress is the difference to the step before, labelled or not.
        progress = np.concatenate([np.diff(row.promises[model], prepend=start) for row in rows])
        model_values.append({"promise": promise, "progress": progress})
    complete = LabelledSteps(
        labels=labels,
        wrong=wrong_steps(labels, kind),
        depth=steps.depth,
        row=steps.row,
        task=steps.task,
        tasks=steps.count,
        model_values=tuple(model_values),
    )
    return replace(
        complete,
        labels=labels[labelled],
        wrong=complete.wrong[labelled],
        depth=steps.depth[labelled],
        row=steps.row[labelled],
        task=steps.task[labelled],
        model_values=tuple(
            {name: values[labelled] for name, values in of_model.items()} for of_model in complete.model_values
        ),
        complete=complete,
    )


@dataclass(frozen=True)
class Verdicts:
    """Units to judge, all [U]: unit u is judged correctly by the thresholds t with low_u < t <= high_u."""

    low: Array
    high: Array
    wrong: NDArray[np.bool_]  # a wrong step, or a trajectory with a wrong step
    tasks: NDArray[np.int64]

    def hits(self, threshold: float) -> NDArray[np.bool_]:
        return (self.low < threshold) & (threshold <= self.high)

    def counts(self, thresholds: Array) -> tuple[Array, float, Array, float]:
        """Hits among the wrong [T], number of wrong, hits among the right [T], number of right."""
        counts = []
        for group in (self.wrong, ~self.wrong):
            # Intervals opened below a threshold minus those closed below it. Empty intervals would count as -1.
            nonempty = group & (self.low < self.high)
            opened, closed = (np.searchsorted(np.sort(x[nonempty]), thresholds, "left") for x in (self.low, self.high))
            counts += [(opened - closed).astype(float), float(np.count_nonzero(group))]
        return tuple(counts)


def step_verdicts(values: Array, wrong: NDArray[np.bool_], tasks: NDArray[np.int64]) -> Verdicts:
    """Every step is a unit. All arguments [K]; a value of infinity is accepted by every threshold."""
    return Verdicts(np.where(wrong, values, -np.inf), np.where(wrong, np.inf, values), wrong, tasks)


def first_error_verdicts(
    values: Array, wrong: NDArray[np.bool_], tasks: NDArray[np.int64], trajectories: NDArray[np.int64]
) -> Verdicts:
    """Every trajectory is a unit, judged correctly if its first wrong step is the first one below the threshold.

    A trajectory without a wrong step is judged correctly if no step is below the threshold. All arguments [K], the
    steps of a trajectory adjacent and in order.
    """
    starts = np.flatnonzero(np.diff(trajectories, prepend=-1))
    low, high = np.full(len(starts), -np.inf), np.full(len(starts), np.inf)
    erroneous = np.zeros(len(starts), bool)
    for unit, (start, stop) in enumerate(zip(starts, [*starts[1:], len(values)], strict=True)):
        errors = np.flatnonzero(wrong[start:stop])
        erroneous[unit] = len(errors) > 0
        first = start + errors[0] if len(errors) else stop
        low[unit] = values[first] if len(errors) else -np.inf
        high[unit] = values[start:first].min(initial=np.inf)
    return Verdicts(low, high, erroneous, tasks[starts])


def accuracy(wrong_hits: Array, wrong: Array, right_hits: Array, right: Array) -> Array:
    """Hits / all units. NaN without units, as for all rates."""
    return ratio(wrong_hits + right_hits, np.add(wrong, right) + np.zeros(np.shape(wrong_hits)))


def accuracy_on_wrong(wrong_hits: Array, wrong: Array, right_hits: Array, right: Array) -> Array:
    return ratio(wrong_hits, wrong + np.zeros(np.shape(wrong_hits)))


def accuracy_on_right(wrong_hits: Array, wrong: Array, right_hits: Array, right: Array) -> Array:
    return accuracy_on_wrong(right_hits, right, wrong_hits, wrong)


def balanced_accuracy(*counts: Array) -> Array:
    """Mean of the accuracies on wrong and on right units."""
    return (accuracy_on_wrong(*counts) + accuracy_on_right(*counts)) / 2


def harmonic_mean(*counts: Array) -> Array:
    """Harmonic mean of the accuracies on wrong and on right units (ProcessBench's F1); 0 if both are 0."""
    on_wrong, on_right = accuracy_on_wrong(*counts), accuracy_on_right(*counts)
    total = on_wrong + on_right
    return np.where(total == 0, 0.0, ratio(2 * on_wrong * on_right, total))


class Metric(NamedTuple):
    """A rate, the unit it counts ("step" or "trajectory"), and the metric whose best threshold it is read at."""

    unit: str
    rate: Rate
    chosen_by: str


METRICS = {
    "step_accuracy": Metric("step", accuracy, "step_accuracy"),
    "balanced_accuracy": Metric("step", balanced_accuracy, "balanced_accuracy"),
    "first_error_accuracy": Metric("trajectory", accuracy, "first_error_accuracy"),
    "f1": Metric("trajectory", harmonic_mean, "f1"),
    # The two parts of F1 are read at its threshold: on correct ones alone, accepting everything would be best.
    "accuracy_on_erroneous": Metric("trajectory", accuracy_on_wrong, "f1"),
    "accuracy_on_correct": Metric("trajectory", accuracy_on_right, "f1"),
}
TERNARY = "ternary_accuracy"
# Without wrong steps, or without right ones, the validation tasks may not define a best threshold.
NOT_DEFINED = Measure(lambda counts: np.full(len(counts), np.nan), 0)


# The share of trajectories with a wrong step in which the step with the lowest value is wrong; needs no threshold.
ARGMIN = "argmin_accuracy"


def choose_thresholds(steps: LabelledSteps, kind: str, criterion: str, model: int = 0) -> Thresholds:
    """The best threshold of each metric on the steps of the validation tasks."""
    values = steps.values(criterion, model)
    thresholds = candidates(values)
    chosen: dict[str, Threshold | None] = {}
    for name, metric in METRICS.items():
        if metric.chosen_by == name:
            chosen[name] = best_threshold(steps.verdicts(metric.unit, values), thresholds, metric.rate)
    if kind == "ternary":
        chosen[TERNARY] = best_ternary_thresholds(values, steps.labels, thresholds)
    return chosen


def threshold_of(metric: str, thresholds: Thresholds) -> Threshold | None:
    """The threshold of a metric, or None."""
    threshold = thresholds.get(METRICS[metric].chosen_by)
    if threshold is None and metric == "accuracy_on_erroneous":
        # Without correct trajectories F1 is not defined, but this is. Its other part would be best at any threshold
        # that accepts everything.
        return thresholds.get("first_error_accuracy")
    return threshold


def fixed_thresholds(threshold: float) -> Thresholds:
    """The same threshold for every metric except ternary accuracy, which needs two."""
    return {name: threshold for name, metric in METRICS.items() if metric.chosen_by == name}


def candidates(values: Array) -> Array:
    """A threshold for each way to split the finite values, [T]: below all, between neighbours, above all."""
    distinct = np.unique(values[np.isfinite(values)])
    if not len(distinct):
        return np.zeros(1)
    middle = (distinct[:-1] + distinct[1:]) / 2
    # There is no float between two adjacent ones; the upper one splits them as well.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    return np.concatenate([distinct[:1], middle, [np.nextafter(distinct[-1], np.inf)]])


def best_threshold(verdicts: Verdicts, thresholds: Array, rate: Rate) -> float | None:
    """The threshold with the highest rate, the middle one of those that tie; None if no rate is defined."""
    rates = rate(*verdicts.counts(thresholds))
    if not np.isfinite(rates).any():
        return None
    best = np.flatnonzero(rates >= np.nanmax(rates) - 1e-12)
    return float(thresholds[best[(len(best) - 1) // 2]])


def best_ternary_thresholds(values: Array, labels: Array, thresholds: Array) -> tuple[float, float]:
    """The (low, high) with the highest share of correct labels: -1 below low, 0 from low to high, 1 from high on."""
    below = lambda label: np.searchsorted(np.sort(values[labels == label]), thresholds, "left")
    # Correct steps are a sum of a function of low and one of high, up to a constant: the pair needs no double loop.
    low_gain, high_gain = below(-1) - below(0), below(0) - below(1)
    # The best lower threshold at or below each upper one.
    running = np.maximum.accumulate(low_gain)
    upper = int(np.argmax(running + high_gain))
    lower = int(np.argmax(low_gain[: upper + 1]))
    return float(thresholds[lower]), float(thresholds[upper])


def ternary_hits(values: Array, labels: Array, low: float, high: float) -> NDArray[np.bool_]:
    """Mask of the steps that get their own label, [K]."""
    return np.where(values < low, -1, np.where(values < high, 0, 1)) == labels


def lowest_step_hits(steps: LabelledSteps, values: Array) -> tuple[Array, NDArray[np.int64]]:
    """(hits, tasks) [U] of the trajectories with a wrong step: whether the step with the lowest value is wrong.

    Steps of equal value share the choice. Steps without a label can be the lowest too: their choice is a miss.

    steps: with the unlabelled ones; values: of them, [K].
    """
    starts = np.flatnonzero(np.diff(steps.row, prepend=-1))
    hits, tasks = [], []
    for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
        wrong = steps.wrong[start:stop]
        if wrong.any():
            lowest = values[start:stop] == values[start:stop].min()
            hits.append(np.count_nonzero(lowest & wrong) / np.count_nonzero(lowest))
            tasks.append(steps.task[start])
    return np.array(hits, float), np.array(tasks, int)


def rate_by_task(verdicts: Verdicts, threshold: float, rate: Rate, count: int) -> TaskStatistic:
    """A rate at a threshold as a function of how often each of `count` tasks is drawn."""
    hits = verdicts.hits(threshold)
    columns = [hits & verdicts.wrong, verdicts.wrong, hits & ~verdicts.wrong, ~verdicts.wrong]
    sums = sums_by_task(columns, verdicts.tasks, count)
    return lambda counts: rate(*(counts @ sums).T)


def threshold_measures(
    steps: LabelledSteps, kind: str, criterion: str, thresholds: Thresholds, model: int = 0
) -> dict[str, Measure]:
    """Every metric at its threshold, and the AUROC of right against wrong steps, which needs none."""
    values = steps.values(criterion, model)
    present = len(np.unique(steps.task))
    measures = {}
    for name, metric in METRICS.items():
        threshold, verdicts = threshold_of(name, thresholds), steps.verdicts(metric.unit, values)
        measures[name] = NOT_DEFINED
        if threshold is not None:
            measures[name] = Measure(rate_by_task(verdicts, threshold, metric.rate, steps.tasks), present)
    if kind == "ternary":
        measures[TERNARY] = NOT_DEFINED
        if thresholds.get(TERNARY) is not None:
            hits = ternary_hits(values, steps.labels, *thresholds[TERNARY])
            measures[TERNARY] = Measure(mean_by_task(hits, steps.task, steps.tasks), present)
    hits, tasks = lowest_step_hits(steps.complete, steps.complete.values(criterion, model))
    measures[ARGMIN] = NOT_DEFINED
    if len(hits):
        measures[ARGMIN] = Measure(mean_by_task(hits, tasks, steps.tasks), len(np.unique(tasks)))
    ranked = np.isfinite(values)
    pairs = task_pairs(values[ranked], ~steps.wrong[ranked], steps.task[ranked], steps.tasks)
    measures["auroc"] = Measure(pairs.auroc, len(np.unique(steps.task[ranked])))
    measures["auroc_within_task"] = within_task_auroc([pairs], steps.tasks)
    return measures


def soft_measures(steps: LabelledSteps, values: Array) -> dict[str, Measure]:
    """Pearson's and Spearman's correlation and mean squared error of values and labels, over the finite values.

    Ranks are those among all steps, in every resample.
    """
    ranked = np.isfinite(values)
    values, labels, task = values[ranked], steps.labels[ranked], steps.task[ranked]
    if not len(values):
        return {}
    present = len(np.unique(task))
    return {
        "correlation": Measure(pearson_by_task(values, labels, task, steps.tasks), present),
        "rank_correlation": Measure(pearson_by_task(ranks(values), ranks(labels), task, steps.tasks), present),
        "mse": Measure(mean_by_task((values - labels) ** 2, task, steps.tasks), present),
    }
