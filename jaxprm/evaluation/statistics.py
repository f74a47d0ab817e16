"""Interval estimates: exact best-of-N curves, the bootstrap over tasks and seeds, AUROC, calibration bins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Estimate = dict[str, float | int | None]
# One number for each row of task counts [B, tasks] (how often the resample drew each task): float [B].
TaskStatistic = Callable[[Array], Array]

SAMPLES = 2000
LEVEL = 0.95

# Steps times resamples looked at together: 32 MB an array.
_BLOCK = 1 << 22


def best_of_n_curve(scores: ArrayLike, outcomes: ArrayLike, ns: Sequence[int]) -> Array:
    """Expected outcome of the best-scored of n candidates drawn without replacement, exactly, over all subsets.

    With F(c) = C(c, n) / C(P, n) the probability that all n come from the c lowest, the best of the draw has a given
    score with probability F(number at or below it) - F(number below it). Candidates of equal score share it equally.

    Args:
        scores, outcomes: [..., P], P candidates of one task; an outcome may itself be a mean.
        ns: sizes in [1, P].

    Returns:
        [..., len(ns)].

    Raises:
        ValueError: shapes differ, a score or outcome is not finite, or a size is out of range.
    """
    scores, outcomes = _finite(scores=scores, outcomes=outcomes)
    pool = scores.shape[-1]
    for n in ns:
        if not 1 <= n <= pool:
            raise ValueError(f"best of {n} from a pool of {pool}: n must be in [1, {pool}]; draw more candidates")
    below_all = np.stack([_chance_all_below(pool, n) for n in ns], axis=-1)  # [P + 1, len(ns)]
    curves = np.empty((*scores.shape[:-1], len(ns)))
    for row in np.ndindex(scores.shape[:-1]):
        ordered = np.sort(scores[row])
        below, through = (np.searchsorted(ordered, scores[row], side) for side in ("left", "right"))
        chances = (below_all[through] - below_all[below]) / (through - below)[:, None]
        curves[row] = outcomes[row] @ chances
    return curves


def oracle_curve(outcomes: ArrayLike, ns: Sequence[int]) -> Array:
    """Expected best outcome among n candidates, exactly: for outcomes 0 and 1, the probability that any of n succeeds.

    Args and errors as in `best_of_n_curve`.
    """
    return best_of_n_curve(outcomes, outcomes, ns)


@lru_cache(maxsize=256)
def _chance_all_below(pool: int, n: int) -> Array:
    """C(c, n) / C(pool, n) for c = 0..pool, from exact integers."""
    return np.array([math.comb(c, n) / math.comb(pool, n) for c in range(pool + 1)])


def bootstrap(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """Weighted mean with a percentile interval. A resample draws seeds and tasks, with replacement, and crosses them.

    Equal `seed` and shape give equal resamples, whatever the values. Few seeds say little about the spread over seeds:
    S of them show (S - 1) / S of its variance, one shows none.

    Args:
        values: [seeds, tasks], or [tasks].
        weights: like values; 0 leaves an entry out (its value must still be finite). All 1 by default.
        samples: resamples; the interval covers `level` of them.

    Returns:
        An estimate; n counts the tasks with a weight in any seed.

    Raises:
        ValueError: shapes differ, a value is not finite, or a weight is negative.
    """
    values, weights = _finite(values=values, weights=np.ones(np.shape(values)) if weights is None else weights)
    values, weights = np.atleast_2d(values), np.atleast_2d(weights)
    if values.ndim > 2 or np.any(weights < 0):
        raise ValueError(f"values {values.shape} must be [seeds, tasks] or [tasks], and no weight negative")
    seed_counts, task_counts = resamples(*values.shape, samples, seed)

    def mean(seeds: Array, tasks: Array) -> Array:
        total = np.sum(seeds @ weights * tasks, axis=-1)
        return ratio(np.sum(seeds @ (weights * values) * tasks, axis=-1), total)

    ones = (np.ones((1, count)) for count in values.shape)
    return _estimate(mean(*ones)[0], mean(seed_counts, task_counts), np.count_nonzero(weights.sum(0)), level)


def paired_difference(a: ArrayLike, b: ArrayLike, **options) -> Estimate:
    """The bootstrap of a - b, by task and seed. A method without seeds, [tasks] or [1, tasks], is paired with each.

    Raises:
        ValueError: the methods were not measured on the same number of tasks, or of seeds.
    """
    a, b = (np.atleast_2d(np.asarray(x, float)) for x in (a, b))
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(f"paired values are {a.shape} and {b.shape}: give both as [seeds, tasks] of the same tasks")
    return bootstrap(a - b, **options)


def bootstrap_statistic(
    statistics: Sequence[TaskStatistic],
    tasks: int,
    *,
    n: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """The mean over seeds of a statistic that is no mean over tasks, with the interval of `bootstrap`.

    A seed for which the statistic is not defined (NaN) is left out of the mean; a resample without any other seed is
    left out of the interval.

    Args:
        statistics: one function per seed, from task counts [B, tasks] to [B]; counts of 1 give the statistic itself.
        tasks: how many tasks the functions expect.
        n: the tasks to report, if some have no part in the statistic.
    """
    seed_counts, task_counts = resamples(len(statistics), tasks, samples, seed)
    draws = np.stack([statistic(task_counts) for statistic in statistics], axis=-1)  # [samples, seeds]
    point = np.array([statistic(np.ones((1, tasks)))[0] for statistic in statistics])
    return _estimate(
        _mean_of_defined(point, np.ones(len(statistics))),
        _mean_of_defined(draws, seed_counts),
        tasks if n is None else n,
        level,
    )


# An evaluation asks for the same resamples dozens of times.
@lru_cache(maxsize=1)
def resamples(seeds: int, tasks: int, samples: int, seed: int) -> tuple[Array, Array]:
    """How often each resample draws each seed [samples, seeds] and each task [samples, tasks]."""
    if not seeds or not tasks:
        raise ValueError(f"{seeds} seeds and {tasks} tasks: a bootstrap needs at least one of each")
    random = np.random.default_rng(seed)
    draw = lambda count: random.multinomial(count, np.full(count, 1 / count), size=samples).astype(float)
    # Tasks first: methods with different numbers of seeds still share their resamples of the tasks.
    task_counts = draw(tasks)
    seed_counts = draw(seeds)
    for counts in (seed_counts, task_counts):
        counts.setflags(write=False)
    return seed_counts, task_counts


def _mean_of_defined(values: Array, counts: Array) -> Array:
    defined = np.isfinite(values)
    return ratio(np.sum(np.where(defined, values, 0) * counts, -1), np.sum(defined * counts, -1))


def _estimate(point: float, draws: Array, n: int, level: float) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(point) or not len(draws):
        return {"mean": None, "low": None, "high": None, "n": int(n)}
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(point), "low": float(low), "high": float(high), "n": int(n)}


@dataclass(frozen=True)
class TaskPairs:
    """Positive and negative steps, ordered by score, with their tasks: enough for AUROC however tasks are drawn."""

    order: NDArray[np.int64]  # [N], the step's task, by ascending score
    below: NDArray[np.int64]  # [positives], how many of the ordered steps score lower than each positive
    through: NDArray[np.int64]  # [positives], how many score no higher
    labels: NDArray[np.bool_]  # [N], in that order, as are the weights
    weights: Array
    wins_within: Array  # [tasks], weight of the pairs inside each task that are ranked rightly; ties count half
    positives: Array  # [tasks], weight of the positive steps
    negatives: Array  # [tasks]

    def auroc(self, counts: Array) -> Array:
        """Over all pairs, when task i is drawn counts[b, i] times: [B, tasks] -> [B], NaN without both labels."""
        rows = max(1, _BLOCK // max(1, len(self.order)))
        wins = [self._wins(counts[start : start + rows]) for start in range(0, len(counts), rows)]
        return ratio(np.concatenate(wins), (counts @ self.positives) * (counts @ self.negatives))

    def _wins(self, counts: Array) -> Array:
        weights = counts[:, self.order] * self.weights
        negatives = np.zeros((len(counts), len(self.order) + 1))
        np.cumsum(np.where(self.labels, 0, weights), axis=-1, out=negatives[:, 1:])
        beaten = (negatives[:, self.below] + negatives[:, self.through]) / 2
        return np.sum(weights[:, self.labels] * beaten, axis=-1)

    @property
    def pairs_within(self) -> Array:
        """[tasks], weight of the pairs inside each task."""
        return self.positives * self.negatives


def task_pairs(
    scores: ArrayLike, labels: ArrayLike, tasks: ArrayLike, count: int, weights: ArrayLike | None = None
) -> TaskPairs:
    """Prepares the comparison of every positive with every negative step, in O(N log N) and without a table of pairs.

    Args:
        scores, labels, tasks, weights: [N]; labels bool, tasks in [0, count), weights 1 by default.
    """
    scores, weights = _finite(scores=scores, weights=np.ones(np.shape(scores)) if weights is None else weights)
    labels, tasks = np.asarray(labels, bool), np.asarray(tasks, int)
    positives, negatives = (np.bincount(tasks[x], weights[x], minlength=count) for x in (labels, ~labels))
    # Equal scores have equal ranks, so one sort by task and rank gives the order inside every task.
    _, rank = np.unique(scores, return_inverse=True)
    key = tasks * (rank.max(initial=0) + 1) + rank
    inside = np.argsort(key, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(np.where(labels, 0, weights)[inside])])
    before = (np.cumsum(negatives) - negatives)[tasks[labels]]
    beaten = sum(cumulative[np.searchsorted(key[inside], key[labels], side)] - before for side in ("left", "right")) / 2
    wins = np.bincount(tasks[labels], weights[labels] * beaten, minlength=count)
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], scores[order][labels[order]]
    below, through = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return TaskPairs(tasks[order], below, through, labels[order], weights[order], wins, positives, negatives)


def auroc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Probability that a positive scores above a negative, ties half; a pair weighs the product of its weights.

    All arguments [N]; NaN without both labels.
    """
    return float(task_pairs(scores, labels, np.zeros(np.size(scores), int), 1, weights).auroc(np.ones((1, 1)))[0])


