"""Best-of-N: scores of whole trajectories, votes between answers, and comparisons at equal compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxprm.evaluation.statistics import (
    LEVEL,
    SAMPLES,
    Array,
    Estimate,
    best_of_n_curve,
    bootstrap,
    paired_difference,
    resamples,
)

# Final is the paper's. Negative promises are no probabilities: in a product they count as 0.
AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "final": lambda promises: promises[-1],
    "mean": lambda promises: math.fsum(promises) / len(promises),
    "min": min,
    "max": max,
    "product": lambda promises: math.prod(max(0.0, promise) for promise in promises),
    "sum": math.fsum,
}


# What an attempt's vote counts, from the promises of final steps. Negative ones are no probabilities: they count 0.
VOTES: dict[str, Callable[[ArrayLike], np.ndarray]] = {
    "vote": lambda promises: np.ones_like(np.asarray(promises, float)),
    "weighted_vote": lambda promises: np.maximum(0.0, np.asarray(promises, float)),
}
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

    Args:
        weights, outcomes: [tasks, P]; answers: [tasks][P], None where an attempt came to none and does not vote.
        sizes: N, at most P each; subsets: drawn for every task, those of a smaller N within those of a larger one.

    Returns:
        float64 [tasks, sizes]. An answer's outcome is the mean of its attempts' in the subset; among equal votes each
        answer is as likely; where nobody votes the outcome is 0. With N = P there is one subset, and no chance.
    """
    weights, outcomes = np.asarray(weights, float), np.asarray(outcomes, float)
    draws = np.random.default_rng(seed)
    found = np.zeros((len(weights), len(sizes)))
    for task, (weight, named, outcome) in enumerate(zip(weights, answers, outcomes, strict=True)):
        known = sorted({answer for answer in named if answer is not None})
        if not known:
            continue
        given = np.array([[answer == one for one in known] for answer in named])  # [P, answers]
        order = np.argsort(draws.random((subsets, len(weight))), axis=1)
        votes, counts, sums = (
            np.cumsum((column[:, None] * given)[order], axis=1) for column in (weight, np.ones_like(weight), outcome)
        )  # [subsets, P, answers]
        for place, size in enumerate(sizes):
            vote, count, total = votes[:, size - 1], counts[:, size - 1], sums[:, size - 1]
            # Sums of the same votes in another order differ by rounding: they are equal votes.
            won = (vote >= vote.max(1, keepdims=True) - 1e-9) & (count > 0)
            mean = np.where(won, total / np.maximum(count, 1), 0.0).sum(1)
            found[task, place] = np.mean(mean / np.maximum(won.sum(1), 1))
    return found


class Cost(NamedTuple):
    """Of best-of-N on a task: what is paid once (the prompt), and for every candidate. In tokens, or in FLOPs."""

    once: float
    each: float

    def affords(self, budget: float) -> float:
        """Candidates for a budget: a fraction is a mixture of two sizes."""
        return (budget - self.once) / self.each


def equal_budget(
    searched: ArrayLike, scores: ArrayLike, outcomes: ArrayLike, *, budget: float, cost: Cost, **options
) -> dict[str, object]:
    """A search against best-of-N at the same mean budget a task, on the pool of the same policy.

    Args:
        searched: [seeds, tasks], outcomes of the search.
        scores: [seeds, tasks, P], by which best-of-N chooses; outcomes: [tasks, P] of the pool.
        options: of `bootstrap`.

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
    curves = np.array([best_of_n_curve(one, outcomes, sizes) for one in scores])
    best = curves[..., 0] + (n - lower) * (curves[..., 1] - curves[..., 0])
    return {
        "n": n,
        "capped": bool(affordable > pool),
        "searched": bootstrap(searched, **options),
        "best_of_n": bootstrap(best, **options),
        "difference": paired_difference(searched, best, **options),
    }


def budget_for(curve: ArrayLike, sizes: Sequence[int], score: ArrayLike) -> Array:
    """The smallest budget at which a curve reaches a score: [..., sizes], [...] -> [...].

    Between two sizes the curve is a line over the logarithm of the size. Infinite where no size reaches the score, and
    the first size where that one does already.
    """
    curve, score = np.asarray(curve, float), np.asarray(score, float)[..., None]
    reached = curve >= score
    first = reached.argmax(-1)[..., None]
    before = np.maximum(first - 1, 0)
    low, high = (np.take_along_axis(curve, at, -1)[..., 0] for at in (before, first))
    logs = np.log(np.asarray(sizes, float))
    rise = np.where(high > low, high - low, 1.0)
    share = np.where(first[..., 0] > 0, (score[..., 0] - low) / rise, 0.0)
    found = np.exp(logs[before[..., 0]] + share * (logs[first[..., 0]] - logs[before[..., 0]]))
    return np.where(reached.any(-1), found, np.inf)


def budget_ratio(
    curve: ArrayLike,
    scores: ArrayLike,
    sizes: Sequence[int],
    at: int,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """How many times less budget a method needs to reach the mean score that another has at the size `at`.

    Args:
        curve: [seeds, tasks, sizes], expected outcomes of the method; scores: [seeds, tasks] of the other.

    Returns:
        {"mean", "low", "high", "n", "reached"}: the ratio `at` / budget with the percentile interval over resampled
        seeds and tasks, the same for both; 0 where no size reaches the score, at most at / sizes[0]. `reached` is the
        share of resamples in which one did.
    """
    curve, scores = np.asarray(curve, float), np.asarray(scores, float)
    seeds, tasks = scores.shape
    seed_counts, task_counts = resamples(seeds, tasks, samples, seed)
    weights = 1 / (seeds * tasks)

    def ratios(seed_counts: Array, task_counts: Array) -> Array:
        mean = np.einsum("bs,bt,stn->bn", seed_counts, task_counts, curve, optimize=True) * weights
        wanted = np.einsum("bs,bt,st->b", seed_counts, task_counts, scores, optimize=True) * weights
        # Resampled sums round differently: a score is reached where it is missed by rounding alone.
        return at / budget_for(mean, sizes, wanted - 1e-12)

    point = ratios(np.ones((1, seeds)), np.ones((1, tasks)))[0]
    drawn = ratios(seed_counts, task_counts)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {
        "mean": float(point),
        "low": float(low),
        "high": float(high),
        "n": tasks,
        "reached": float(np.mean(drawn > 0)),
    }
