"""The shape of the model to plan for: of a directory, of the hub, or of one that everybody knows."""

from __future__ import annotations

from pathlib import Path

from jaxprm.errors import UserError
from jaxprm.model import hub, huggingface
from jaxprm.model.transformer import RopeScaling, TransformerConfig

# Of their config.json on the Hugging Face hub; without an unembedding, which a reward model has not.
MODELS = {
    "qwen2.5-0.5b": TransformerConfig(
        vocab_size=151_936, hidden_size=896, layers=24, heads=14, kv_heads=2, head_dim=64, intermediate_size=4864,
        rope_theta=1e6,
    ),
    "qwen2.5-3b": TransformerConfig(
        vocab_size=151_936, hidden_size=2048, layers=36, heads=16, kv_heads=2, head_dim=128, intermediate_size=11_008,
        rope_theta=1e6,
    ),
    "qwen2.5-7b": TransformerConfig(
        vocab_size=152_064, hidden_size=3584, layers=28, heads=28, kv_heads=4, head_dim=128, intermediate_size=18_944,
        rope_theta=1e6,
    ),
    "llama-3.1-8b": TransformerConfig(
        vocab_size=128_256, hidden_size=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate_size=14_336,
        rope_theta=5e5, norm_epsilon=1e-5, family="llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
}  # fmt: skip


def policy_config(model: str | Path) -> TransformerConfig:
    """The config of a policy: a name in MODELS, a directory in Hugging Face format, or a name on the hub.

    Of the hub config.json alone is fetched. Raises UserError for anything else.
    """
    if (known := str(model).lower()) in MODELS:
        return MODELS[known]
    try:
        return huggingface.read_config(hub.resolve(model, files=("config.json",)))[0]
    except UserError as error:
        raise UserError(f"{error}; shapes that need no file: {', '.join(MODELS)}") from None
