"""Step values against somebody's step labels: thresholds chosen on some tasks, numbers from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxprm.evaluation import step_labels as core
from jaxprm.evaluation.labels import wrong_steps
from jaxprm.evaluation.measure import Measure
from jaxprm.evaluation.scored import Row, steps_of
from jaxprm.evaluation.statistics import Array, mean_by_task, ratio, task_pairs

Threshold = float | tuple[float, float]
Thresholds = Mapping[str, Threshold | None]

MODEL_CRITERIA = ("promise", "progress")
BASELINES = ("constant", "depth")


class Metric(NamedTuple):
    unit: str  # what is counted: "step" or "trajectory"
    rate: core.Rate
    chosen_by: str  # the metric whose best threshold it is read at


METRICS = {
    "step_accuracy": Metric("step", core.accuracy, "step_accuracy"),
    "balanced_accuracy": Metric("step", core.balanced_accuracy, "balanced_accuracy"),
    "first_error_accuracy": Metric("trajectory", core.accuracy, "first_error_accuracy"),
    "f1": Metric("trajectory", core.harmonic_mean, "f1"),
    "accuracy_on_erroneous": Metric("trajectory", core.accuracy_on_wrong, "f1"),
    "accuracy_on_correct": Metric("trajectory", core.accuracy_on_right, "f1"),
}
TERNARY = "ternary_accuracy"
# Where the validation part has no wrong steps, or no right ones, there may be no best threshold.
NOT_DEFINED = Measure(lambda counts: np.full(len(counts), np.nan), 0)


@dataclass(frozen=True)
class Labelled:
    """The labelled steps of some rows, all [N]."""

    labels: Array
    wrong: NDArray[np.bool_]
    depth: NDArray[np.int64]
    row: NDArray[np.int64]
    task: NDArray[np.int64]
    tasks: int
    columns: tuple[dict[str, Array], ...]  # promise and progress of each model; infinite for a first step's progress

    def values(self, criterion: str, model: int = 0) -> Array:
        """What a threshold is set on: a step below it is judged wrong."""
        if criterion == "constant":
            return np.zeros(len(self.labels))
        return -self.depth.astype(float) if criterion == "depth" else self.columns[model][criterion]

    def verdicts(self, unit: str, values: Array) -> core.Verdicts:
        if unit == "step":
            return core.step_verdicts(values, self.wrong, self.task)
        return core.first_error_verdicts(values, self.wrong, self.task, self.row)


def labelled_steps(rows: Sequence[Row], kind: str) -> Labelled:
    """The steps with a label, of rows that have one at least."""
    steps = steps_of(rows)
    labels = np.concatenate([row.labels.values for row in rows])
    known = ~np.isnan(labels)
    columns = []
    for model in range(len(rows[0].promises)):
        promise = np.concatenate([row.promises[model] for row in rows])
        progress = np.concatenate([np.diff(row.promises[model], prepend=-np.inf) for row in rows])
        columns.append({"promise": promise[known], "progress": progress[known]})
    wrong = wrong_steps(labels, kind)[known]
    place = (labels[known], wrong, steps.depth[known], steps.row[known], steps.task[known])
    return Labelled(*place, steps.count, tuple(columns))


def choose(some: Labelled, kind: str, criterion: str, model: int = 0) -> Thresholds:
    """The best threshold of each metric on the validation part; None where it is not defined there."""
    values = some.values(criterion, model)
    thresholds = core.candidates(values)
    chosen: dict[str, Threshold | None] = {}
    for name, metric in METRICS.items():
        if metric.chosen_by == name:
            chosen[name] = core.best_threshold(some.verdicts(metric.unit, values), thresholds, metric.rate)
    if kind == "ternary":
        chosen[TERNARY] = core.best_ternary_thresholds(values, some.labels, thresholds)
    return chosen


def fixed(threshold: float) -> Thresholds:
    """One threshold for every metric; three labels would need two."""
    return {name: threshold for name, metric in METRICS.items() if metric.chosen_by == name}


def measures(some: Labelled, kind: str, criterion: str, thresholds: Thresholds, model: int = 0) -> dict[str, Measure]:
    """Every metric at its threshold, and how well the value ranks right steps above wrong ones, without any."""
    values = some.values(criterion, model)
    present = len(np.unique(some.task))
    found = {}
    for name, metric in METRICS.items():
        threshold, verdicts = thresholds.get(metric.chosen_by), some.verdicts(metric.unit, values)
        found[name] = NOT_DEFINED
        if threshold is not None:
            found[name] = Measure(core.rate_by_task(verdicts, threshold, metric.rate, some.tasks), present)
    if kind == "ternary":
        found[TERNARY] = NOT_DEFINED
        if thresholds.get(TERNARY) is not None:
            hits = core.ternary_hits(values, some.labels, *thresholds[TERNARY])
            found[TERNARY] = Measure(mean_by_task(hits, some.task, some.tasks), present)
    ranked = np.isfinite(values)
    pairs = task_pairs(values[ranked], ~some.wrong[ranked], some.task[ranked], some.tasks)
    found["auroc"] = Measure(pairs.auroc, len(np.unique(some.task[ranked])))
    wins, within = pairs.wins_within, pairs.pairs_within
    found["auroc_within_task"] = Measure(lambda counts: ratio(counts @ wins, counts @ within), np.count_nonzero(within))
    return found


def soft_measures(some: Labelled, values: Array) -> dict[str, Measure]:
    """Correlation, rank correlation and mean squared error of values and labels, over the steps that have a value.

    The ranks are those of all steps, in every resample.
    """
    ranked = np.isfinite(values)
    values, labels, task = values[ranked], some.labels[ranked], some.task[ranked]
    if not len(values):
        return {}
    present = len(np.unique(task))
    ranks = core.pearson_by_task(core.ranks(values), core.ranks(labels), task, some.tasks)
    return {
        "correlation": Measure(core.pearson_by_task(values, labels, task, some.tasks), present),
        "rank_correlation": Measure(ranks, present),
        "mse": Measure(mean_by_task((values - labels) ** 2, task, some.tasks), present),
    }
