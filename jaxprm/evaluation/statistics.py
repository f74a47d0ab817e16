"""Estimators and their intervals: best-of-N, the bootstrap over tasks and seeds, AUROC, explained variance, bins.

Shapes. Reward models trained with `seeds` different seeds are measured on the same `tasks`: [seeds, tasks]. P
candidates form the pool of a task, of which N are drawn. K steps (of all trajectories together) carry values, labels
and the index of their task: [K]. R resamples draw every task a number of times: counts [R, tasks]. Indices: k seed or
step, t task, r resample. Everything is float64; NaN means "not defined" and is left out of means and intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
# {"mean", "low", "high", "n"}: point estimate, interval, tasks with a part in it; None where it is not defined.
Estimate = dict[str, float | int | None]
# A statistic of resampled tasks, from task counts [R, tasks] to [R]. Counts of 1 give the statistic of the data itself.
TaskStatistic = Callable[[Array], Array]

SAMPLES = 2000
LEVEL = 0.95

# Elements (resamples times steps) that the AUROC of many resamples holds at once: 32 MB an array.
_BLOCK = 1 << 22


def best_of_n_curve(scores: ArrayLike, outcomes: ArrayLike, ns: Sequence[int]) -> Array:
    """Expected outcome of the best-scored of N candidates drawn without replacement, exact over all C(P, N) draws.

        sum_{i=1..P} outcome_i * (F(h_i) - F(l_i)) / (h_i - l_i),    F(c) = C(c, N) / C(P, N)

    l_i candidates score below candidate i and h_i score no higher. F(c) is the probability that all N come from the
    c lowest, so F(h_i) - F(l_i) is the probability that the best of the draw has i's score, which candidates of equal
    score share. For outcomes 0 and 1 and scores equal to them this is pass@N of Chen et al. (arXiv 2107.03374, eq. 1).

    Args:
        scores, outcomes: [..., P], the candidates of one task; an outcome may itself be a mean.
        ns: values of N, each in [1, P].

    Returns:
        [..., len(ns)], in the unit of the outcomes.

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
    """Expected best outcome among N candidates; for outcomes 0 and 1, the probability that any of N succeeds (pass@N).

    Arguments, result and errors as in `best_of_n_curve`.
    """
    return best_of_n_curve(outcomes, outcomes, ns)


@lru_cache(maxsize=256)
def _chance_all_below(pool: int, n: int) -> Array:
    """C(c, n) / C(pool, n) for c = 0..pool."""
    # Python's integers are exact and their quotient is rounded once: a product of fractions would lose digits.
    return np.array([math.comb(c, n) / math.comb(pool, n) for c in range(pool + 1)])


def bootstrap(
    values: ArrayLike, *, weights: ArrayLike | None = None, samples: int = SAMPLES, seed: int = 0
) -> Estimate:
    """Weighted mean over seeds and tasks, with a percentile interval.

        mean_r = sum_{k,t} u_rk v_rt w_kt x_kt / sum_{k,t} u_rk v_rt w_kt,    u = v = 1 for the point estimate

    Resample r draws seeds and tasks independently, with replacement, and crosses them (the pigeonhole bootstrap, Owen
    2007, Annals of Applied Statistics 1(2)): u_r ~ Multinomial(seeds), v_r ~ Multinomial(tasks), uniform. The interval
    is from the (1 - LEVEL) / 2 to the (1 + LEVEL) / 2 quantile of mean_r.

    Equal `seed` and shape give equal resamples, whatever the values. S seeds show (S - 1) / S of the variance over
    seeds and one seed shows none of it, so intervals of few seeds are too narrow.

    Args:
        values: x, [seeds, tasks] or [tasks].
        weights: w, like values; 0 leaves an entry out (its value must still be finite). All 1 by default.
        samples: R, the number of resamples.

    Returns:
        An estimate in the unit of the values; n counts the tasks with a weight above 0 in any seed.

    Raises:
        ValueError: shapes differ, a value is not finite, or a weight is negative.
    """
    values, weights = _finite_and_weights(values=values, weights=weights)
    values, weights = np.atleast_2d(values), np.atleast_2d(weights)
    if values.ndim > 2 or np.any(weights < 0):
        raise ValueError(f"values {values.shape} must be [seeds, tasks] or [tasks], and no weight negative")
    seed_counts, task_counts = resample_counts(*values.shape, samples, seed)

    def mean(seeds: Array, tasks: Array) -> Array:
        total = np.sum(seeds @ weights * tasks, axis=-1)
        return ratio(np.sum(seeds @ (weights * values) * tasks, axis=-1), total)

    ones = (np.ones((1, count)) for count in values.shape)
    return _estimate(mean(*ones)[0], mean(seed_counts, task_counts), np.count_nonzero(weights.sum(0)))


