"""Sizes of a decoder, and the model families: what sets each apart.

Letters: D model, H heads, K kv heads, E head dim, F ffn, V vocab.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxprm.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's: wavelengths beyond `original_length / low_frequency_factor` are stretched by `factor`, those below
    `original_length / high_frequency_factor` are kept, and what lies between is blended.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self):
        for field in ("factor", "low_frequency_factor", "original_length"):
            if not getattr(self, field) > 0:
                raise UserError(f"rope scaling: {field} = {getattr(self, field)} must be above 0")
        if not self.high_frequency_factor > self.low_frequency_factor:
            raise UserError(
                f"rope scaling: high_frequency_factor = {self.high_frequency_factor} must be above "
                f"low_frequency_factor = {self.low_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Head:
    """What a reward model makes of a hidden state.

    labels: 1, a linear output that is the value itself; 2, whose softmax is read at label 1 (as TRL's PRMTrainer makes
    them). bias: whether the outputs have one, as those of token classifiers do.
    """

    labels: int = 1
    bias: bool = False

    def __post_init__(self):
        if self.labels not in (1, 2):
            raise UserError(f"model.head.labels = {self.labels} must be 1 or 2")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Family and sizes of a decoder, and the head of the reward model that may sit on it.

    Names follow the Hugging Face config where it has one. `head` matters to a RewardModel alone.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    family: str = "qwen2"
    rope_scaling: RopeScaling | None = None
    head: Head = Head()

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise UserError(f"model.family = {self.family!r} is not supported; supported: {', '.join(FAMILIES)}")
        for field in ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} = {getattr(self, field)} must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim} must be even: rotary embedding turns pairs")

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]


@dataclass(frozen=True)
class Family:
    """What a family's decoder has beyond the common one.

    model_type, name: as in config.json, and as its architectures begin. biases: of query, key and value. head_norms:
    of queries and keys, over each head. head_dim: where config.json names none; None is hidden_size / heads.
    """

    model_type: str
    name: str
    biases: bool
    head_norms: bool
    head_dim: int | None = None

    @property
    def causal(self) -> str:
        return f"{self.name}ForCausalLM"

    @property
    def sequence(self) -> str:
        return f"{self.name}ForSequenceClassification"

    @property
    def token(self) -> str:
        return f"{self.name}ForTokenClassification"

    @property
    def architectures(self) -> tuple[str, str, str]:
        return self.causal, self.sequence, self.token


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2", "Qwen2", biases=True, head_norms=False),  # and Qwen2.5
        Family("qwen3", "Qwen3", biases=False, head_norms=True, head_dim=128),
        Family("llama", "Llama", biases=False, head_norms=False),  # 3, 3.1, 3.2
    )
}
