"""The training loop that jaxprm is compared with: transformers' token classifier, padded batches, AdamW, as in TRL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForTokenClassification

from data_pipeline.shards import ShardSplit
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig

IGNORED = -100
MEGABATCH = 50  # batches that are sorted together by length, as in transformers' Trainer


def load(config: TransformerConfig, parameters: Any, *, max_length: int) -> Any:
    """The transformers model with these weights, two labels and a bias."""
    with tempfile.TemporaryDirectory(prefix="jaxprm-bench-") as scratch:
        writer.write_model(Path(scratch), config, parameters, pad_id=0, end_id=1, max_length=max_length)
        return AutoModelForTokenClassification.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).train()


class TokenClassification:
    """Trains step by step on a split; the label of a step is 1 if its trajectory succeeded, else 0."""

    def __init__(self, model: Any, split: ShardSplit, pad_id: int, *, rows: int, grouped: bool):
        self._model, self._split, self._pad_id, self._rows = model, split, pad_id, rows
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
        self._batches = self._endless(grouped)

    def step(self) -> tuple[int, int]:
        """Trains on a batch; returns its (tokens, token slots)."""
        batch = collate(self._split, next(self._batches), self._pad_id)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        loss.item()
        return int(batch["attention_mask"].sum()), batch["attention_mask"].numel()

    def _endless(self, grouped: bool) -> Iterator[np.ndarray]:
        rng, lengths = np.random.default_rng(0), self._split.lengths
        while True:
            order = rng.permutation(len(lengths))
            if grouped:
                size = MEGABATCH * self._rows
                parts = [order[at : at + size] for at in range(0, len(order), size)]
                order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
            batches = [order[at : at + self._rows] for at in range(0, len(order), self._rows)]
            # A smaller last batch would distort the measurement. Shuffled, so that the longest do not come first.
            full = [batch for batch in batches if len(batch) == self._rows] or batches
            yield from (full[at] for at in rng.permutation(len(full)))


def collate(split: ShardSplit, examples: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """Trajectories padded to the longest one, [B, T]; labels, the trajectory's outcome, at the read positions."""
    lengths = split.lengths[examples]
    shape = (len(examples), int(lengths.max()))
    tokens, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        steps = slice(split.step_starts[example], split.step_starts[example + 1])
        tokens[row, :length] = split.tokens[split.token_starts[example] :][:length]
        mask[row, :length] = 1
        labels[row, split.read_positions[steps]] = int(split.outcomes[example] > 0.5)
    arrays = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
