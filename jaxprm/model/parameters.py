"""The parameters of the model: the one table of their names, shapes, sharding axes and initial values.

The modules, their sharding, the Hugging Face names, the FLOPs and the memory estimates all derive from it. It loads no
JAX, so that a process without an accelerator can size a model.

Letters: V vocab, D model, H heads, K kv heads, E head dim, F ffn, C labels of the head, L layers. `HE` and `KE` are
products: the heads of a matrix lie next to each other on one axis.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxprm.model.config import TransformerConfig


class Parameter(NamedTuple):
    """One parameter.

    axes: letters of its shape. A layer's parameters are stacked on an additional first axis L, see `parameter_shapes`.
    sharding: logical axis of each, a field of `sharding.Rules`.
    initial: "normal" is scaled by fan_in ** -0.5, "residual" also by (2 L) ** -0.5, "table" by 0.02.
    """

    name: str
    axes: tuple[str, ...]
    sharding: tuple[str, ...]
    initial: Literal["ones", "zeros", "normal", "residual", "table"]

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        sizes = {
            "V": config.vocab_size,
            "D": config.hidden_size,
            "E": config.head_dim,
            "HE": config.heads * config.head_dim,
            "KE": config.kv_heads * config.head_dim,
            "F": config.intermediate_size,
            "C": config.head.labels,
        }
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def is_matrix(self) -> bool:
        return len(self.axes) == 2


EMBEDDING = Parameter("embedding", ("V", "D"), ("vocabulary", "width"), "table")
UNEMBEDDING = Parameter("unembedding", ("V", "D"), ("vocabulary", "width"), "table")
NORM = Parameter("norm", ("D",), ("vector",), "ones")
# The head of two labels; that of one label has no axis C. Small enough to be replicated.
HEAD = Parameter("head", ("D", "C"), ("vector", "vector"), "table")
HEAD_BIAS = Parameter("head_bias", ("C",), ("vector",), "zeros")

# Checkpoints are written in the order of these, and random numbers are drawn in it: append, do not reorder.
# Matrices are [inputs, outputs]: x @ matrix reads rows in order, and stacked layers scan without a transpose.
_COMMON = (
    Parameter("attention_norm", ("D",), ("vector",), "ones"),
    Parameter("query", ("D", "HE"), ("width", "heads"), "normal"),
    Parameter("key", ("D", "KE"), ("width", "kv_heads"), "normal"),
    Parameter("value", ("D", "KE"), ("width", "kv_heads"), "normal"),
    # Both outputs into the residual stream start small, so that depth does not grow its variance.
    Parameter("output", ("HE", "D"), ("heads", "width"), "residual"),
    Parameter("ffn_norm", ("D",), ("vector",), "ones"),
    Parameter("gate", ("D", "F"), ("width", "ffn"), "normal"),
    Parameter("up", ("D", "F"), ("width", "ffn"), "normal"),
    Parameter("down", ("F", "D"), ("ffn", "width"), "residual"),
)
_BIASES = (
    Parameter("query_bias", ("HE",), ("heads",), "zeros"),
    Parameter("key_bias", ("KE",), ("kv_heads",), "zeros"),
    Parameter("value_bias", ("KE",), ("kv_heads",), "zeros"),
)
_HEAD_NORMS = (
    Parameter("query_norm", ("E",), ("vector",), "ones"),
    Parameter("key_norm", ("E",), ("vector",), "ones"),
)

PARAMETERS = {
    parameter.name: parameter
    for parameter in (EMBEDDING, UNEMBEDDING, NORM, HEAD, HEAD_BIAS, *_COMMON, *_BIASES, *_HEAD_NORMS)
}


def layer_parameters(config: TransformerConfig) -> tuple[Parameter, ...]:
    """The parameters of one layer of the config's family."""
    parameters = _COMMON
    if config.traits.biases:
        parameters += _BIASES
    if config.traits.head_norms:
        parameters += _HEAD_NORMS
    return parameters


def layer_matrices(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of one layer, by name."""
    return {parameter.name: parameter.shape(config) for parameter in layer_parameters(config) if parameter.is_matrix}


def head_shape(config: TransformerConfig) -> tuple[int, ...]:
    """[D] of a head with one label, [D, 2] of one with two."""
    shape = HEAD.shape(config)
    return shape[:1] if config.head.labels == 1 else shape


def parameter_shapes(config: TransformerConfig, *, reward: bool) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every parameter of a Transformer, or of a RewardModel, by its path; layers are stacked on axis 0.

    A reward model predicts no token, so it has no unembedding.
    """
    prefix = ("transformer",) if reward else ()
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {(*prefix, "embedding"): EMBEDDING.shape(config)}
    for parameter in layer_parameters(config):
        shapes[*prefix, "blocks", parameter.name] = (config.layers, *parameter.shape(config))
    shapes[*prefix, "norm"] = NORM.shape(config)
    if reward:
        shapes["head",] = head_shape(config)
        if config.head.bias:
            shapes["head_bias",] = HEAD_BIAS.shape(config)
    elif not config.tie_embeddings:
        shapes["unembedding",] = UNEMBEDDING.shape(config)
    return shapes
