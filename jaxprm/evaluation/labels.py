"""Step labels: read from trajectories, and how well a threshold on a value predicts them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.errors import DataError
from data_pipeline.trajectory import Trajectory, steps
from jaxprm.errors import UserError
from jaxprm.evaluation.statistics import Array, TaskStatistic, ratio

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


# Hits and number of the wrong, hits and number of the right, of any one shape, to a number between 0 and 1.
Rate = Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class Verdicts:
    """Things to be judged, all [U]: unit u is judged rightly by the thresholds t with low < t <= high."""

    low: Array
    high: Array
    wrong: NDArray[np.bool_]  # a wrong step; a trajectory with a wrong step
    tasks: NDArray[np.int64]

    def hits(self, threshold: float) -> NDArray[np.bool_]:
        return (self.low < threshold) & (threshold <= self.high)

    def counts(self, thresholds: Array) -> tuple[Array, float, Array, float]:
        """Hits among the wrong [T], how many are wrong, hits among the right [T], how many are right."""
        found = []
        for kind in (self.wrong, ~self.wrong):
            some = kind & (self.low < self.high)
            begun, ended = (np.searchsorted(np.sort(x[some]), thresholds, "left") for x in (self.low, self.high))
            found += [(begun - ended).astype(float), float(np.count_nonzero(kind))]
        return tuple(found)


def step_verdicts(values: Array, wrong: NDArray[np.bool_], tasks: NDArray[np.int64]) -> Verdicts:
    """Every step a unit. All arguments [N]; a value of infinity is accepted by every threshold."""
    return Verdicts(np.where(wrong, values, -np.inf), np.where(wrong, np.inf, values), wrong, tasks)


def first_error_verdicts(
    values: Array, wrong: NDArray[np.bool_], tasks: NDArray[np.int64], trajectories: NDArray[np.int64]
) -> Verdicts:
    """Every trajectory a unit, judged rightly when its first wrong step is the first one below the threshold.

    All arguments [N], the steps of a trajectory together and in order.
    """
    starts = np.flatnonzero(np.diff(trajectories, prepend=-1))
    low, high = np.full(len(starts), -np.inf), np.full(len(starts), np.inf)
    erroneous = np.zeros(len(starts), bool)
    for unit, (start, stop) in enumerate(zip(starts, [*starts[1:], len(values)], strict=True)):
        errors = np.flatnonzero(wrong[start:stop])
        erroneous[unit] = len(errors) > 0
        first = start + errors[0] if len(errors) else stop
        low[unit] = values[first] if len(errors) else -np.inf
        high[unit] = values[start:first].min(initial=np.inf)
    return Verdicts(low, high, erroneous, tasks[starts])


def accuracy(wrong_hits: Array, wrong: Array, right_hits: Array, right: Array) -> Array:
    return ratio(wrong_hits + right_hits, np.add(wrong, right) + np.zeros(np.shape(wrong_hits)))


def accuracy_on_wrong(wrong_hits: Array, wrong: Array, right_hits: Array, right: Array) -> Array:
    return ratio(wrong_hits, wrong + np.zeros(np.shape(wrong_hits)))


def accuracy_on_right(wrong_hits: Array, wrong: Array, right_hits: Array, right: Array) -> Array:
    return accuracy_on_wrong(right_hits, right, wrong_hits, wrong)


def balanced_accuracy(*counts: Array) -> Array:
    return (accuracy_on_wrong(*counts) + accuracy_on_right(*counts)) / 2


def harmonic_mean(*counts: Array) -> Array:
    """Of the accuracies on wrong and on right; 0 where both are."""
    on_wrong, on_right = accuracy_on_wrong(*counts), accuracy_on_right(*counts)
    total = on_wrong + on_right
    return np.where(total == 0, 0.0, ratio(2 * on_wrong * on_right, total))


def candidates(values: Array) -> Array:
    """A threshold for each way to part the finite values: below all, between neighbours, above all."""
    distinct = np.unique(values[np.isfinite(values)])
    if not len(distinct):
        return np.zeros(1)
    middle = (distinct[:-1] + distinct[1:]) / 2
    # Between two neighbouring floats lies no third: the upper one parts them as well.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    return np.concatenate([distinct[:1], middle, [np.nextafter(distinct[-1], np.inf)]])


def best_threshold(verdicts: Verdicts, thresholds: Array, rate: Rate) -> float | None:
    """The threshold of the highest rate, the middle one of those that tie; None where the rate is not defined."""
    rates = rate(*verdicts.counts(thresholds))
    if not np.isfinite(rates).any():
        return None
    best = np.flatnonzero(rates >= np.nanmax(rates) - 1e-12)
    return float(thresholds[best[(len(best) - 1) // 2]])


def rate_by_task(verdicts: Verdicts, threshold: float, rate: Rate, count: int) -> TaskStatistic:
    """A rate at a threshold as a function of how often each task is drawn."""
    hits = verdicts.hits(threshold)
    columns = [hits & verdicts.wrong, verdicts.wrong, hits & ~verdicts.wrong, ~verdicts.wrong]
    sums = np.stack([np.bincount(verdicts.tasks, column, minlength=count) for column in columns], axis=-1)
    return lambda counts: rate(*(counts @ sums).T)


def best_ternary_thresholds(values: Array, labels: Array, thresholds: Array) -> tuple[float, float]:
    """The (low, high) of the highest share of steps given their own label: -1 below low, 0 below high, 1 elsewhere."""
    below = lambda label: np.searchsorted(np.sort(values[labels == label]), thresholds, "left")
    first, second = below(-1) - below(0), below(0) - below(1)
    # For every upper threshold the best lower one at or below it.
    running = np.maximum.accumulate(first)
    upper = int(np.argmax(running + second))
    lower = int(np.argmax(first[: upper + 1]))
    return float(thresholds[lower]), float(thresholds[upper])


def ternary_hits(values: Array, labels: Array, low: float, high: float) -> NDArray[np.bool_]:
    """Which steps are given their own label."""
    return np.where(values < low, -1, np.where(values < high, 0, 1)) == labels


def validation_tasks(tasks: Iterable[str], share: float, seed: int) -> set[str]:
    """The tasks on which thresholds are chosen: about `share` of them, at least one, and never all.

    Which they are depends on the names and the seed alone, not on the order of the rows.

    Raises ValueError for a share outside (0, 1), or fewer than two tasks.
    """
    names = sorted(set(tasks), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if not 0 < share < 1 or len(names) < 2:
        raise ValueError(f"share {share} of {len(names)} tasks: it must be in (0, 1), of two tasks or more")
    return set(names[: min(len(names) - 1, max(1, round(share * len(names))))])


def pearson_by_task(x: ArrayLike, y: ArrayLike, tasks: NDArray[np.int64], count: int) -> TaskStatistic:
    """The correlation of two columns [N] as a function of how often each task is drawn; NaN where one is constant."""
    x, y = (np.asarray(one, float) - np.mean(one) for one in (x, y))
    columns = [np.ones(len(x)), x, y, x * x, y * y, x * y]
    sums = np.stack([np.bincount(tasks, column, minlength=count) for column in columns], axis=-1)

    def statistic(counts: Array) -> Array:
        n, *totals = (counts @ sums).T
        mean_x, mean_y, xx, yy, xy = (ratio(total, n) for total in totals)
        spread_x, spread_y = xx - mean_x**2, yy - mean_y**2
        constant = (spread_x <= 1e-12 * xx) | (spread_y <= 1e-12 * yy)
        return ratio(xy - mean_x * mean_y, np.where(constant, 0, np.sqrt(np.maximum(spread_x * spread_y, 0))))

    return statistic


def ranks(values: Array) -> Array:
    """Ranks from 0, the mean of their places for equal values."""
    distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[index]
