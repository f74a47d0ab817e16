"""One decoder-only transformer for training, sampling and scoring: the Qwen2, Qwen3 and Llama 3 families.

Letters: B batch, T tokens, C cached tokens, L layers, D model, H heads, K kv heads, E head dim, F ffn, V vocab.

The same forward pass serves three masks:

* packed training and scoring: several sequences in a row, told apart by `segments`;
* prefix plus candidates: a cached prefix that every segment of the row may read;
* decoding: a cached prefix and one new token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.model.attention import chunk_mask, packed_attention, tiled_attention
from jaxprm.model.config import RopeScaling, TransformerConfig


class Cache(NamedTuple):
    """Keys and values of shared prefixes, one array a layer, and how much of them is filled.

    keys: L arrays [G, K, E, C], values: L arrays [G, K, C, E]; lengths: int32 [G], positions 0..length-1 are filled.
    G is B, or a part of it: a row serves B / G consecutive rows of the tokens that read it.
    With tokens last, a query's scores are sums of whole rows: five times faster on a CPU than the other way round.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @staticmethod
    def empty(config: TransformerConfig, batch: int, capacity: int, dtype=jnp.float32, device=None) -> Cache:
        """Keys and values of nothing; device: where, or the sharding over which, they lie."""

        def zeros(*shape):
            made = (jnp.zeros((batch, config.kv_heads, *shape), dtype, device=device) for _ in range(config.layers))
            return tuple(made)

        lengths = jnp.zeros((batch,), jnp.int32)
        return Cache(zeros(config.head_dim, capacity), zeros(capacity, config.head_dim), lengths)

    @property
    def capacity(self) -> int:
        return self.values[0].shape[2]

    def append(self, keys: tuple[jax.Array, ...], values: tuple[jax.Array, ...], counts: jax.Array) -> Cache:
        """Adds the first `counts[b]` of the chunk's keys and values, [B, K, T, E] a layer, to every row.

        A whole chunk is written at the row's end; what lies past `counts` is overwritten by the next append,
        so the capacity must leave room for one chunk.
        """

        def write(buffer, chunk, axis):
            place = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis))
            return place(buffer, chunk.astype(buffer.dtype), self.lengths)

        return Cache(
            tuple(write(b, c.swapaxes(2, 3), 2) for b, c in zip(self.keys, keys, strict=True)),
            tuple(write(b, c, 1) for b, c in zip(self.values, values, strict=True)),
            self.lengths + counts,
        )


class Output(NamedTuple):
    """hidden: [B, T, D] after the final norm; keys, values: L arrays [B, K, T, E] of the new tokens (with a cache)."""

    hidden: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root mean square norm over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angle a position of each pair, float32 [E / 2].

    Those of the Hugging Face models bit for bit: one rounding more or less, times a position of a thousand, moves a
    value by 1e-5. Torch divides a number by a tensor as the number times its reciprocal, which is two roundings. (On
    some CPUs its powers are a rounding off now and then; these are the exact ones.)
    """
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = one / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return frequencies
    factor, low, length = map(np.float32, (scaling.factor, scaling.low_frequency_factor, scaling.original_length))
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    longest = np.float32(scaling.original_length / scaling.low_frequency_factor)
    shortest = np.float32(scaling.original_length / scaling.high_frequency_factor)
    stretched = np.where(wavelengths > longest, frequencies / factor, frequencies)
    span = np.float32(scaling.high_frequency_factor - scaling.low_frequency_factor)
    smooth = (one / wavelengths * length - low) / span
    blended = (one - smooth) * stretched / factor + smooth * stretched
    between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return np.where(between, blended, stretched)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, E / 2] for integer positions [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of [B, heads, T, E], in the half-split layout of the Hugging Face checkpoints, in float32."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass is computed: what it returns differs by rounding alone.

    dtype: of activations and of the products; norms, softmax and the value head are in float32 whatever it is.
    remat: what is kept of a layer for the backward pass: everything ("none"), products of activations with parameters
        ("minimal"), or its input ("full").
    attend: attention within packed rows, (query, keys, values, segments) as for `packed_attention`.
    constrain: (activation, *logical axes) -> the activation, laid out on a mesh.
    frozen_layers: so many of the first layers are not trained; run by themselves, nothing of theirs is kept.
    """

    dtype: Any = jnp.float32
    remat: Literal["none", "minimal", "full"] = "none"
    attend: Callable[..., jax.Array] = packed_attention
    constrain: Callable[..., jax.Array] = lambda x, *axes: x
    frozen_layers: int = 0

    def checkpointed(self, layer: Callable) -> Callable:
        if self.remat == "none":
            return layer
        policies = jax.checkpoint_policies
        kept = {"minimal": policies.dots_with_no_batch_dims_saveable, "full": policies.nothing_saveable}
        # Inside a scan nothing is merged across the barrier that prevent_cse would put up.
        return jax.checkpoint(layer, policy=kept[self.remat], prevent_cse=False)


