"""Scorers to compare with: one that knows nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxprm.policies.protocol import prefix_hash


class RandomScorer:
    """Uniform scores that depend on seed, conversation and action alone: a search that it guides is search without
    judgement."""

    def __init__(self, seed: int):
        self._seed = seed
        self.usage = {"encoded": 0}

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Scores in [0, 1), one array [N] a state."""
        return [
            np.asarray([self._uniform(name, text) for text in texts], np.float32)
            for name, texts in zip(map(prefix_hash, states), candidates, strict=True)
        ]

    def forget(self) -> None:
        """Nothing is kept."""

    def _uniform(self, name: str, text: str) -> float:
        digest = hashlib.sha256(f"{self._seed}\x1f{name}\x1f{text}".encode()).digest()
        # As many bits as float32 holds, so that no score is rounded up to 1.
        return int.from_bytes(digest[:3], "big") / 2**24
