"""FLOPs by formula, from counted tokens."""

from __future__ import annotations

from jaxprm.model.transformer import TransformerConfig


def flops_per_token(config: TransformerConfig, context: int = 0) -> float:
    """FLOPs of one token's forward pass: two per weight of the blocks, plus attention over `context` tokens.

    Embedding look-ups cost nothing; the scalar head is too small to count.
    """
    width, head_width = config.hidden_size, config.head_dim
    attention = width * head_width * (2 * config.heads + 2 * config.kv_heads)
    block = attention + 3 * width * config.intermediate_size
    return 2.0 * config.layers * (block + 2 * context * config.heads * head_width)
