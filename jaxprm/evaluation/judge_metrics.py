"""Metrics of `evaluate`: step values against step labels and against outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxprm.evaluation import labels as core
from jaxprm.evaluation.labels import wrong_steps
from jaxprm.evaluation.scored import ScoredTrajectory, Steps, returns, steps_of
from jaxprm.evaluation.statistics import (
    Array,
    Estimate,
    Measure,
    Resampling,
    TaskStatistic,
    best_of_n_curve,
    bootstrap,
    equal_mass_bins,
    explained_variance_by_task,
    mean_by_task,
    oracle_curve,
    paired_difference,
    ratio,
    task_pairs,
)
from jaxprm.evaluation.value_metrics import StepRecords, calibration, value_by_depth

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


def labelled_steps(rows: Sequence[ScoredTrajectory], kind: str) -> Labelled:
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


BINS, BINS_OF_A_DEPTH = 10, 5


def records_of(rows: Sequence[ScoredTrajectory], steps: Steps, model: int, discount: float) -> StepRecords:
    """The steps of rows that all have an outcome; they succeeded if it is above one half."""
    return StepRecords(
        values=np.concatenate([row.promises[model] for row in rows]),
        targets=np.concatenate([returns(row, discount) for row in rows]),
        depths=steps.depth,
        tasks=steps.task,
        weights=np.ones(len(steps.row)),
        success=np.array([row.outcome > 0.5 for row in rows])[steps.row],
    )


def summary(records: StepRecords, tasks: int) -> dict[str, Measure]:
    """The numbers over all steps, by name; `tasks` counts those that the records are numbered by."""
    r = records
    present = len(np.unique(r.tasks))
    squares = mean_by_task((r.values - r.targets) ** 2, r.tasks, tasks)
    brier = mean_by_task((np.clip(r.values, 0, 1) - r.success) ** 2, r.tasks, tasks)
    bins = equal_mass_bins(r.values, BINS)
    return {
        "mse": Measure(squares, present),
        "brier": Measure(brier, present),
        "calibration_error": Measure(calibration_error(r, bins, tasks), present),
        "explained_variance": Measure(explained_variance_by_task(r.values, r.targets, r.tasks, tasks), present),
        "auroc": Measure(task_pairs(r.values, r.success, r.tasks, tasks).auroc, present),
        "auroc_within_task": auroc_within_task(r, tasks),
    }


def calibration_error(records: StepRecords, bins: NDArray[np.int64], tasks: int) -> TaskStatistic:
    """Expected calibration error: |mean target - mean value| of each bin, weighted by the bin's share of the steps."""
    size = int(bins.max(initial=-1)) + 1
    gaps = np.bincount(records.tasks * size + bins, records.targets - records.values, minlength=tasks * size)
    steps = np.bincount(records.tasks, minlength=tasks)
    return lambda counts: ratio(np.abs(counts @ gaps.reshape(tasks, size)).sum(-1), counts @ steps)


def auroc_within_task(records: StepRecords, tasks: int) -> Measure:
    """Over pairs of steps that share task and depth."""
    wins, pairs = np.zeros(tasks), np.zeros(tasks)
    for depth in np.unique(records.depths):
        here = records.where(records.depths == depth)
        found = task_pairs(here.values, here.success, here.tasks, tasks)
        wins, pairs = wins + found.wins_within, pairs + found.pairs_within
    return Measure(lambda counts: ratio(counts @ wins, counts @ pairs), np.count_nonzero(pairs))


def by_depth(records: StepRecords, resampling: Resampling) -> list[dict[str, Any]]:
    """`value_by_depth`, and of each depth the number of steps and the calibration."""
    options = {"samples": resampling.samples, "seed": resampling.seed}
    rows = []
    for row in value_by_depth([records], **options):
        here = records.where(records.depths == row["depth"])
        _, tasks = np.unique(here.tasks, return_inverse=True)
        here, count = replace(here, tasks=tasks), int(tasks.max()) + 1
        error = calibration_error(here, equal_mass_bins(here.values, BINS_OF_A_DEPTH), count)
        rows.append(
            row
            | {
                "steps": len(here.values),
                "calibration_error": resampling.estimate(Measure(error, count), count),
                "calibration": calibration([here], bins=BINS_OF_A_DEPTH, **options),
            }
        )
    return rows