def paired_difference(a: ArrayLike, b: ArrayLike, **options) -> Estimate:
    """`bootstrap` of a - b, paired by task and seed: what makes a task hard for both methods cancels.

    Args:
        a, b: [seeds, tasks] of the same tasks. A method without seeds, [tasks] or [1, tasks], is paired with each seed.
        options: samples and seed of `bootstrap`.

    Raises:
        ValueError: the methods were not measured on the same number of tasks, or of seeds.
    """
    a, b = (np.atleast_2d(np.asarray(x, float)) for x in (a, b))
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(f"paired values are {a.shape} and {b.shape}: give both as [seeds, tasks] of the same tasks")
    return bootstrap(a - b, **options)


def bootstrap_statistic(
    statistics: Sequence[TaskStatistic], tasks: int, *, n: int | None = None, samples: int = SAMPLES, seed: int = 0
) -> Estimate:
    """Mean over seeds of a statistic that is not a mean over tasks, with the interval of `bootstrap`.

        estimate_r = sum_k u_rk statistic_k(v_r) / sum_k u_rk,    over the seeds k whose statistic is defined

    A seed whose statistic is NaN is left out of the mean. A resample in which none is defined is left out of the
    interval.

    Args:
        statistics: one function per seed.
        tasks: length of the counts that the functions take.
        n: the number of tasks to report, where some have no part in the statistic; default: all.
    """
    seed_counts, task_counts = resample_counts(len(statistics), tasks, samples, seed)
    draws = np.stack([statistic(task_counts) for statistic in statistics], axis=-1)  # [R, seeds]
    point = np.array([statistic(np.ones((1, tasks)))[0] for statistic in statistics])
    return _estimate(
        _mean_of_defined(point, np.ones(len(statistics))),
        _mean_of_defined(draws, seed_counts),
        tasks if n is None else n,
    )


class Measure(NamedTuple):
    """A statistic of one reward model, and the number of tasks with a part in it."""

    statistic: TaskStatistic
    n: int


