"""What a training learns from, in numbers: said before the first step, and kept in reward_model.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline.batches import TrainingBatches
from data_pipeline.metadata import length_histogram, length_range
from data_pipeline.shards import Dataset, Split
from jaxprm import config as config_lib


def training_facts(dataset: Dataset, batches: TrainingBatches) -> dict[str, Any]:
    """trained_on: trajectories, and tokens of all epochs; lengths: their histogram; turn_tokens; fill; skipped.

    `turn_tokens` has the `median` and the `most`, of 99 in 100, tokens of an action and of what follows it up to the
    next one. `fill` is the share of the token slots of all batches that hold one; `skipped` is by split.
    """
    epochs, lengths = len(batches.epoch_ends), batches.split.lengths
    return {
        "trained_on": {"trajectories": len(lengths), "tokens": int(lengths.sum()) * epochs},
        "lengths": length_histogram(lengths),
        "turn_tokens": _turn_tokens(batches.split),
        "fill": round(batches.fill, 4),
        "skipped": {split: dataset.skipped(split)._asdict() for split in ("train", "validation")},
    }


def _turn_tokens(split: Split) -> dict[str, dict[str, int]]:
    within = np.ones(max(0, len(split.read_positions) - 1), bool)
    within[split.step_starts[1:-1] - 1] = False  # from one trajectory's last step to the first of the next
    turns = {
        "action": split.read_positions - split.state_positions,
        "observation": (split.state_positions[1:] - split.read_positions[:-1])[within],
    }
    return {name: _spread(tokens) for name, tokens in turns.items()}


def _spread(tokens: np.ndarray) -> dict[str, int]:
    median, most = np.percentile(tokens, (50, 99), method="higher") if len(tokens) else (0, 0)
    return {"median": int(median), "most": int(most)}


def to_lines(name: str, facts: dict[str, Any], data: config_lib.Data, steps: int) -> Iterator[str]:
    """The facts for a terminal."""
    trajectories, fill = facts["trained_on"]["trajectories"], facts["fill"]
    yield (
        f"train {name}: {trajectories} trajectories, {steps} batches of {data.rows} x {data.length} tokens, "
        f"{fill:.1%} full"
    )
    yield "  tokens: " + ", ".join(f"{length_range(low)} in {count}" for low, count in facts["lengths"].items())
    for split, skipped in facts["skipped"].items():
        if skipped["shards"]:
            count = skipped["trajectories"]
            yield f"  left out of {split}: {skipped['shards']} broken shards with {count} trajectories"
