"""The same search by transformers and torch: everything encoded again in batches, and keys and values kept a beam."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache

from jaxprm.bench.search import Round, Run, timed
from jaxprm.model import huggingface

# Sequences encoded at once: as many as a round has, but for memory's sake no more than this many tokens.
TOKENS_A_CALL = 65_536


def load(config, parameters) -> Any:
    """The transformers model of equal weights, read from a directory as a user's would be."""
    with tempfile.TemporaryDirectory(prefix="jaxprm-bench-") as scratch:
        huggingface.write_model(Path(scratch), config, parameters, pad_id=0, end_id=1, max_length=1 << 15)
        model = AutoModelForSequenceClassification.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    return model.eval()


def _values(model, hidden: torch.Tensor) -> list[float]:
    """At the last token of every row: all rows of a call are of one length."""
    return (hidden[:, -1] @ model.score.weight[0]).tolist()


@torch.inference_mode()
def reencode(model, rounds: list[Round]) -> Run:
    """Every candidate with its whole history, in batches."""
    model.model(torch.from_numpy(rounds[0].sequences[:1]).long())
    started, values, tokens = time.perf_counter(), [], 0
    for one in rounds:
        sequences = torch.from_numpy(one.sequences).long()
        for batch in sequences.split(max(1, TOKENS_A_CALL // sequences.shape[1])):
            values += _values(model, model.model(batch, use_cache=False).last_hidden_state)
            tokens += batch.numel()
    return Run(np.asarray(values, np.float32), time.perf_counter() - started, tokens)


@torch.inference_mode()
def kept_cache(model, rounds: list[Round]) -> Run:
    """`past_key_values` of every beam, copied for its candidates and kept of the chosen ones: every token once."""
    seconds, (values, tokens) = timed(lambda: _kept_cache(model, rounds))
    return Run(np.asarray(values, np.float32), seconds, tokens)


def _kept_cache(model, rounds: list[Round]) -> tuple[list[float], int]:
    values: list[float] = []
    cache = DynamicCache(config=model.config)
    model.model(torch.from_numpy(rounds[0].states).long(), past_key_values=cache)
    tokens = rounds[0].states.size
    for number, one in enumerate(rounds):
        beams, each, length = one.candidates.shape
        if beams * each > len(one.states):
            cache.batch_repeat_interleave(each)
        batch = torch.from_numpy(one.candidates.reshape(beams * each, length)).long()
        values += _values(model, model.model(batch, past_key_values=cache).last_hidden_state)
        tokens += batch.numel()
        if number + 1 < len(rounds):
            cache.batch_select_indices(torch.from_numpy(one.chosen))
            observations = torch.from_numpy(one.observations).long()
            model.model(observations, past_key_values=cache)
            tokens += observations.numel()
    return values, tokens