class Block(nnx.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        def matrix(fan_in, fan_out):
            return nnx.Param(jax.random.normal(rngs.params(), (fan_in, fan_out)) * fan_in**-0.5)

        width, query, kv = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((width,)))
        self.query, self.key, self.value = matrix(width, query), matrix(width, kv), matrix(width, kv)
        if config.traits.biases:
            self.query_bias, self.key_bias, self.value_bias = (
                nnx.Param(jnp.zeros((size,))) for size in (query, kv, kv)
            )
        if config.traits.head_norms:
            self.query_norm, self.key_norm = (nnx.Param(jnp.ones((config.head_dim,))) for _ in range(2))
        # Both outputs into the residual stream start small, so that depth does not grow its variance.
        self.output = nnx.Param(matrix(query, width)[...] * (2 * config.layers) ** -0.5)
        self.ffn_norm = nnx.Param(jnp.ones((width,)))
        self.gate = matrix(width, config.intermediate_size)
        self.up = matrix(width, config.intermediate_size)
        self.down = nnx.Param(matrix(config.intermediate_size, width)[...] * (2 * config.layers) ** -0.5)

    def __call__(self, x, cos, sin, segments, cached=(), attend=packed_attention, adapters=MappingProxyType({})):
        """x [B, T, D] -> (x, keys [B, K, T, E], values [B, K, T, E]).

        adapters: {"a": [I, R], "b": [R, O]} by the name of a matrix [I, O], whose product is added to it.
        """
        config = self.config

        def project(y, name):
            found = y @ getattr(self, name)[...].astype(y.dtype)
            if name not in adapters:
                return found
            return found + (y @ adapters[name]["a"].astype(y.dtype)) @ adapters[name]["b"].astype(y.dtype)

        def heads(y, name, count):
            y = project(y, name)
            if config.traits.biases:
                y = y + getattr(self, f"{name}_bias")[...].astype(y.dtype)
            y = y.reshape(*y.shape[:2], count, config.head_dim)
            if config.traits.head_norms and name != "value":
                y = rms_norm(y, getattr(self, f"{name}_norm")[...], config.norm_epsilon)
            return y.swapaxes(1, 2)

        y = rms_norm(x, self.attention_norm[...], config.norm_epsilon)
        query = rotate(heads(y, "query", config.heads), cos, sin)
        keys = rotate(heads(y, "key", config.kv_heads), cos, sin)
        values = heads(y, "value", config.kv_heads)
        if cached:
            mixed = tiled_attention(query, keys, values, chunk_mask(segments), cached)
        else:
            mixed = attend(query, keys, values, segments)
        mixed = mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        x = x + project(mixed, "output")
        y = rms_norm(x, self.ffn_norm[...], config.norm_epsilon)
        gated = jax.nn.silu(project(y, "gate")) * project(y, "up")
        return x + project(gated, "down"), keys, values


