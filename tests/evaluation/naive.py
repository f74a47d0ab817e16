"""Slow and obvious versions of estimators, to compare the fast ones with."""

import itertools

import numpy as np


def auroc(scores, labels, weights=None, tasks=None) -> float:
    """The double loop over pairs of a positive and a negative, ties half; with tasks, over the pairs inside one."""
    weights = np.ones(len(scores)) if weights is None else weights
    wins = total = 0.0
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if labels[i] and not labels[j] and (tasks is None or tasks[i] == tasks[j]):
            total += weights[i] * weights[j]
            wins += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return wins / total if total else np.nan


def explained_variance(values, targets) -> float:
    """1 - Var(target - value) / Var(target)."""
    return 1 - np.var(np.asarray(targets) - values) / np.var(targets)
