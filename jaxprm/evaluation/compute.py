"""FLOPs by formula, from counted tokens."""

from __future__ import annotations

import math

from jaxprm.model import huggingface
from jaxprm.model.transformer import TransformerConfig
from jaxprm.policies import loading


def flops_per_token(config: TransformerConfig, context: int = 0) -> float:
    """FLOPs of one token's forward pass: two per weight of the blocks, plus attention over `context` tokens.

    Embedding look-ups cost nothing; the scalar head is too small to count.
    """
    width, head_width = config.hidden_size, config.head_dim
    attention = width * head_width * (2 * config.heads + 2 * config.kv_heads)
    block = attention + 3 * width * config.intermediate_size
    return 2.0 * config.layers * (block + 2 * context * config.heads * head_width)


def flops_of_tokens(state) -> tuple[float, float]:
    """Of a run: a token of the policy's, not a number where its size is not known, and one of the reward models'."""
    settings = state.experiment.policy
    reward = flops_per_token(huggingface.read_config(state.base_directory)[0])
    if not loading.is_directory(settings):
        return math.nan, reward
    return flops_per_token(huggingface.read_config(loading.policy_directory(settings))[0]), reward
