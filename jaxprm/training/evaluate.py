"""Evaluation of a reward model's step values on a split of trajectories. Shapes: B rows, S step slots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxprm.evaluation.value_metrics import StepRecords, validation

if TYPE_CHECKING:
    from data_pipeline.batches import EvaluationBatches

# A batch to (promises, returns-to-go), both [B, S].
ValuesOf = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array]]

# Training uses the means of the estimates only, not their intervals: a few resamples are cheap.
_RESAMPLES = 50


def step_values(values_of: ValuesOf, batches: EvaluationBatches) -> StepRecords:
    """Records of every step of a split, in the order of the batches: value, return-to-go, depth, task, weight, success.

    A trajectory succeeded if its outcome is above one half. Without an outcome, the return of its first step counts.

    Raises ValueError if a value is not finite.
    """
    return StepRecords(**step_columns(values_of, batches))


def step_columns(values_of: ValuesOf, batches: EvaluationBatches, fields: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The columns of `step_values`, not checked, and these fields of the batches by step, [K] each."""
    tasks, outcomes = np.asarray(batches.split.tasks), batches.split.outcomes
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in batches:
        values, returns = (np.asarray(array) for array in values_of(batch))
        valid, example = batch["valid"], batch["example"][batch["valid"]]
        columns["values"].append(values[valid])
        columns["targets"].append(returns[valid])
        columns["depths"].append(batch["step_index"][valid] + 1)
        columns["tasks"].append(tasks[example])
        columns["weights"].append(batch["weights"][valid])
        # Slot of the first step of each slot's trajectory: the last `is_first` at or before it.
        first = np.maximum.accumulate(np.where(batch["is_first"], np.arange(valid.shape[1]), 0), axis=1)
        first_return = np.take_along_axis(returns, first, axis=1)[valid]
        columns["success"].append(np.where(np.isnan(outcomes[example]), first_return, outcomes[example]) > 0.5)
        for field in fields:
            columns[field].append(batch[field][valid])
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def summary(records: StepRecords) -> dict[str, float | None]:
    """{"loss", "explained_variance", "auroc", "auroc_within_task"} over all steps, as in `value_metrics.validation`.

    None where a number is not defined, for example an AUROC without failures.
    """
    return {name: estimate["mean"] for name, estimate in validation([records], samples=_RESAMPLES).items()}