def within_task_auroc(
    scores: ArrayLike, labels: ArrayLike, tasks: ArrayLike, weights: ArrayLike | None = None
) -> float:
    """AUROC over the pairs inside a task, where knowing which tasks are hard is worth nothing.

    The pairs of all tasks are pooled: a task counts by the weight of its pairs, not at all if it has one label only.
    All arguments [N]; NaN without pairs.
    """
    _, index = np.unique(np.asarray(tasks), return_inverse=True)
    pairs = task_pairs(scores, labels, index, int(index.max(initial=-1)) + 1, weights)
    return float(ratio(pairs.wins_within.sum(), pairs.pairs_within.sum()))


def mean_by_task(values: ArrayLike, tasks: ArrayLike, count: int, weights: ArrayLike | None = None) -> TaskStatistic:
    """The weighted mean as a function of how often each task is drawn. Args as in `task_pairs`."""
    values, weights = _finite(values=values, weights=np.ones(np.shape(values)) if weights is None else weights)
    tasks = np.asarray(tasks, int)
    totals, weight = (np.bincount(tasks, x, minlength=count) for x in (weights * values, weights))
    return lambda counts: ratio(counts @ totals, counts @ weight)


def explained_variance(values: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None) -> float:
    """1 - Var(target - value) / Var(target), weighted; a constant offset costs nothing.

    All arguments [N]; NaN for constant targets.
    """
    one_task = np.zeros(np.size(values), int)
    return float(explained_variance_by_task(values, targets, one_task, 1, weights)(np.ones((1, 1)))[0])


