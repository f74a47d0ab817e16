"""Records with step labels and of pairs, for the tests of objectives on them."""

from __future__ import annotations

import numpy as np

from data_pipeline.batches import Shape, _PackedSplit
from data_pipeline.shards import ShardSplit
from jaxprm.training.step import FIELDS, LABEL_FIELDS, PAIR_FIELDS


def split_of(records: list[dict]) -> ShardSplit:
    """A split of records {"tokens", "reads", "states", "rewards", "labels"}."""
    lengths, counts = [len(r["tokens"]) for r in records], [len(r["reads"]) for r in records]
    join = lambda name, dtype: np.concatenate([np.asarray(r[name], dtype) for r in records])
    return ShardSplit(
        ids=[str(index) for index in range(len(records))],
        tasks=["task"] * len(records),
        weights=np.asarray([r.get("weight", 1) for r in records], np.float32),
        outcomes=np.full(len(records), np.nan, np.float32),
        tokens=join("tokens", np.int32),
        token_starts=np.concatenate([[0], np.cumsum(lengths)]),
        step_starts=np.concatenate([[0], np.cumsum(counts)]),
        read_positions=join("reads", np.int32),
        state_positions=join("states", np.int32),
        rewards=join("rewards", np.float32),
        step_labels=join("labels", np.float32),
    )


def walk(seed: int, labels: list[float], outcome: float | None = None, weight: int = 1) -> dict:
    """A trajectory of random tokens with these labels."""
    rng, steps = np.random.default_rng(seed), len(labels)
    reads = [3 + 3 * step for step in range(steps)]
    rewards = np.full(steps, np.nan) if outcome is None else np.eye(steps)[-1] * outcome
    return {
        "tokens": rng.integers(1, 20, reads[-1] + 1),
        "reads": reads,
        "states": [read - 2 for read in reads],
        "rewards": rewards,
        "labels": labels,
        "weight": weight,
    }


def pair(seed: int, state: int, actions: tuple[int, ...], weight: int = 1) -> dict:
    """A state of so many random tokens, and actions of so many."""
    rng = np.random.default_rng(seed)
    nothing = np.full(len(actions), np.nan)
    return {
        "tokens": rng.integers(1, 20, state + sum(actions)),
        "reads": state - 1 + np.cumsum(actions),
        "states": [state - 1] * len(actions),
        "rewards": nothing,
        "labels": nothing,
        "weight": weight,
    }


class Records:
    """A dataset of one split in memory."""

    def __init__(self, records: list[dict]):
        self._split = split_of(records)
        self.metadata = type("Metadata", (), {"pad_id": 0})

    def split(self, name: str) -> ShardSplit:
        return self._split


def batch_of(records: list[dict], rows: int = 2, length: int = 64, slots: int = 12) -> dict[str, np.ndarray]:
    packed = _PackedSplit(Records(records), "train", Shape(rows, length, slots), None, window=8, epochs=1, seed=None)
    assert packed.batch_count == 1
    batch = packed.gather(0)
    return {name: batch[name] for name in (*FIELDS, *LABEL_FIELDS, *PAIR_FIELDS) if name in batch}