class Transformer(nnx.Module):
    """The decoder. Block parameters are stacked on a leading layer axis."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * 0.02)
        self.blocks = nnx.vmap(lambda keys: Block(config, rngs=keys), in_axes=0, out_axes=0)(rngs.split(config.layers))
        self.norm = nnx.Param(jnp.ones((config.hidden_size,)))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(
                jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * 0.02
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        caches: Sequence[Cache] = (),
        *,
        dtype=jnp.float32,
        compute: ForwardOptions | None = None,
        adapters: Mapping[str, Mapping[str, jax.Array]] = MappingProxyType({}),
    ) -> Output:
        """Hidden states of every token.

        tokens, positions, segments: int32 [B, T]. Tokens read the tokens of their own segment at or before them
        and the filled part of their row of every cache: a prefix, say, and what was generated after it. A cache of
        fewer rows, a divisor of B, is shared: each of its rows by the same number of consecutive ones. The caches
        are not changed: `Cache.append` keeps what the caller wants kept. `compute` is for passes without caches, and
        says the dtype too; so are `adapters`, as for a Block but stacked on a layer axis.
        """
        compute = compute or ForwardOptions(dtype=dtype)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        # A row of the table is read whole: what splits its width is gathered first, or the result would have to be.
        x = compute.constrain(self.embedding[...].astype(compute.dtype), "vocabulary", "hidden")[tokens]
        graph, stacked = nnx.split(self.blocks)
        if not caches:

            def layer(x, parameters):
                block = nnx.merge(graph, parameters[0])
                x, _, _ = block(x, cos, sin, segments, attend=compute.attend, adapters=parameters[1])
                return compute.constrain(x, "batch", "length", "hidden"), None

            x = compute.constrain(x, "batch", "length", "hidden")
            stacked = (stacked, dict(adapters))
            if begin := compute.frozen_layers:
                still = jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf[:begin], stacked))
                x, _ = jax.lax.scan(layer, x, still)
                stacked = jax.tree.map(lambda leaf: leaf[begin:], stacked)
            x, _ = jax.lax.scan(compute.checkpointed(layer), x, stacked)
            return Output(rms_norm(x, self.norm[...], self.config.norm_epsilon), (), ())
        filled = [jnp.arange(cache.capacity) < cache.lengths[:, None] for cache in caches]
        keys, values = [], []
        # Unrolled: scanning over the layers would copy each layer's cache once a token.
        for index in range(self.config.layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], stacked))
            cached = [(c.keys[index], c.values[index], f) for c, f in zip(caches, filled, strict=True)]
            x, new_keys, new_values = block(x, cos, sin, segments, cached)
            keys.append(new_keys)
            values.append(new_values)
        return Output(rms_norm(x, self.norm[...], self.config.norm_epsilon), tuple(keys), tuple(values))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits in float32: [..., D] -> [..., V]."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        return jnp.einsum("...d,vd->...v", hidden, table[...].astype(hidden.dtype), preferred_element_type=jnp.float32)


def head_values(hidden: jax.Array, weights: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Values [...] in float32 of hidden states [..., D], by the weights [D] of one label or [D, 2] of two: see Head."""
    outputs = hidden.astype(jnp.float32) @ weights.astype(jnp.float32)
    if weights.ndim == 1:
        return outputs if bias is None else outputs + bias[0].astype(jnp.float32)
    if bias is not None:
        outputs = outputs + bias.astype(jnp.float32)
    return jax.nn.softmax(outputs, axis=-1)[..., 1]


class RewardModel(nnx.Module):
    """The decoder with a value head: promise, read at the last token of every action."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.transformer = Transformer(config, rngs=rngs)
        labels = config.head.labels
        shape = (config.hidden_size,) if labels == 1 else (config.hidden_size, labels)
        # Small but not zero: from a zero head the transformer gets no gradient until the head has moved.
        self.head = nnx.Param(jax.random.normal(rngs.params(), shape) * 0.02)
        if config.head.bias:
            self.head_bias = nnx.Param(jnp.zeros((labels,)))

    def value(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> values [...] in float32."""
        bias = self.head_bias[...] if self.transformer.config.head.bias else None
        return head_values(hidden, self.head[...], bias)

    def __call__(self, tokens, positions, segments, read_positions, *, dtype=jnp.float32) -> jax.Array:
        """Values [B, S] at `read_positions` [B, S] of packed rows [B, T]."""
        hidden = self.transformer(tokens, positions, segments, dtype=dtype).hidden
        return self.value(jnp.take_along_axis(hidden, read_positions[..., None], axis=1))


def reward_model_graph(config: TransformerConfig):
    """Static definition of a RewardModel, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0))))[0]


def transformer_graph(config: TransformerConfig):
    """Static definition of a Transformer, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
