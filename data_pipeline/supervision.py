"""What the records of a split can be trained on: outcomes, step labels, or pairs of actions in one state.

A record of pairs holds the tokens of a state, then those of the chosen action, then those of each rejected one. Its
steps are these actions, in this order, and all have the state position of the state: in a trajectory every state comes
after the one before, so a record shows by itself what it is. Shapes: N records, T tokens and S steps of a split.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline.shards import ShardSplit


def with_outcome(split: ShardSplit) -> np.ndarray:
    """Mask of the records with an outcome or rewards, bool [N]; the others have rewards of NaN."""
    return ~np.isnan(split.rewards[split.step_starts[:-1]])


def with_labels(split: ShardSplit) -> np.ndarray:
    """Mask of the records with a label on some step, bool [N]."""
    return np.add.reduceat(~np.isnan(split.step_labels), split.step_starts[:-1]) > 0


def of_pairs(split: ShardSplit) -> np.ndarray:
    """Mask of the records of pairs, bool [N]."""
    starts = split.step_starts[:-1]
    lowest, highest = (extreme.reduceat(split.state_positions, starts) for extreme in (np.minimum, np.maximum))
    return (split.step_counts > 1) & (lowest == highest)


def label_bounds(*splits: ShardSplit) -> tuple[float, float] | None:
    """The lowest and the highest label of splits; None without labels."""
    labels = np.concatenate([split.step_labels[~np.isnan(split.step_labels)] for split in splits])
    return (float(labels.min()), float(labels.max())) if len(labels) else None


def select(split: ShardSplit, mask: np.ndarray) -> ShardSplit:
    """The records that a mask [N] selects, in their order; the split itself if it selects all."""
    if mask.all():
        return split
    kept = np.flatnonzero(mask)
    tokens, steps = np.repeat(mask, split.lengths), np.repeat(mask, split.step_counts)
    by_step = ("read_positions", "state_positions", "rewards", "step_labels")
    return ShardSplit(
        ids=[split.ids[index] for index in kept],
        tasks=[split.tasks[index] for index in kept],
        weights=split.weights[kept],
        outcomes=split.outcomes[kept],
        tokens=split.tokens[tokens],
        token_starts=np.concatenate([[0], np.cumsum(split.lengths[kept], dtype=np.int64)]),
        step_starts=np.concatenate([[0], np.cumsum(split.step_counts[kept], dtype=np.int64)]),
        **{name: getattr(split, name)[steps] for name in by_step},
    )


class Layout(NamedTuple):
    """Position of each token in its conversation, and the branch that it is on: 0 is the state, int32 [T] each."""

    positions: np.ndarray
    branches: np.ndarray


def pair_layout(split: ShardSplit) -> Layout | None:
    """The layout of a split that has records of pairs: action k of a record is branch k, from 1. None without pairs."""
    pairs = of_pairs(split)
    if not pairs.any():
        return None
    positions = np.arange(len(split.tokens)) - np.repeat(split.token_starts[:-1], split.lengths)
    branches = np.zeros(len(split.tokens), np.int32)
    for record in np.flatnonzero(pairs):
        first, steps = split.token_starts[record], slice(split.step_starts[record], split.step_starts[record + 1])
        state, ends = split.state_positions[steps][0], split.read_positions[steps]
        for branch, (start, end) in enumerate(zip((state, *ends[:-1]), ends, strict=True), start=1):
            tokens = slice(first + start + 1, first + end + 1)
            positions[tokens] = np.arange(state + 1, state + 1 + end - start)
            branches[tokens] = branch
    return Layout(positions.astype(np.int32), branches)
