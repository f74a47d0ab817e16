"""What a reward model's objective trains on: the trajectories that it uses, and the range of its step labels."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from data_pipeline.shards import Dataset, ShardSplit
from data_pipeline.supervision import label_bounds, of_pairs, with_labels, with_outcome
from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.objectives import find_objective, trains_on_labels

# What is selected, in messages, and the fix where there is none of it.
_SUPERVISION = {
    "outcomes": ("an outcome", "give trajectories an outcome, or choose objective step_labels"),
    "labels": ("step labels", "give trajectories step_labels, or choose an objective on outcomes"),
    "pairs": ("a chosen and a rejected action", "give a file of pairs, or choose another objective"),
    "outcomes and labels": ("an outcome or step labels", "give trajectories an outcome or step_labels"),
}


def supervision_of(settings: config_lib.RewardModelConfig) -> str:
    """What the settings train on: a key of the table above."""
    supervision = find_objective(settings.objective).supervision
    return "outcomes and labels" if supervision == "outcomes" and trains_on_labels(settings) else supervision


def selected(split: ShardSplit, supervision: str) -> np.ndarray:
    """Mask [N] of the records of a split that are trained on."""
    if supervision == "pairs":
        return of_pairs(split)
    if supervision == "labels":
        return with_labels(split)
    return with_outcome(split) | with_labels(split) if supervision == "outcomes and labels" else with_outcome(split)


def check_selected(settings: config_lib.RewardModelConfig, dataset: Dataset) -> Iterator[str]:
    """Yields a line for each split of which some trajectories are left out.

    Raises UserError if nothing is left of a split that training needs.
    """
    supervision = supervision_of(settings)
    what, fix = _SUPERVISION[supervision]
    for name in ("train", "validation"):
        mask = selected(dataset.split(name), supervision)
        count = int(mask.sum())
        if not count:
            raise UserError(
                f"reward model {settings.label}: objective {settings.objective} trains on trajectories with {what}; "
                f"split {name} has none among {len(mask)}; {fix}"
            )
        if count < len(mask):
            yield f"left out of {name}: {len(mask) - count} of {len(mask)} trajectories, without {what}"


def with_label_range(settings: config_lib.RewardModelConfig, *splits: ShardSplit) -> config_lib.RewardModelConfig:
    """The settings with the range of the labels of these splits; unchanged if they do not train on labels.

    Raises UserError for labels outside of the range.
    """
    bounds = label_bounds(*splits) if trains_on_labels(settings) else None
    if bounds is None:
        return settings
    low, high = settings.labels.range or ((0.0, 1.0) if bounds[0] >= 0 else (-1.0, 1.0))
    if bounds[0] < low or bounds[1] > high:
        raise UserError(
            f"reward model {settings.label}: step labels are between {bounds[0]:g} and {bounds[1]:g}, outside of "
            f"[{low:g}, {high:g}]; name the lowest and the highest label with labels.range"
        )
    labels = msgspec.structs.replace(settings.labels, range=(low, high))
    return msgspec.structs.replace(settings, labels=labels)
