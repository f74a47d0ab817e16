"""Sizes of a decoder, and the model families: what distinguishes each of them.

A family whose layer has only the traits of `Family` is one more record in FAMILIES.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxprm.errors import UserError


@dataclass(frozen=True)
class Family:
    """Traits of a family's decoder, and its names in Hugging Face checkpoints.

    model_type: as in config.json; name: prefix of its architectures.
    biases: the query, key and value projections have biases. head_norms: queries and keys are normalized per head.
    head_dim: default where config.json has none; None means hidden_size / heads.
    window_switch: config.json may have a `sliding_window` that is off unless `use_sliding_window` is true. Without the
    switch, a `sliding_window` is always on, and not supported.
    """

    model_type: str
    name: str
    biases: bool = False
    head_norms: bool = False
    head_dim: int | None = None
    window_switch: bool = False

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
        Family("qwen2", "Qwen2", biases=True, window_switch=True),  # and Qwen2.5
        Family("qwen3", "Qwen3", head_norms=True, head_dim=128, window_switch=True),
        Family("llama", "Llama"),  # 3, 3.1, 3.2
    )
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling of Llama 3.1: low frequencies are stretched, so that longer contexts stay in the trained range.

    Wavelengths above `original_length / low_frequency_factor` are multiplied by `factor`, those below
    `original_length / high_frequency_factor` are unchanged, and those between are interpolated.
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


@dataclass(frozen=True)
class Head:
    """The value head of a reward model.

    labels: 1, a linear output that is the value itself; 2, two logits, and the value is the softmax probability of
    label 1 (as in TRL's PRMTrainer). bias: whether the outputs have a bias, as token classifiers do.
    """

    labels: int = 1
    bias: bool = False

    def __post_init__(self):
        if self.labels not in (1, 2):
            raise UserError(f"model.head.labels = {self.labels} must be 1 or 2")


@dataclass(frozen=True)
class TransformerConfig:
    """Family and sizes of a decoder, and the value head of a reward model on top of it.

    Field names follow the Hugging Face config where it has the field. `head` is used by a RewardModel only.
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
            raise UserError(f"model.head_dim = {self.head_dim} must be even: rotary embedding rotates pairs")

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]
