"""Quality of step values on held-out trajectories: three parts of results.json, named as the functions here.

K steps of all trajectories together. Intervals of estimates ({"mean", "low", "high", "n"}) are resampled by task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxprm.evaluation.statistics import (
    SAMPLES,
    Array,
    Estimate,
    TaskPairs,
    bootstrap,
    bootstrap_statistic,
    equal_mass_bins,
    explained_variance_by_task,
    task_pairs,
)


@dataclass(frozen=True)
class StepRecords:
    """One reward model's values of the steps of many trajectories, with what they are compared with; all arrays [K].

    Raises ValueError for arrays of other shapes, values that are not finite, negative weights and depths below 1.
    """

    values: Array  # the promise
    targets: Array  # the trajectory's outcome or return-to-go; never a bootstrapped target
    depths: NDArray[np.int64]  # 1 for the first step
    tasks: NDArray[Any]  # ids, the same in every seed
    weights: Array  # how often the trajectory was sampled
    success: NDArray[np.bool_]  # whether the trajectory succeeded

    def __post_init__(self) -> None:
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        for name, array in arrays.items():
            if array.ndim != 1 or array.shape != arrays["values"].shape:
                raise ValueError(f"{name} has shape {array.shape}, values {arrays['values'].shape}; give all as [K]")
            object.__setattr__(self, name, array)
        for name in ("values", "targets", "weights"):
            if not np.all(np.isfinite(arrays[name])):
                raise ValueError(f"step {np.flatnonzero(~np.isfinite(arrays[name]))[0]}: {name} is not finite")
        if np.any(arrays["weights"] < 0) or np.any(arrays["depths"] < 1):
            raise ValueError("weights must not be negative, and depths count from 1")
        object.__setattr__(self, "success", arrays["success"].astype(bool))

    def where(self, mask: NDArray[np.bool_]) -> StepRecords:
        """The steps that a mask (or an index array) selects."""
        return StepRecords(*(getattr(self, field.name)[mask] for field in fields(self)))


def value_by_depth(records: Sequence[StepRecords], *, samples: int = SAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Mean values in successful and in failed trajectories by step number, and how well values tell them apart.

    Args:
        records: one per seed, of the same tasks.

    Returns:
        [{"depth", "success", "failure", "auroc", "auroc_within_task"}] by ascending depth, all but the first estimates.
        "auroc" is over all pairs of steps of that depth (knowing which tasks are hard helps), "auroc_within_task" over
        the pairs that share a task.
    """
    records, count = _indexed(records)
    rows = []
    for depth in sorted(set(np.concatenate([r.depths for r in records]).tolist())):
        here = [r.where(r.depths == depth) for r in records]
        pairs = [_pairs(r, count) for r in here]
        present = np.count_nonzero(sum(p.positives + p.negatives for p in pairs))
        options = {"samples": samples, "seed": seed}
        rows.append(
            {
                "depth": depth,
                "success": _mean([r.where(r.success) for r in here], "values", count, **options),
                "failure": _mean([r.where(~r.success) for r in here], "values", count, **options),
                "auroc": bootstrap_statistic([p.auroc for p in pairs], count, n=present, **options),
                "auroc_within_task": _within_task([pairs], **options),
            }
        )
    return rows


def calibration(
    records: Sequence[StepRecords], *, bins: int = 10, samples: int = SAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Reliability table: mean target against mean value in bins of about equal weight.

    Args:
        records: one per seed. Bins are over the steps of all seeds together, so that seeds share their edges.

    Returns:
        [{"predicted": float, "observed": estimate}] by ascending prediction; fewer than `bins` if few values differ.
    """
    records, count = _indexed(records)
    values, weights = (np.concatenate([getattr(r, name) for r in records]) for name in ("values", "weights"))
    bin_of = equal_mass_bins(values, bins, weights)
    by_seed = np.split(bin_of, np.cumsum([len(r.values) for r in records])[:-1])
    rows = []
    for index in range(bin_of.max(initial=-1) + 1):
        inside = [r.where(b == index) for r, b in zip(records, by_seed, strict=True)]
        predicted = np.average(values[bin_of == index], weights=weights[bin_of == index])
        observed = _mean(inside, "targets", count, samples=samples, seed=seed)
        rows.append({"predicted": float(predicted), "observed": observed})
    return rows


def validation(records: Sequence[StepRecords], *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Summary over all steps.

    Args:
        records: one per seed.

    Returns:
        {"loss", "explained_variance", "auroc", "auroc_within_task"}, each an estimate. "loss" is the mean of
        1/2 (value - target)^2; "auroc" tells steps of successes from steps of failures, over all pairs of steps;
        "auroc_within_task" is over pairs that share task and depth, as the candidates of a search do.
    """
    records, count = _indexed(records)
    options = {"samples": samples, "seed": seed}
    losses = [replace(r, values=(r.values - r.targets) ** 2 / 2) for r in records]
    explained = [explained_variance_by_task(r.values, r.targets, r.tasks, count, r.weights) for r in records]
    depths = set(np.concatenate([r.depths for r in records]).tolist())
    by_depth = [[_pairs(r.where(r.depths == depth), count) for r in records] for depth in sorted(depths)]
    return {
        "loss": _mean(losses, "values", count, **options),
        "explained_variance": bootstrap_statistic(explained, count, **options),
        "auroc": bootstrap_statistic([_pairs(r, count).auroc for r in records], count, **options),
        "auroc_within_task": _within_task(by_depth, **options),
    }


def _indexed(records: Sequence[StepRecords]) -> tuple[list[StepRecords], int]:
    """The steps with a weight above 0, with tasks numbered from 0 across seeds, and the number of tasks."""
    records = [r.where(r.weights > 0) for r in records]
    if not any(len(r.values) for r in records):
        raise ValueError("no steps to evaluate: give at least one record with a weight above 0")
    tasks, index = np.unique(np.concatenate([r.tasks for r in records]), return_inverse=True)
    split = np.split(index, np.cumsum([len(r.tasks) for r in records])[:-1])
    return [replace(r, tasks=i) for r, i in zip(records, split, strict=True)], len(tasks)


def _pairs(records: StepRecords, count: int) -> TaskPairs:
    return task_pairs(records.values, records.success, records.tasks, count, records.weights)


def _mean(records: Sequence[StepRecords], name: str, count: int, **options) -> Estimate:
    """Weighted mean of a column over steps: a ratio of sums over tasks."""
    totals = np.stack([np.bincount(r.tasks, r.weights * getattr(r, name), minlength=count) for r in records])
    weights = np.stack([np.bincount(r.tasks, r.weights, minlength=count) for r in records])
    return _ratio_of_sums(totals, weights, **options)


def _within_task(groups: Sequence[Sequence[TaskPairs]], **options) -> Estimate:
    """Share of pairs inside a task that are ranked correctly. groups: the pairs of each seed, for each depth."""
    wins, pairs = (
        np.stack([np.stack([getattr(p, name) for p in seeds]) for seeds in groups]).sum(0)
        for name in ("wins_within", "pairs_within")
    )
    return _ratio_of_sums(wins, pairs, **options)


def _ratio_of_sums(totals: Array, weights: Array, **options) -> Estimate:
    """Sum of totals over sum of weights, [seeds, tasks] each, as a weighted mean of the quotient of each task."""
    means = np.divide(totals, weights, out=np.zeros(totals.shape), where=weights > 0)
    return bootstrap(means, weights=weights, **options)
