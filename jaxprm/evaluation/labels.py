"""Step labels that somebody gave, read from trajectories: one number a step, or the index of the first wrong step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
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
    """The labels of one trajectory."""

    values: Array  # [S], NaN where there is none; of a first error, 1 before it, 0 at it and nothing after it
    first_error: bool


def read_labels(trajectory: Trajectory, field: str, where: str) -> Labels | None:
    """The labels in `step_labels`, or at a dotted path into `meta`; None where there are none.

    At a path lies a list with a number or null for each step, an object from message index to number, or an integer:
    the index of the first wrong step, counting steps from 0, and -1 for none.

    Raises DataError, with `where`, for anything else.
    """
    value = trajectory.step_labels if field == OWN_FIELD else lookup(trajectory.meta, field)
    if value is None:
        return None
    places = steps(trajectory.messages)
    if isinstance(value, int) and not isinstance(value, bool):
        if not -1 <= value < len(places):
            raise DataError(
                f"{where}: {field} = {value}: a first wrong step is in [0, {len(places) - 1}], or -1 for none"
            )
        return Labels(_until_first_error(value, len(places)), first_error=True)
    if isinstance(value, Mapping):
        value = _by_message(value, [place.message for place in places], f"{where}: {field}")
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {field} is {type(value).__name__}; give a list of a number or null a step, an object from "
            "message index to number, or the index of the first wrong step"
        )
    if len(value) != len(places):
        raise DataError(f"{where}: {field} has {len(value)} values, the messages have {len(places)} steps")
    for index, one in enumerate(value):
        if one is not None and not isinstance(one, (bool, int, float)):
            raise DataError(f"{where}: {field}[{index}] = {one!r}: a label is a number, or null for none")
    return Labels(np.array([math.nan if one is None else float(one) for one in value]), first_error=False)


def lookup(tree: Any, path: str) -> Any:
    """What lies at a dotted path into `meta`, with or without "meta." before it; None where it leads nowhere."""
    for name in path.removeprefix("meta.").split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def kind_of(labels: Sequence[Labels], field: str, wanted: str | None = None) -> str:
    """Which of KINDS the labels of a file are: by their values, unless `wanted` says.

    Raises UserError where they are not what is wanted, or both first errors and labels of steps.
    """
    forms = {one.first_error for one in labels}
    if len(forms) > 1:
        raise UserError(f"labels {field}: some lines name a first wrong step and some label every step; split the file")
    values = np.concatenate([one.values for one in labels])
    values = values[~np.isnan(values)]
    fits = {
        "first-error": forms == {True},
        "binary": bool(np.isin(values, (0, 1)).all()),
        "ternary": bool(np.isin(values, (-1, 0, 1)).all()),
        "soft": forms == {False},
    }
    if wanted is None:
        return next(kind for kind, fit in fits.items() if fit)
    if not fits[wanted]:
        raise UserError(f"labels {field}: not {wanted} ({KINDS[wanted]}); leave --label-kind out to have it found")
    return wanted


def wrong_steps(values: Array, kind: str) -> np.ndarray:
    """Which labels say that the step is wrong. Neutral steps are not."""
    return values == (-1 if kind == "ternary" else 0)


def _until_first_error(index: int, count: int) -> Array:
    values = np.ones(count)
    if index >= 0:
        values[index], values[index + 1 :] = 0, math.nan
    return values


def _by_message(value: Mapping[str, Any], messages: Sequence[int], where: str) -> list[Any]:
    if len(set(messages)) < len(messages):
        raise DataError(f"{where} is keyed by message, but a message holds several steps; give a list")
    unknown = [key for key in value if key not in {str(message) for message in messages}]
    if unknown:
        raise DataError(f"{where} labels message {unknown[0]!r}, which is no step; steps are messages {list(messages)}")
    return [value.get(str(message)) for message in messages]
