"""A plain forward pass in NumPy: values in float64, to measure how far float32 arithmetic is from them.

It shares no code with the model, its attention or its caches, except the table of rotary frequencies. Nothing is
batched, padded, packed or cached. One layer's weights are in memory at a time, in the precision of the computation.

Letters: T tokens, D model, H heads, K kv heads, G heads of a kv head, E head size, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxprm.model.config import TransformerConfig
from jaxprm.model.parameters import layer_parameters
from jaxprm.model.transformer import rotary_frequencies

Array = np.ndarray


def values(
    config: TransformerConfig,
    parameters: Any,
    sequences: Sequence[Array],
    dtype: type[np.floating] = np.float64,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Array]:
    """Values of every token of each sequence int32 [T]: `dtype` [T] each.

    Args:
      parameters: of a RewardModel, in any dtype.
      dtype: of the weights and of all arithmetic.
      on_layer: called after each layer.
    """
    weights = lambda leaf: np.asarray(leaf).astype(dtype)
    transformer = parameters["transformer"]
    embedding = np.asarray(transformer["embedding"][...])
    hidden = [weights(embedding[tokens]) for tokens in sequences]
    tables = [_rotary(config, len(tokens), dtype) for tokens in sequences]
    for index in range(config.layers):
        layer = {
            parameter.name: weights(transformer["blocks"][parameter.name][index])
            for parameter in layer_parameters(config)
        }
        hidden = [_layer(config, layer, x, table) for x, table in zip(hidden, tables, strict=True)]
        on_layer()
    norm, head = weights(transformer["norm"][...]), weights(parameters["head"][...])
    bias = weights(parameters["head_bias"][...]) if config.head.bias else np.zeros(config.head.labels, dtype)
    return [_head(_norm(config, x, norm), head, bias) for x in hidden]


def _layer(config: TransformerConfig, layer: dict[str, Array], x: Array, table: tuple[Array, Array]) -> Array:
    """x [T, D] after one layer."""
    y = _norm(config, x, layer["attention_norm"])
    query, keys, values = (_heads(config, layer, y, name) for name in ("query", "key", "value"))
    query, keys = _rotate(query, table), _rotate(keys, table)
    x = x + _attention(config, query, keys, values) @ layer["output"]
    y = _norm(config, x, layer["ffn_norm"])
    gate = y @ layer["gate"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"])) @ layer["down"]


def _heads(config: TransformerConfig, layer: dict[str, Array], y: Array, name: str) -> Array:
    """[T, D] -> [heads, T, E]."""
    y = y @ layer[name]
    if config.traits.biases:
        y = y + layer[f"{name}_bias"]
    y = y.reshape(len(y), -1, config.head_dim)
    if config.traits.head_norms and name != "value":
        y = _norm(config, y, layer[f"{name}_norm"])
    return y.swapaxes(0, 1)


def _attention(config: TransformerConfig, query: Array, keys: Array, values: Array) -> Array:
    """query [H, T, E], keys and values [K, T, E] -> [T, H * E]. Every token reads itself and those before it."""
    length, group = query.shape[1], config.heads // config.kv_heads
    later = np.triu(np.ones((length, length), bool), 1)
    mixed = np.empty_like(query)
    for head in range(config.heads):
        scores = query[head] @ keys[head // group].T / query.dtype.type(np.sqrt(config.head_dim))
        scores[later] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[head] = scores / scores.sum(-1, keepdims=True) @ values[head // group]
    return mixed.swapaxes(0, 1).reshape(length, -1)


def _norm(config: TransformerConfig, x: Array, scale: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(config.norm_epsilon)) * scale


def _rotary(config: TransformerConfig, length: int, dtype: type[np.floating]) -> tuple[Array, Array]:
    """(cosines, sines), [T, E / 2] each. The frequencies are float32 in every implementation, so they are constants."""
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling).astype(dtype)
    angles = np.arange(length, dtype=dtype)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def _rotate(x: Array, table: tuple[Array, Array]) -> Array:
    """[heads, T, E]: the pair of features i and i + E / 2 is rotated."""
    (cos, sin), half = table, x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _head(hidden: Array, head: Array, bias: Array) -> Array:
    """[T, D] -> [T]: the output of one label, or the probability of the second of two."""
    outputs = hidden @ head
    if head.ndim == 1:
        return outputs + bias[0]
    outputs = outputs + bias
    return 1 / (1 + np.exp(outputs[:, 0] - outputs[:, 1]))
