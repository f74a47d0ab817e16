"""Votes among finished attempts whose answers can be compared (self-consistency, Wang et al. 2022; weighted by the
reward model, Li et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

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