@dataclass(frozen=True)
class Resampling:
    """Settings of the bootstrap over tasks: the number of resamples, and the seed they are drawn with."""

    samples: int = SAMPLES
    seed: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of `bootstrap` and of the functions that pass them on to it."""
        return {"samples": self.samples, "seed": self.seed}

    def estimate(self, measure: Measure, tasks: int) -> Estimate:
        return bootstrap_statistic([measure.statistic], tasks, n=measure.n, **self.options)

    def estimates(self, measures: Mapping[str, Measure], tasks: int) -> dict[str, Estimate]:
        return {name: self.estimate(measure, tasks) for name, measure in measures.items()}

    def difference(self, a: Measure, b: Measure, tasks: int) -> Estimate:
        """Estimate of a - b, both computed on the same resamples."""
        return self.estimate(Measure(lambda counts: a.statistic(counts) - b.statistic(counts), min(a.n, b.n)), tasks)


# An evaluation asks for the same resamples dozens of times.
@lru_cache(maxsize=1)
def resample_counts(seeds: int, tasks: int, samples: int, seed: int) -> tuple[Array, Array]:
    """How often each resample draws each seed, u [R, seeds], and each task, v [R, tasks].

    Raises ValueError without seeds or tasks.
    """
    if not seeds or not tasks:
        raise ValueError(f"{seeds} seeds and {tasks} tasks: a bootstrap needs at least one of each")
    random = np.random.default_rng(seed)
    draw = lambda count: random.multinomial(count, np.full(count, 1 / count), size=samples).astype(float)
    # Tasks first: methods with different numbers of seeds still share their resamples of the tasks.
    task_counts = draw(tasks)
    seed_counts = draw(seeds)
    for counts in (seed_counts, task_counts):
        counts.setflags(write=False)  # the cache hands the same arrays to every caller
    return seed_counts, task_counts


def _mean_of_defined(values: Array, counts: Array) -> Array:
    defined = np.isfinite(values)
    return ratio(np.sum(np.where(defined, values, 0) * counts, -1), np.sum(defined * counts, -1))


def _estimate(point: float, draws: Array, n: int) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(point) or not len(draws):
        return {"mean": None, "low": None, "high": None, "n": int(n)}
    low, high = percentile_interval(draws)
    return {"mean": float(point), "low": low, "high": high, "n": int(n)}


def percentile_interval(draws: Array) -> tuple[float, float]:
    """The interval that holds LEVEL of the draws [R], cutting off equal shares below and above."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_by_task(values: ArrayLike, tasks: ArrayLike, count: int, weights: ArrayLike | None = None) -> TaskStatistic:
    """Weighted mean over steps:  sum_k v_t(k) w_k x_k / sum_k v_t(k) w_k.

    Args:
        values, weights: x and w, [K]; weights 1 by default.
        tasks: t(k), [K], in [0, count).
    """
    values, weights = _finite_and_weights(values=values, weights=weights)
    tasks = np.asarray(tasks, int)
    totals, weight = (np.bincount(tasks, x, minlength=count) for x in (weights * values, weights))
    return lambda counts: ratio(counts @ totals, counts @ weight)


def explained_variance_by_task(
    values: ArrayLike, targets: ArrayLike, tasks: ArrayLike, count: int, weights: ArrayLike | None = None
) -> TaskStatistic:
    """Explained variance:  1 - Var(y - x) / Var(y), weighted population variances with weights v_t(k) w_k.

    1 is perfect, 0 is no better than a constant; a constant offset of the values costs nothing. NaN where the drawn
    targets are all equal.

    Args:
        values, targets: x and y, [K]; tasks, count, weights as in `mean_by_task`.
    """
    values, targets = _finite(values=values, targets=targets)
    weights = np.ones(values.shape) if weights is None else np.asarray(weights, float)
    columns = [weights]
    for x in (targets, targets - values):
        # E[x^2] - E[x]^2 loses the variance of numbers with a large mean; taking the overall mean off first avoids it.
        centred = x - (x.mean() if x.size else 0)
        columns += [weights * centred, weights * centred**2]
    sums = sums_by_task(columns, tasks, count)

    def statistic(counts: Array) -> Array:
        weight, target, target_squared, residual, residual_squared = (counts @ sums).T
        variance = lambda total, squared: ratio(squared, weight) - ratio(total, weight) ** 2
        spread = variance(target, target_squared)
        # Equal targets leave a variance of rounding errors, which must not become a divisor.
        constant = spread <= 1e-12 * ratio(target_squared, weight)
        return 1 - ratio(variance(residual, residual_squared), np.where(constant, 0, spread))

    return statistic


def pearson_by_task(x: ArrayLike, y: ArrayLike, tasks: NDArray[np.int64], count: int) -> TaskStatistic:
    """Pearson's correlation:  Cov(x, y) / sqrt(Var(x) Var(y)), step k weighted by v_t(k).

    NaN where a column is constant. Of `ranks` it is Spearman's correlation.

    Args:
        x, y: [K]; tasks, count as in `mean_by_task`.
    """
    x, y = (np.asarray(column, float) - np.mean(column) for column in (x, y))
    sums = sums_by_task([np.ones(len(x)), x, y, x * x, y * y, x * y], tasks, count)

    def statistic(counts: Array) -> Array:
        n, *totals = (counts @ sums).T
        mean_x, mean_y, xx, yy, xy = (ratio(total, n) for total in totals)
        spread_x, spread_y = xx - mean_x**2, yy - mean_y**2
        constant = (spread_x <= 1e-12 * xx) | (spread_y <= 1e-12 * yy)
        return ratio(xy - mean_x * mean_y, np.where(constant, 0, np.sqrt(np.maximum(spread_x * spread_y, 0))))

    return statistic


