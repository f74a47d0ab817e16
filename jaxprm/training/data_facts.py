"""What a training learns from, in numbers: said before the first step, and kept in reward_model.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.batches import TrainingBatches
from data_pipeline.metadata import length_histogram, length_range
from data_pipeline.shards import Dataset
from jaxprm import config as config_lib


def training_facts(dataset: Dataset, batches: TrainingBatches) -> dict[str, Any]:
    """trained_on: trajectories, and tokens of all epochs; lengths: their histogram; fill; skipped: by split.

    `fill` is the share of the token slots of all batches that hold one.
    """
    epochs, lengths = len(batches.epoch_ends), batches.split.lengths
    return {
        "trained_on": {"trajectories": len(lengths), "tokens": int(lengths.sum()) * epochs},
        "lengths": length_histogram(lengths),
        "fill": round(batches.fill, 4),
        "skipped": {split: dataset.skipped(split)._asdict() for split in ("train", "validation")},
    }


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