def by_relative_depth(records: StepRecords, lengths: NDArray[np.int64], resampling: Resampling) -> list[dict[str, Any]]:
    """`value_by_depth` by the quarter of its trajectory in which a step ends, 1 to 4."""
    quarters = -(-4 * records.depths // lengths)
    rows = value_by_depth([replace(records, depths=quarters)], samples=resampling.samples, seed=resampling.seed)
    return [{"quarter": row.pop("depth")} | row for row in rows]


def baselines(rows: Sequence[ScoredTrajectory], steps: Steps, records: StepRecords) -> dict[str, dict[str, Measure]]:
    """The same numbers for values that have read nothing.

    constant: the mean target. depth: the mean target of the steps of that number. Both are fitted on these very steps,
    so their calibration is perfect and left out. other_attempts: the mean outcome of the other attempts at the task,
    over the tasks that have some; within a task it ranks an attempt by its rivals, so that number is left out.
    """
    mean = np.full(len(records.values), records.targets.mean())
    totals, counts = np.bincount(steps.depth, records.targets), np.bincount(steps.depth)
    values = {"constant": mean, "depth": ratio(totals, counts)[steps.depth]}
    found = {name: summary(replace(records, values=one), steps.count) for name, one in values.items()}
    for one in found.values():
        del one["calibration_error"]
    outcomes = np.array([row.outcome for row in rows])
    task = steps.task[np.flatnonzero(steps.depth == 1)]
    attempts = np.bincount(task)[task]
    others = ratio(np.bincount(task, outcomes)[task] - outcomes, attempts - 1)[steps.row]
    some = np.isfinite(others)
    if some.any():
        found["other_attempts"] = summary(replace(records.where(some), values=others[some]), steps.count)
        del found["other_attempts"]["auroc_within_task"]
    return found


def choices(rows: Sequence[ScoredTrajectory], model: int) -> dict[int, dict[str, Array]]:
    """Outcome of the best of n attempts at a task, exactly over all draws: by n, by how it is chosen, [tasks].

    n goes up in powers of two; at each n are the tasks with n attempts or more. "random" chooses blindly, "oracle" by
    the outcome, the others by the final, the mean or the lowest promise of an attempt.
    """
    pools: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        pools.setdefault(row.task, []).append(index)
    found: dict[int, dict[str, list[float]]] = {}
    for task in sorted(pools):
        pool = [rows[index] for index in pools[task]]
        sizes = [2**power for power in range(1, len(pool).bit_length())]
        if not sizes:
            continue
        outcomes = np.array([row.outcome for row in pool])
        curves = {"random": np.full(len(sizes), outcomes.mean()), "oracle": oracle_curve(outcomes, sizes)}
        promises = [row.promises[model] for row in pool]
        scores = {"final": [p[-1] for p in promises], "mean": [p.mean() for p in promises]}
        scores["min"] = [p.min() for p in promises]
        curves |= {name: best_of_n_curve(one, outcomes, sizes) for name, one in scores.items()}
        for place, n in enumerate(sizes):
            for name, curve in curves.items():
                found.setdefault(n, {}).setdefault(name, []).append(float(curve[place]))
    return {n: {name: np.array(values) for name, values in table.items()} for n, table in sorted(found.items())}


def best_of_n(tables: Mapping[int, Mapping[str, Array]], resampling: Resampling) -> list[dict[str, Any]]:
    """[{"n", "random", "oracle", "final", "mean", "min", "gain"}], each an estimate; gain is final minus random."""
    options = {"samples": resampling.samples, "seed": resampling.seed}
    rows = []
    for n, table in tables.items():
        row: dict[str, int | Estimate] = {"n": n}
        row |= {name: bootstrap(values, **options) for name, values in table.items()}
        row["gain"] = paired_difference(table["final"], table["random"], **options)
        rows.append(row)
    return rows