def sums_by_task(columns: Sequence[Array], tasks: ArrayLike, count: int) -> Array:
    """Sums of columns [K] over the steps of each task: [tasks, columns]."""
    return np.stack([np.bincount(tasks, column, minlength=count) for column in columns], axis=-1)


@dataclass(frozen=True)
class TaskPairs:
    """Positive and negative steps in the order of their scores: enough for AUROC however tasks are drawn.

    A table of pairs would take K^2 numbers for each resample; cumulative sums over this order take K.
    """

    order: NDArray[np.int64]  # [K], the step's task, by ascending score
    below: NDArray[np.int64]  # [positives], how many of the ordered steps score lower than each positive
    through: NDArray[np.int64]  # [positives], how many score no higher
    labels: NDArray[np.bool_]  # [K], in that order, as are the weights
    weights: Array
    wins_within: Array  # [tasks], weight of the pairs inside each task that are ranked correctly; ties count half
    positives: Array  # [tasks], weight of the positive steps
    negatives: Array  # [tasks]

    def auroc(self, counts: Array) -> Array:
        """AUROC over all pairs, [R, tasks] -> [R]; NaN without both labels.

            sum_{i in +, j in -} a_i a_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_{i in +} a_i sum_{j in -} a_j)

        with a_k = v_t(k) w_k: the probability that a positive step scores above a negative one, ties half (the
        Mann-Whitney statistic). Pairs of different tasks count, so it rewards knowing which tasks are hard.
        """
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
    """Prepares the comparison of every positive with every negative step, in O(K log K).

    Args:
        scores: [K]; labels: bool [K], True for positive; tasks, count, weights as in `mean_by_task`.
    """
    scores, weights = _finite_and_weights(scores=scores, weights=weights)
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


def within_task_auroc(groups: Iterable[TaskPairs], tasks: int) -> Measure:
    """AUROC over the pairs inside a task, where knowing which tasks are hard is worth nothing.

        sum_t v_t wins_t / sum_t v_t pairs_t

    wins_t and pairs_t are summed over the groups (one per depth, or a single one); ties win half. A task counts by the
    weight of its pairs, and not at all with one label only. NaN without pairs.
    """
    wins, pairs = np.zeros(tasks), np.zeros(tasks)
    for group in groups:
        wins, pairs = wins + group.wins_within, pairs + group.pairs_within
    return Measure(lambda counts: ratio(counts @ wins, counts @ pairs), np.count_nonzero(pairs))


def equal_mass_bins(values: ArrayLike, bins: int, weights: ArrayLike | None = None) -> NDArray[np.int64]:
    """Bins of about equal weight, by ascending value:  floor(bins * m), m the cumulative share up to a value's middle.

    Equal values share a bin, so there may be fewer bins than asked for.

    Args:
        values, weights: [K].

    Returns:
        [K], the bin of each value, consecutive from 0.
    """
    values, weights = _finite_and_weights(values=values, weights=weights)
    _, index = np.unique(values, return_inverse=True)
    mass = np.bincount(index, weights)
    middle = (np.cumsum(mass) - mass / 2) / max(mass.sum(), np.finfo(float).tiny)
    bin_of_value = np.minimum((middle * bins).astype(int), bins - 1)
    # Numbered again: a heavy value skips bins, and an empty one would have no mean.
    return np.unique(bin_of_value[index], return_inverse=True)[1]


def ranks(values: Array) -> Array:
    """Ranks from 0 by ascending value, [K]; equal values get the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[index]


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Numerator / denominator, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def _finite_and_weights(*, weights: ArrayLike | None, **values: ArrayLike) -> list[Array]:
    """`_finite` of one array and its weights, which are 1 by default."""
    ((name, array),) = values.items()
    return _finite(**{name: array, "weights": np.ones(np.shape(array)) if weights is None else weights})


def _finite(**arrays: ArrayLike) -> list[Array]:
    """The arrays as float64. Raises ValueError unless they are finite and of one shape."""
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
