"""Step labels of trajectories: where they are stored, which kind they are, which tasks thresholds are chosen on."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data_pipeline.conversations.reading import labels_by_message
from data_pipeline.errors import DataError, shown
from data_pipeline.trajectory import Trajectory, steps
from jaxprm.errors import UserError
from jaxprm.evaluation.statistics import Array

OWN_FIELD = "step_labels"
KINDS = {
    "binary": "1 right, 0 wrong",
    "ternary": "1 effective, 0 neutral, -1 wrong",
    "first-error": "the first wrong step, or none",
    "soft": "numbers, compared as they are",
}


class Labels(NamedTuple):
    """The labels of one trajectory with S steps."""

    values: Array  # [S], NaN without a label; a first error gives 1 before it, 0 at it and NaN after it
    first_error: bool


def read_labels(trajectory: Trajectory, field: str, where: str, origins: Sequence[int] | None = None) -> Labels | None:
    """The labels in `step_labels`, or at a dotted path into `meta`; None without labels.

    The value is a list with a number or null for each step, an object from message index to number, or an integer: the
    index of the first wrong step, counting steps from 0, and -1 for none.

    Args:
        origins: for each message its index in the row, by which labels name it; None if it is the same.

    Raises DataError, which starts with `where`, for any other value.
    """
    value = trajectory.step_labels if field == OWN_FIELD else lookup(trajectory.meta, field)
    if value is None:
        return None
    positions = steps(trajectory.messages)
    if isinstance(value, int) and not isinstance(value, bool):
        if not -1 <= value < len(positions):
            raise DataError(
                f"{where}: {field} = {value}: a first wrong step is in [0, {len(positions) - 1}], or -1 for none"
            )
        return Labels(_until_first_error(value, len(positions)), first_error=True)
    if isinstance(value, Mapping):
        messages = msgspec.to_builtins(trajectory.messages)
        origins = range(len(messages)) if origins is None else origins
        value = labels_by_message(value, messages, origins, f"{where}: {field}")
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {field} is {type(value).__name__}; give a list with a number or null for each step, an object "
            "from message index to number, or the index of the first wrong step"
        )
    if len(value) != len(positions):
        raise DataError(f"{where}: {field} has {len(value)} values, the messages have {len(positions)} steps")
    for index, label in enumerate(value):
        if label is not None and not isinstance(label, (bool, int, float)):
            raise DataError(f"{where}: {field}[{index}] = {shown(label)}: a label is a number, or null for none")
        if label is not None and not abs(label) <= sys.float_info.max:  # JSON can have larger whole numbers
            raise DataError(f"{where}: {field}[{index}] = {shown(label)}: a label is at most 1.8e308")
    return Labels(np.array([math.nan if label is None else float(label) for label in value]), first_error=False)


def lookup(tree: Any, path: str) -> Any:
    """The value at a dotted path into `meta`, with or without the prefix "meta."; None if there is none."""
    for name in path.removeprefix("meta.").split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _until_first_error(index: int, count: int) -> Array:
    values = np.ones(count)
    if index >= 0:
        # Benchmarks do not say whether the steps after the first error are right or wrong.
        values[index], values[index + 1 :] = 0, math.nan
    return values


def kind_of(labels: Sequence[Labels], field: str, requested: str | None = None) -> str:
    """The kind of a file's labels, one of KINDS: `requested`, or the first that fits their values.

    Raises UserError if the values do not fit the requested kind, or if first errors and step labels are mixed.
    """
    forms = {row.first_error for row in labels}
    if len(forms) > 1:
        raise UserError(f"labels {field}: some lines name a first wrong step and some label every step; split the file")
    values = np.concatenate([row.values for row in labels])
    values = values[~np.isnan(values)]
    # By preference: a first error fits "binary" too, and binary labels fit "ternary".
    fits = {
        "first-error": forms == {True} or _end_at_first_errors(labels),
        "binary": bool(np.isin(values, (0, 1)).all()),
        "ternary": bool(np.isin(values, (-1, 0, 1)).all()),
        "soft": forms == {False},
    }
    if requested is None:
        return next(kind for kind, fit in fits.items() if fit)
    if not fits[requested]:
        raise UserError(
            f"labels {field}: not {requested} ({KINDS[requested]}); leave --label-kind out to have the kind detected"
        )
    return requested


def _end_at_first_errors(labels: Sequence[Labels]) -> bool:
    """Whether lists of labels say what a first error says: 1 before it, 0 at it, none after it, and some have none."""
    are_cut = False
    for row in labels:
        wrong = np.flatnonzero(row.values == 0)
        end = wrong[0] if len(wrong) else len(row.values)
        if not (row.values[:end] == 1).all() or not np.isnan(row.values[end + 1 :]).all():
            return False
        are_cut |= end + 1 < len(row.values)
    return are_cut


def wrong_steps(values: Array, kind: str) -> np.ndarray:
    """Mask of the steps labelled wrong, [...] -> bool [...]. Neutral steps are not wrong."""
    return values == (-1 if kind == "ternary" else 0)


def validation_tasks(tasks: Iterable[str], share: float, seed: int) -> set[str]:
    """The tasks on which thresholds are chosen: about `share` of them, at least one, and never all.

    Raises ValueError for a share outside (0, 1), or fewer than two tasks.
    """
    # A hash of the name, not a shuffle: the split then does not depend on the order of the rows.
    names = sorted(set(tasks), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if not 0 < share < 1 or len(names) < 2:
        raise ValueError(f"share {share} of {len(names)} tasks: must be in (0, 1), of at least two tasks")
    return set(names[: min(len(names) - 1, max(1, round(share * len(names))))])
