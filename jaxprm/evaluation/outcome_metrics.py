"""Metrics against outcomes: summaries over steps, tables by depth, best of n attempts, and baselines to compare with.

K steps of several trajectories; every function takes the steps of one reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxprm.evaluation.scored import ScoredTrajectory, Steps, returns
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
    within_task_auroc,
)
from jaxprm.evaluation.value_metrics import StepRecords, calibration, value_by_depth

# Fewer bins where a single depth has to fill them.
BINS, BINS_OF_A_DEPTH = 10, 5


def records_of(rows: Sequence[ScoredTrajectory], steps: Steps, model: int, discount: float) -> StepRecords:
    """The steps of trajectories that all have an outcome, with the values of one model; success is an outcome > 1/2.

    Args:
        steps: `steps_of(rows)`.
        model: index of the model in the rows' promises.
        discount: the model's, which its promises estimate the return with.
    """
    return StepRecords(
        values=np.concatenate([row.promises[model] for row in rows]),
        targets=np.concatenate([returns(row, discount) for row in rows]),
        depths=steps.depth,
        tasks=steps.task,
        weights=np.ones(len(steps.row)),
        success=np.array([row.outcome > 0.5 for row in rows])[steps.row],
    )


def summary(records: StepRecords, tasks: int) -> dict[str, Measure]:
    """Measures over all steps, by name.

        mse = mean (x - y)^2,    brier = mean (clip(x, 0, 1) - success)^2

    of value x and target y; the others as in `jaxprm.evaluation.statistics` and `calibration_error`.

    tasks: how many tasks the records are numbered by; some may have no step here.
    """
    r = records
    present = len(np.unique(r.tasks))
    pairs = task_pairs(r.values, r.success, r.tasks, tasks)
    squares = (r.values - r.targets) ** 2
    brier = (np.clip(r.values, 0, 1) - r.success) ** 2
    bins = equal_mass_bins(r.values, BINS)
    return {
        "mse": Measure(mean_by_task(squares, r.tasks, tasks), present),
        "brier": Measure(mean_by_task(brier, r.tasks, tasks), present),
        "calibration_error": Measure(calibration_error(r, bins, tasks), present),
        "explained_variance": Measure(explained_variance_by_task(r.values, r.targets, r.tasks, tasks), present),
        "auroc": Measure(pairs.auroc, present),
        "auroc_within_task": _auroc_at_equal_depth(r, tasks),
    }


def calibration_error(records: StepRecords, bins: NDArray[np.int64], tasks: int) -> TaskStatistic:
    """Expected calibration error (Naeini et al. 2015) as a function of how often each task is drawn.

        sum_b n_b / n |mean_b y - mean_b x| = sum_b |sum_{k in b} (y_k - x_k)| / n

    The bins, [K], are those of all steps in every resample. Noise only adds to a sum of distances, so resamples lie
    above the point estimate.
    """
    size = int(bins.max(initial=-1)) + 1
    gaps = np.bincount(records.tasks * size + bins, records.targets - records.values, minlength=tasks * size)
    steps = np.bincount(records.tasks, minlength=tasks)
    return lambda counts: ratio(np.abs(counts @ gaps.reshape(tasks, size)).sum(-1), counts @ steps)


def _auroc_at_equal_depth(records: StepRecords, tasks: int) -> Measure:
    """AUROC over the pairs of steps that share task and depth, as the candidates of a search do."""
    depths = (records.where(records.depths == depth) for depth in np.unique(records.depths))
    return within_task_auroc((task_pairs(r.values, r.success, r.tasks, tasks) for r in depths), tasks)


def by_depth(records: StepRecords, resampling: Resampling) -> list[dict[str, Any]]:
    """`value_by_depth` with the number of steps and the calibration of each depth."""
    rows = []
    for row in value_by_depth([records], **resampling.options):
        here = records.where(records.depths == row["depth"])
        _, tasks = np.unique(here.tasks, return_inverse=True)
        # Numbered without the tasks that end earlier, so that resamples draw only tasks with a step of this depth.
        here, count = replace(here, tasks=tasks), int(tasks.max()) + 1
        error = calibration_error(here, equal_mass_bins(here.values, BINS_OF_A_DEPTH), count)
        rows.append(
            row
            | {
                "steps": len(here.values),
                "calibration_error": resampling.estimate(Measure(error, count), count),
                "calibration": calibration([here], bins=BINS_OF_A_DEPTH, **resampling.options),
            }
        )
    return rows


def by_relative_depth(records: StepRecords, lengths: NDArray[np.int64], resampling: Resampling) -> list[dict[str, Any]]:
    """`value_by_depth` by the quarter of its trajectory in which a step ends: ceil(4 depth / length), 1 to 4."""
    quarters = -(-4 * records.depths // lengths)
    rows = value_by_depth([replace(records, depths=quarters)], **resampling.options)
    return [{"quarter": row.pop("depth")} | row for row in rows]


def baselines(rows: Sequence[ScoredTrajectory], steps: Steps, records: StepRecords) -> dict[str, dict[str, Measure]]:
    """`summary` of values that do not look at the text, by the name of the baseline.

    constant: the mean target. depth: the mean target of the steps with that number. other_attempts: the mean outcome of
    the other attempts at the task, over the tasks with several.
    """
    mean = np.full(len(records.values), records.targets.mean())
    totals, counts = np.bincount(steps.depth, records.targets), np.bincount(steps.depth)
    values = {"constant": mean, "depth": ratio(totals, counts)[steps.depth]}
    measures = {name: summary(replace(records, values=column), steps.count) for name, column in values.items()}
    for baseline in measures.values():
        # Fitted on these very steps, they are perfectly calibrated.
        del baseline["calibration_error"]
    outcomes = np.array([row.outcome for row in rows])
    task = steps.task[np.flatnonzero(steps.depth == 1)]  # of each trajectory
    attempts = np.bincount(task)[task]
    others = ratio(np.bincount(task, outcomes)[task] - outcomes, attempts - 1)[steps.row]
    defined = np.isfinite(others)
    if defined.any():
        measures["other_attempts"] = summary(replace(records.where(defined), values=others[defined]), steps.count)
        # Within a task it ranks an attempt by its rivals: a success has one rival success less than a failure.
        del measures["other_attempts"]["auroc_within_task"]
    return measures


def choices(rows: Sequence[ScoredTrajectory], model: int) -> dict[int, dict[str, Array]]:
    """Expected outcome of the chosen one of n attempts at a task, exact over all draws: {n: {chooser: [tasks]}}.

    n goes up in powers of two; the tasks at n are those with n attempts or more. "random" chooses blindly, "oracle" by
    the outcome, the others by the final, the mean or the lowest promise of an attempt.
    """
    pools: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        pools.setdefault(row.task, []).append(index)
    tables: dict[int, dict[str, list[float]]] = {}
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
        curves |= {name: best_of_n_curve(column, outcomes, sizes) for name, column in scores.items()}
        for index, n in enumerate(sizes):
            for name, curve in curves.items():
                tables.setdefault(n, {}).setdefault(name, []).append(float(curve[index]))
    return {n: {name: np.array(values) for name, values in table.items()} for n, table in sorted(tables.items())}


def best_of_n(tables: Mapping[int, Mapping[str, Array]], resampling: Resampling) -> list[dict[str, Any]]:
    """Estimates of `choices`: [{"n", "random", "oracle", "final", "mean", "min", "gain"}]; gain is final - random."""
    rows = []
    for n, table in tables.items():
        row: dict[str, int | Estimate] = {"n": n}
        row |= {name: bootstrap(values, **resampling.options) for name, values in table.items()}
        row["gain"] = paired_difference(table["final"], table["random"], **resampling.options)
        rows.append(row)
    return rows
