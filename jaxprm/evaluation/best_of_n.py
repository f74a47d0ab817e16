"""Best-of-N in a run's results: scores of trajectories, votes between answers, comparisons at equal compute.

S steps of a trajectory have promises; P trajectories form the pool of a task, N of them are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxprm.evaluation.statistics import (
    SAMPLES,
    Array,
    Estimate,
    best_of_n_curve,
    bootstrap,
    paired_difference,
    percentile_interval,
    resample_counts,
)

# Score of a trajectory from the promises of its steps, [S] -> float. "final" is the paper's.
AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "final": lambda promises: promises[-1],
    "mean": lambda promises: math.fsum(promises) / len(promises),
    "min": min,
    "max": max,
    # A linear head can predict below 0, and two such factors would make a good product: they count as 0.
    "product": lambda promises: math.prod(max(0.0, promise) for promise in promises),
    "sum": math.fsum,
}

# Weight of an attempt's vote, from the promise of its final step, [P] -> [P]. Negative promises count as 0 here too.
VOTES: dict[str, Callable[[ArrayLike], np.ndarray]] = {
    "vote": lambda promises: np.ones_like(np.asarray(promises, float)),
    "weighted_vote": lambda promises: np.maximum(0.0, np.asarray(promises, float)),
}

# They compute with promises as probabilities: of scores that only rank they are not defined.
OF_PROBABILITIES = frozenset({"product", "weighted_vote"})

SUBSETS = 200


def vote_curve(
    weights: ArrayLike,
    answers: Sequence[Sequence[str | None]],
    outcomes: ArrayLike,
    sizes: Sequence[int],
    *,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> np.ndarray:
    """Expected outcome of the answer with most votes among N attempts drawn from a pool without replacement.

    The outcome of an answer is the mean outcome of the attempts in the subset that gave it; answers with equally many
    votes are equally likely; without a vote the outcome is 0.

    Args:
        weights, outcomes: [tasks, P], the weight of each attempt's vote and the attempt's outcome.
        answers: [tasks][P]; None for an attempt without an answer, which does not vote.
        sizes: values of N, each in [1, P].
        subsets: random subsets of each task; the subset of a smaller N is part of that of a larger one. With N = P
            there is one subset, and the result is exact.

    Returns:
        float64 [tasks, sizes], in the unit of the outcomes.
    """
    weights, outcomes = np.asarray(weights, float), np.asarray(outcomes, float)
    random = np.random.default_rng(seed)
    curve = np.zeros((len(weights), len(sizes)))
    for task, (weight, task_answers, outcome) in enumerate(zip(weights, answers, outcomes, strict=True)):
        distinct = sorted({answer for answer in task_answers if answer is not None})
        if not distinct:
            continue
        gave = np.array([[answer == candidate for candidate in distinct] for answer in task_answers])  # [P, answers]
        order = np.argsort(random.random((subsets, len(weight))), axis=1)
        votes, counts, sums = (
            np.cumsum((column[:, None] * gave)[order], axis=1) for column in (weight, np.ones_like(weight), outcome)
        )  # [subsets, P, answers]
        for index, size in enumerate(sizes):
            vote, count, total = votes[:, size - 1], counts[:, size - 1], sums[:, size - 1]
            # Sums of the same votes in another order differ by rounding: they are equal votes.
            won = (vote >= vote.max(1, keepdims=True) - 1e-9) & (count > 0)
            mean = np.where(won, total / np.maximum(count, 1), 0.0).sum(1)
            curve[task, index] = np.mean(mean / np.maximum(won.sum(1), 1))
    return curve


class Cost(NamedTuple):
    """Cost of best-of-N on a task, in tokens or in FLOPs: `once` for the prompt, `each` for every candidate."""

    once: float
    each: float

    def affords(self, budget: float) -> float:
        """Number of candidates that a budget pays for. A fraction stands for a mixture of two sizes."""
        return (budget - self.once) / self.each


def equal_budget(
    searched: ArrayLike, scores: ArrayLike, outcomes: ArrayLike, *, budget: float, cost: Cost, **options
) -> dict[str, object]:
    """Compares a search with best-of-N at the same mean budget per task, on the pool of the same policy.

    Between two sizes the expected outcome of best-of-N is interpolated linearly: spending on average as much as n asks
    for means drawing floor(n) candidates on some tasks and one more on the others.

    Args:
        searched: [seeds, tasks], outcomes of the search.
        scores: [seeds, tasks, P], by which best-of-N chooses.
        outcomes: [tasks, P] of the pool.
        budget: mean cost of the search per task, in the unit of `cost`.
        options: samples and seed of `bootstrap`.

    Returns:
        {"n", "capped", "searched", "best_of_n", "difference"}: n in [1, P], capped where the budget pays for more
        candidates than the pool has, and three estimates, the last of the search minus best-of-N by task and seed.
    """
    scores, outcomes = np.asarray(scores, float), np.asarray(outcomes, float)
    pool = outcomes.shape[-1]
    affordable = cost.affords(budget)
    n = float(np.clip(affordable, 1, pool))
    lower = min(int(n), pool - 1) if pool > 1 else 1
    sizes = [lower, min(lower + 1, pool)]
    curves = np.array([best_of_n_curve(seed_scores, outcomes, sizes) for seed_scores in scores])
    best = curves[..., 0] + (n - lower) * (curves[..., 1] - curves[..., 0])
    return {
        "n": n,
        "capped": bool(affordable > pool),
        "searched": bootstrap(searched, **options),
        "best_of_n": bootstrap(best, **options),
        "difference": paired_difference(searched, best, **options),
    }


def budget_ratio(
    curve: ArrayLike, scores: ArrayLike, sizes: Sequence[int], at: int, *, samples: int = SAMPLES, seed: int = 0
) -> Estimate:
    """How many times less budget a method needs to reach the mean score that another has at the size `at`.

    A ratio of the size `at` itself is censored: two equal methods get 0 in the resamples in which the first is a little
    worse, so read it together with `reached`.

    Args:
        curve: [seeds, tasks, sizes], expected outcomes of the method.
        scores: [seeds, tasks], of the other method.
        sizes: budgets of the curve, ascending.

    Returns:
        {"mean", "low", "high", "n", "reached"}: the ratio at / budget with the percentile interval over resampled seeds
        and tasks, the same for both methods; 0 where no size reaches the score, at most at / sizes[0]. `reached` is the
        share of resamples in which a size does.
    """
    curve, scores = np.asarray(curve, float), np.asarray(scores, float)
    seeds, tasks = scores.shape
    weights = 1 / (seeds * tasks)

    def ratios(seed_counts: Array, task_counts: Array) -> Array:
        mean = np.einsum("bs,bt,stn->bn", seed_counts, task_counts, curve, optimize=True) * weights
        target = np.einsum("bs,bt,st->b", seed_counts, task_counts, scores, optimize=True) * weights
        # Resampled sums round differently: a score that is missed by rounding alone is reached.
        return at / budget_for(mean, sizes, target - 1e-12)

    point = ratios(np.ones((1, seeds)), np.ones((1, tasks)))[0]
    draws = ratios(*resample_counts(seeds, tasks, samples, seed))
    low, high = percentile_interval(draws)
    return {"mean": float(point), "low": low, "high": high, "n": tasks, "reached": float(np.mean(draws > 0))}


def budget_for(curve: ArrayLike, sizes: Sequence[int], score: ArrayLike) -> Array:
    """The smallest budget at which a curve reaches a score: [..., sizes], [...] -> [...].

    Between two sizes the curve is linear in the logarithm of the size. The result is infinite where no size reaches the
    score, and the first size where that one already does.
    """
    curve, score = np.asarray(curve, float), np.asarray(score, float)[..., None]
    reached = curve >= score
    first = reached.argmax(-1)[..., None]
    before = np.maximum(first - 1, 0)
    low, high = (np.take_along_axis(curve, at, -1)[..., 0] for at in (before, first))
    logs = np.log(np.asarray(sizes, float))
    rise = np.where(high > low, high - low, 1.0)
    share = np.where(first[..., 0] > 0, (score[..., 0] - low) / rise, 0.0)
    budget = np.exp(logs[before[..., 0]] + share * (logs[first[..., 0]] - logs[before[..., 0]]))
    return np.where(reached.any(-1), budget, np.inf)
