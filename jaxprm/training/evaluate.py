"""Evaluation of a reward model's step values on a split of trajectories. Shapes: B rows, S step slots, K steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxprm import config as config_lib
from jaxprm.evaluation.value_metrics import StepRecords, validation
from jaxprm.objectives import find_objective, trains_on_labels, trains_on_pairs

if TYPE_CHECKING:
    from data_pipeline.batches import EvaluationBatches

# A batch to (promises, returns-to-go), both [B, S].
ValuesOf = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array]]

# Training uses the means of the estimates only, not their intervals: a few resamples are cheap.
_RESAMPLES = 50
# Of a probability in a cross-entropy: float32 rounds 1 - 1e-8 to 1.
_SMALLEST = 1e-7
_UNDEFINED = dict.fromkeys(("loss", "explained_variance", "auroc", "auroc_within_task"))


class SplitValues(NamedTuple):
    """A model's values of the steps of a split.

    outcomes: the steps of trajectories with an outcome; None without any.
    labels: [K], NaN without a label, and has_outcome: bool [K], both with an entry for every step of `columns`.
    columns: values, targets (NaN without an outcome), depths, tasks, weights and success of every step, [K] each.
    """

    columns: dict[str, np.ndarray]
    labels: np.ndarray
    has_outcome: np.ndarray

    @property
    def outcomes(self) -> StepRecords | None:
        if not self.has_outcome.any():
            return None
        return StepRecords(**{name: column[self.has_outcome] for name, column in self.columns.items()})


def step_values(values_of: ValuesOf, batches: EvaluationBatches) -> SplitValues:
    """Value, return-to-go, depth, task, weight, success and label of every step, in the order of the batches.

    A trajectory succeeded if its outcome is above one half. Without an outcome, the return of its first step counts.
    """
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
        columns["labels"].append(batch["step_labels"][valid])
        columns["has_outcome"].append(~np.isnan(batch["rewards"][valid]))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    return SplitValues(labels=arrays.pop("labels"), has_outcome=arrays.pop("has_outcome"), columns=arrays)


def summary(values: SplitValues, settings: config_lib.RewardModelConfig) -> dict[str, float | None]:
    """{"loss", "explained_variance", "auroc", "auroc_within_task"} of steps with outcomes: `value_metrics.validation`.

    Step labels add "label_loss", "label_auroc" and "label_auroc_within_task"; pairs "preference_loss" and
    "pair_accuracy". "loss" is what the objective trains: for labels and pairs theirs, for a mixture that of training
    with the return of each step as its target. None where a number is not defined, for example an AUROC without
    failures.

    Raises ValueError if a value is not finite.
    """
    outcomes = values.outcomes
    numbers: dict[str, float | None] = dict(_UNDEFINED)
    if outcomes is not None:
        numbers = _means(outcomes)
    if trains_on_pairs(settings):
        pairs = _pair_numbers(values)
        return numbers | pairs | {"loss": pairs["preference_loss"]}
    if not trains_on_labels(settings):
        return numbers
    return numbers | _label_numbers(values, settings)


def _means(records: StepRecords) -> dict[str, float | None]:
    return {name: estimate["mean"] for name, estimate in validation([records], samples=_RESAMPLES).items()}


def _label_numbers(values: SplitValues, settings: config_lib.RewardModelConfig) -> dict[str, float | None]:
    low, high = settings.labels.range or (0.0, 1.0)
    targets = (values.labels - low) / (high - low)
    labelled = ~np.isnan(targets)
    promises, weights = values.columns["values"].astype(float), values.columns["weights"].astype(float)
    if settings.labels.loss == "bce":
        inside = np.clip(promises, _SMALLEST, 1 - _SMALLEST)
        losses = -targets * np.log(inside) - (1 - targets) * np.log1p(-inside)
    else:
        losses = (promises - targets) ** 2 / 2
    # As in the loss of training, with the returns as targets.
    shares = np.where(labelled, np.where(values.has_outcome, settings.labels.weight, 1.0), 0.0)
    if find_objective(settings.objective).supervision == "labels":
        shares = labelled.astype(float)
        trained = labelled
    else:
        trained = labelled | values.has_outcome
    returns = np.where(values.has_outcome, values.columns["targets"], 0.0)
    mixed = (1 - shares) * (promises - returns) ** 2 / 2 + shares * np.where(labelled, losses, 0.0)
    loss = np.average(mixed[trained], weights=weights[trained])
    records = StepRecords(
        **{name: values.columns[name][labelled] for name in ("values", "depths", "tasks", "weights")},
        targets=targets[labelled],
        success=targets[labelled] >= 0.5,
    )
    means = _means(records)
    return {
        "loss": float(loss),
        "label_loss": float(np.average(losses[labelled], weights=weights[labelled])),
        "label_auroc": means["auroc"],
        "label_auroc_within_task": means["auroc_within_task"],
    }


def _pair_numbers(values: SplitValues) -> dict[str, Any]:
    """A pair is the chosen action, of depth 1, and one of the rejected actions after it."""
    promises, weights, chosen = (
        values.columns["values"].astype(float),
        values.columns["weights"],
        values.columns["depths"] == 1,
    )
    margins = (promises[np.maximum.accumulate(np.where(chosen, np.arange(len(chosen)), 0))] - promises)[~chosen]
    if not np.isfinite(margins).all():
        raise ValueError("the value of an action is not finite")
    ordered = (margins > 0) + 0.5 * (margins == 0)
    return {
        "preference_loss": float(np.average(np.logaddexp(0, -margins), weights=weights[~chosen])),
        "pair_accuracy": float(np.average(ordered, weights=weights[~chosen])),
    }