def explained_variance_by_task(
    values: ArrayLike, targets: ArrayLike, tasks: ArrayLike, count: int, weights: ArrayLike | None = None
) -> TaskStatistic:
    """`explained_variance` as a function of how often each task is drawn. Args as in `task_pairs`."""
    values, targets = _finite(values=values, targets=targets)
    weights = np.ones(values.shape) if weights is None else np.asarray(weights, float)
    columns = [weights]
    for x in (targets, targets - values):
        centred = x - (x.mean() if x.size else 0)  # or the variance would drown in a large mean
        columns += [weights * centred, weights * centred**2]
    sums = np.stack([np.bincount(tasks, column, minlength=count) for column in columns], axis=-1)

    def statistic(counts: Array) -> Array:
        weight, target, target_squared, residual, residual_squared = (counts @ sums).T
        variance = lambda total, squared: ratio(squared, weight) - ratio(total, weight) ** 2
        spread = variance(target, target_squared)
        constant = spread <= 1e-12 * ratio(
            target_squared, weight
        )  # all that rounding leaves when the targets are equal
        return 1 - ratio(variance(residual, residual_squared), np.where(constant, 0, spread))

    return statistic


def equal_mass_bins(values: ArrayLike, bins: int, weights: ArrayLike | None = None) -> NDArray[np.int64]:
    """Bins of about equal weight, by ascending value. Equal values share a bin, so there may be fewer than asked for.

    Args:
        values, weights: [N].

    Returns:
        [N], the bin of each value, consecutive from 0.
    """
    values, weights = _finite(values=values, weights=np.ones(np.shape(values)) if weights is None else weights)
    _, index = np.unique(values, return_inverse=True)
    mass = np.bincount(index, weights)
    middle = (np.cumsum(mass) - mass / 2) / max(mass.sum(), np.finfo(float).tiny)
    wanted = np.minimum((middle * bins).astype(int), bins - 1)
    return np.unique(wanted[index], return_inverse=True)[1]


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Numerator / denominator, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def _finite(**arrays: ArrayLike) -> list[Array]:
    """The arrays as float64, of one shape and finite."""
    converted = {name: np.asarray(x, float) for name, x in arrays.items()}
    shapes = {x.shape for x in converted.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"{', '.join(converted)} have shapes {[x.shape for x in converted.values()]}; they must be equal"
        )
    for name, x in converted.items():
        if not np.all(np.isfinite(x)):
            raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(x))} entries that are not finite")
    return list(converted.values())


class Measure(NamedTuple):
    statistic: TaskStatistic
    n: int  # tasks with a part in it


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: by the bootstrap over tasks."""

    samples: int = SAMPLES
    seed: int = 0
    level: float = LEVEL

    def estimate(self, measure: Measure, tasks: int) -> Estimate:
        return bootstrap_statistic(
            [measure.statistic], tasks, n=measure.n, samples=self.samples, seed=self.seed, level=self.level
        )

    def estimates(self, measures: Mapping[str, Measure], tasks: int) -> dict[str, Estimate]:
        return {name: self.estimate(measure, tasks) for name, measure in measures.items()}

    def difference(self, a: Measure, b: Measure, tasks: int) -> Estimate:
        """a - b on the same resamples."""
        return self.estimate(Measure(lambda counts: a.statistic(counts) - b.statistic(counts), min(a.n, b.n)), tasks)
