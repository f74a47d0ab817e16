"""Validation of a reward model in training: against outcomes, step labels or pairs, whatever its objective trains on.

K steps of a split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxprm import config as config_lib
from jaxprm.evaluation.value_metrics import StepRecords
from jaxprm.training.evaluate import ValuesOf, step_columns, summary
from jaxprm.training.supervision import supervision_of

if TYPE_CHECKING:
    from data_pipeline.batches import EvaluationBatches

Columns = Mapping[str, np.ndarray]
Numbers = dict[str, float | None]

# Of a probability in a cross-entropy: float32 rounds 1 - 1e-8 to 1.
SMALLEST = 1e-7
_NOT_JUDGED: Numbers = dict.fromkeys(("loss", "explained_variance", "auroc", "auroc_within_task"))


def validate(
    values_of: ValuesOf, batches: EvaluationBatches, settings: config_lib.RewardModelConfig
) -> tuple[Numbers, StepRecords | None]:
    """(numbers, the steps of trajectories with an outcome or None without any) of a pass over a split.

    Numbers are `evaluate.summary` of the steps with an outcome. Step labels add "label_loss", "label_auroc" and
    "label_auroc_within_task", pairs "preference_loss" and "pair_accuracy". "loss" is that of the objective: of labels
    or pairs theirs, of a mixture that of training with the return of every step as its target. None where a number is
    not defined, for example an AUROC without failures.

    Raises ValueError if a value is not finite.
    """
    supervision = supervision_of(settings)
    columns = step_columns(values_of, batches, ("step_labels", "rewards"))
    labels, has_outcome = columns.pop("step_labels"), ~np.isnan(columns.pop("rewards"))
    if not np.isfinite(columns["values"]).all():
        raise ValueError("values are not finite")
    numbers, records = dict(_NOT_JUDGED), None
    if has_outcome.any():
        records = StepRecords(**{name: column[has_outcome] for name, column in columns.items()})
        numbers = summary(records)
    if supervision == "pairs":
        numbers |= pair_numbers(columns)
    elif supervision != "outcomes":
        # As in training: with labels alone, outcomes are no targets.
        targeted = has_outcome & (supervision != "labels")
        numbers |= label_numbers(columns, labels, targeted, settings.labels)
    return numbers, records


def label_numbers(
    columns: Columns, labels: np.ndarray, targeted: np.ndarray, settings: config_lib.LabelsConfig
) -> Numbers:
    """{"loss", "label_loss", "label_auroc", "label_auroc_within_task"} of the labels [K], NaN where there is none.

    targeted: bool [K], steps that are also trained towards their return.
    """
    low, high = settings.range or (0.0, 1.0)
    goals, labelled = (labels - low) / (high - low), ~np.isnan(labels)
    promises, weights = columns["values"].astype(float), columns["weights"]
    goals = np.where(labelled, goals, 0.0)
    if settings.loss == "bce":
        inside = np.clip(promises, SMALLEST, 1 - SMALLEST)
        losses = -goals * np.log(inside) - (1 - goals) * np.log1p(-inside)
    else:
        losses = (promises - goals) ** 2 / 2
    shares = np.where(labelled, np.where(targeted, settings.weight, 1.0), 0.0)
    returns = np.where(targeted, columns["targets"], 0.0)
    mixed, trained = (1 - shares) * (promises - returns) ** 2 / 2 + shares * losses, labelled | targeted
    numbers: Numbers = {"loss": float(np.average(mixed[trained], weights=weights[trained]))}
    if not labelled.any():
        return numbers | dict.fromkeys(("label_loss", "label_auroc", "label_auroc_within_task"))
    records = StepRecords(
        **{name: columns[name][labelled] for name in ("values", "depths", "tasks", "weights")},
        targets=goals[labelled],
        success=goals[labelled] >= 0.5,
    )
    means = summary(records)
    return numbers | {
        "label_loss": float(np.average(losses[labelled], weights=weights[labelled])),
        "label_auroc": means["auroc"],
        "label_auroc_within_task": means["auroc_within_task"],
    }


def pair_numbers(columns: Columns) -> Numbers:
    """{"loss", "preference_loss", "pair_accuracy"}. The chosen action has depth 1, its rejected ones follow it."""
    promises, chosen = columns["values"].astype(float), columns["depths"] == 1
    first = np.maximum.accumulate(np.where(chosen, np.arange(len(chosen)), 0))
    margins, weights = (promises[first] - promises)[~chosen], columns["weights"][~chosen]
    ordered = (margins > 0) + 0.5 * (margins == 0)
    loss = float(np.average(np.logaddexp(0, -margins), weights=weights))
    return {"loss": loss, "preference_loss": loss, "pair_accuracy": float(np.average(ordered, weights=weights))}
