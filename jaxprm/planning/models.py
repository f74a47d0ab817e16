"""Shapes of public models by name, and the config of any policy to plan for."""

from __future__ import annotations

from pathlib import Path

from jaxprm.errors import UserError
from jaxprm.hf import hub, reader
from jaxprm.model.config import RopeScaling, TransformerConfig

# As in their config.json on the Hugging Face Hub, without the unembedding, which a reward model does not have.
MODELS = {
    "qwen2.5-0.5b": TransformerConfig(
        vocab_size=151_936,
        hidden_size=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
        rope_theta=1e6,
    ),
    "qwen2.5-3b": TransformerConfig(
        vocab_size=151_936,
        hidden_size=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        intermediate_size=11_008,
        rope_theta=1e6,
    ),
    "qwen2.5-7b": TransformerConfig(
        vocab_size=152_064,
        hidden_size=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        intermediate_size=18_944,
        rope_theta=1e6,
    ),
    "llama-3.1-8b": TransformerConfig(
        vocab_size=128_256,
        hidden_size=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14_336,
        rope_theta=5e5,
        norm_epsilon=1e-5,
        family="llama",
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
}


def policy_config(model: str | Path) -> TransformerConfig:
    """The config of a policy: a name in MODELS, a directory in Hugging Face format, or a Hub id.

    Only config.json is fetched from the Hub. Raises UserError for anything else.
    """
    name = str(model).lower()
    if name in MODELS:
        return MODELS[name]
    try:
        return reader.read_config(hub.resolve(model, files=("config.json",)))[0]
    except UserError as error:
        raise UserError(f"{error}; shapes that need no file: {', '.join(MODELS)}") from None
