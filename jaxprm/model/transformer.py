"""The decoder-only transformer behind training, sampling and scoring: the families of `jaxprm.model.config`.

Letters: B batch, T tokens, C cached tokens, S steps, L layers, D model, H heads, K kv heads, E head dim, F ffn,
V vocab, I and O inputs and outputs of a matrix, R rank of an adapter.

One forward pass serves three attention masks. A token always reads the tokens of its own segment (an integer per
token, 0 is padding) at or before itself; what else it reads depends on the call:

* packed rows (training, scoring of full conversations): no cache. Several sequences share a row, one segment each.
  In training on pairs, the two actions of a state are branches of a segment: both read the state, neither the other.
* prefix and candidates (scoring of candidate actions): a cached prefix per row. Every segment of the row is another
  continuation of it: all of them read the prefix, none reads a sibling.
* decoding (sampling): cached blocks and one new token, which is its own segment and reads everything cached.

So the mask of cached tokens depends on the row alone ([B, C], which positions are filled) and the mask of new tokens
on segments alone ([B, T, T]); positions are passed separately, because a candidate starts where its prefix ends.
"""

from __future__ import annotations

import dataclasses
import functools
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
from jaxprm.model.parameters import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    NORM,
    UNEMBEDDING,
    Parameter,
    head_shape,
    layer_parameters,
)


class Cache(NamedTuple):
    """Keys and values of token sequences that later tokens read: one array per layer.

    keys: L arrays [G, K, E, C]. values: L arrays [G, K, C, E]. lengths: int32 [G], positions 0..length-1 are filled.
    G is B or a divisor of it: a cached row serves B / G consecutive rows of the tokens that read it.

    Keys have tokens last, so that the product with a query reads contiguous rows of C: five times faster on a CPU than
    [C, E]. Layers are separate arrays because passes with caches are unrolled over the layers, see Transformer.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @staticmethod
    def empty(config: TransformerConfig, batch: int, capacity: int, dtype=jnp.float32, device=None) -> Cache:
        """A cache of `batch` rows with room for `capacity` tokens each; device: a device or a sharding."""

        def zeros(*shape: int) -> tuple[jax.Array, ...]:
            shape = (batch, config.kv_heads, *shape)
            return tuple(jnp.zeros(shape, dtype, device=device) for _ in range(config.layers))

        lengths = jnp.zeros((batch,), jnp.int32)
        return Cache(zeros(config.head_dim, capacity), zeros(capacity, config.head_dim), lengths)

    @property
    def capacity(self) -> int:
        return self.values[0].shape[2]

    def append(self, keys: tuple[jax.Array, ...], values: tuple[jax.Array, ...], counts: jax.Array) -> Cache:
        """Adds the first `counts[b]` tokens of a chunk to every row; keys, values: L arrays [B, K, T, E].

        The whole chunk is written at the row's end: counts differ by row, shapes may not. What is past `counts` is
        overwritten by the next append, so the capacity must leave room for one chunk.
        """

        def write(buffer: jax.Array, chunk: jax.Array, axis: int) -> jax.Array:
            write_row = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis))
            return write_row(buffer, chunk.astype(buffer.dtype), self.lengths)

        return Cache(
            tuple(write(b, c.swapaxes(2, 3), 2) for b, c in zip(self.keys, keys, strict=True)),
            tuple(write(b, c, 1) for b, c in zip(self.values, values, strict=True)),
            self.lengths + counts,
        )


class Output(NamedTuple):
    """Results of a forward pass.

    hidden: [B, T, D], after the final norm. keys, values: L arrays [B, K, T, E] of the new tokens, to be appended to a
    cache; () in a pass without caches.
    """

    hidden: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root mean square norm over the last axis: [..., D] and scale [D] -> [..., D], computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Rotation angle per position of each pair of features, float32 [E / 2]; scaling: see RopeScaling.

    Equal to those of transformers bit for bit, where torch's powers are exact (on some CPUs they are one rounding off).
    """
    # One rounding more or less in a frequency, times a position of a thousand, moves a value by 1e-5. So the order of
    # operations is torch's, which divides a number by a tensor as the number times its reciprocal: two roundings.
    unit = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = unit / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return frequencies
    factor, low, length = map(np.float32, (scaling.factor, scaling.low_frequency_factor, scaling.original_length))
    wavelengths = unit / frequencies * np.float32(2 * math.pi)
    longest = np.float32(scaling.original_length / scaling.low_frequency_factor)
    shortest = np.float32(scaling.original_length / scaling.high_frequency_factor)
    stretched = np.where(wavelengths > longest, frequencies / factor, frequencies)
    span = np.float32(scaling.high_frequency_factor - scaling.low_frequency_factor)
    smooth = (unit / wavelengths * length - low) / span
    blended = (unit - smooth) * stretched / factor + smooth * stretched
    between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return np.where(between, blended, stretched)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines), float32 [B, T, E / 2] each, of integer positions [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of [B, H, T, E] by cos, sin [B, T, E / 2], computed in float32.

    A pair is features i and i + E / 2, the half-split layout of Hugging Face checkpoints, not neighbours as in the
    paper: with it their query and key matrices are used as they are.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass is computed; results differ only by rounding.

    dtype: of activations and matrix products. Norms, softmax and the value head are always in float32.
    remat: what the backward pass keeps of a layer: everything ("none"), the products of activations with parameters
        ("minimal"), or only its input ("full").
    attend: attention within packed rows, with the arguments (query, keys, values, segments) of `packed_attention`.
    constrain: (activation, *logical axes) -> the activation with a sharding constraint, see `sharding.constraints`.
    frozen_layers: number of first layers that are not trained: nothing of theirs is kept for the backward pass.
    """

    dtype: Any = jnp.float32
    remat: Literal["none", "minimal", "full"] = "none"
    attend: Callable[..., jax.Array] = packed_attention
    constrain: Callable[..., jax.Array] = lambda x, *axes: x
    frozen_layers: int = 0

    def checkpointed(self, layer: Callable) -> Callable:
        """The scan body `layer` with the chosen rematerialization."""
        if self.remat == "none":
            return layer
        policies = jax.checkpoint_policies
        saved = {"minimal": policies.dots_with_no_batch_dims_saveable, "full": policies.nothing_saveable}
        # A scan body is not merged with its recomputation, so the barriers of prevent_cse would only cost time.
        return jax.checkpoint(layer, policy=saved[self.remat], prevent_cse=False)


def _initial(parameter: Parameter, shape: tuple[int, ...], config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Param:
    if parameter.initial == "ones":
        return nnx.Param(jnp.ones(shape))
    if parameter.initial == "zeros":
        return nnx.Param(jnp.zeros(shape))
    values = jax.random.normal(rngs.params(), shape)
    if parameter.initial == "table":
        return nnx.Param(values * 0.02)
    values = values * shape[0] ** -0.5
    return nnx.Param(values * (2 * config.layers) ** -0.5 if parameter.initial == "residual" else values)


class Block(nnx.Module):
    """One layer: pre-norm attention and a SwiGLU feed-forward network, each added to the residual stream.

    Its parameters are those of `layer_parameters`, as attributes. Matrices are [I, O].
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        for parameter in layer_parameters(config):
            setattr(self, parameter.name, _initial(parameter, parameter.shape(config), config, rngs))

    def __call__(self, x, cos, sin, segments, cached=(), attend=packed_attention, adapters=MappingProxyType({})):
        """x [B, T, D] -> (x [B, T, D], keys [B, K, T, E], values [B, K, T, E]).

        cos, sin: [B, T, E / 2]. segments: int32 [B, T]. cached: (keys [G, K, E, C], values [G, K, C, E], filled
        [G, C]) of each cache. attend: used without caches. adapters: {"a": [I, R], "b": [R, O]} by the name of a
        matrix; their product is added to it.
        """
        config = self.config

        def project(y, name):  # [B, T, I] -> [B, T, O]
            product = y @ getattr(self, name)[...].astype(y.dtype)
            if name not in adapters:
                return product
            return product + (y @ adapters[name]["a"].astype(y.dtype)) @ adapters[name]["b"].astype(y.dtype)

        def heads(y, name, count):  # [B, T, D] -> [B, count, T, E]
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
        mixed = mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1)  # [B, T, H * E]
        x = x + project(mixed, "output")
        y = rms_norm(x, self.ffn_norm[...], config.norm_epsilon)
        gated = jax.nn.silu(project(y, "gate")) * project(y, "up")  # [B, T, F]
        return x + project(gated, "down"), keys, values


class Transformer(nnx.Module):
    """The decoder: embedding [V, D], blocks, final norm [D], and unembedding [V, D] if it is not the embedding.

    Parameters of the blocks are stacked on a leading layer axis, [L, I, O], so that one compiled layer serves all.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _initial(EMBEDDING, EMBEDDING.shape(config), config, rngs)
        self.blocks = nnx.vmap(lambda keys: Block(config, rngs=keys), in_axes=0, out_axes=0)(rngs.split(config.layers))
        self.norm = _initial(NORM, NORM.shape(config), config, rngs)
        if not config.tie_embeddings:
            self.unembedding = _initial(UNEMBEDDING, UNEMBEDDING.shape(config), config, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        caches: Sequence[Cache] = (),
        *,
        dtype=jnp.float32,
        forward_options: ForwardOptions | None = None,
        adapters: Mapping[str, Mapping[str, jax.Array]] = MappingProxyType({}),
        branches: jax.Array | None = None,
    ) -> Output:
        """Hidden states of every token; the masks are those at the top of this file.

        Args:
            tokens, positions, segments: int32 [B, T].
            branches: int32 [B, T], see `packed_attention`, for passes without caches.
            caches: blocks of earlier tokens, each read by every token of its row: for example a prefix, and what was
                generated after it. They are not changed; `Cache.append` adds the returned keys and values.
            dtype: of the computation, where `forward_options` is not given.
            forward_options: for passes without caches.
            adapters: {"a": [L, I, R], "b": [L, R, O]} by the name of a matrix, for passes without caches.
        """
        forward_options = forward_options or ForwardOptions(dtype=dtype)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        # A look-up reads whole rows [D]. If D is split over devices, the table is gathered along D before it: otherwise
        # the partitioner would gather the looked-up activations.
        table = forward_options.constrain(self.embedding[...].astype(forward_options.dtype), "vocabulary", "hidden")
        x = table[tokens]
        graph, stacked = nnx.split(self.blocks)
        if not caches:
            if branches is not None:
                attend = functools.partial(forward_options.attend, branches=branches)
                forward_options = dataclasses.replace(forward_options, attend=attend)
            hidden = self._scan(x, cos, sin, segments, graph, (stacked, dict(adapters)), forward_options)
            return Output(rms_norm(hidden, self.norm[...], self.config.norm_epsilon), (), ())
        filled = [jnp.arange(cache.capacity) < cache.lengths[:, None] for cache in caches]
        keys, values = [], []
        # Unrolled: scanning over the layers would copy each layer's cache once per token.
        for index in range(self.config.layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], stacked))
            cached = [(c.keys[index], c.values[index], f) for c, f in zip(caches, filled, strict=True)]
            x, new_keys, new_values = block(x, cos, sin, segments, cached)
            keys.append(new_keys)
            values.append(new_values)
        return Output(rms_norm(x, self.norm[...], self.config.norm_epsilon), tuple(keys), tuple(values))

    @staticmethod
    def _scan(x, cos, sin, segments, graph, stacked, forward_options: ForwardOptions) -> jax.Array:
        """The layers without caches as a scan: x [B, T, D] -> [B, T, D]. stacked: (parameters, adapters), [L, ...]."""

        def layer(x, parameters_and_adapters):
            parameters, adapters = parameters_and_adapters
            block = nnx.merge(graph, parameters)
            x, _, _ = block(x, cos, sin, segments, attend=forward_options.attend, adapters=adapters)
            return forward_options.constrain(x, "batch", "length", "hidden"), None

        x = forward_options.constrain(x, "batch", "length", "hidden")
        if frozen := forward_options.frozen_layers:
            # A scan of their own: in one scan with the trained layers, their activations would be kept too.
            x, _ = jax.lax.scan(layer, x, jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf[:frozen], stacked)))
            stacked = jax.tree.map(lambda leaf: leaf[frozen:], stacked)
        x, _ = jax.lax.scan(forward_options.checkpointed(layer), x, stacked)
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits in float32: [..., D] -> [..., V]."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        return jnp.einsum("...d,vd->...v", hidden, table[...].astype(hidden.dtype), preferred_element_type=jnp.float32)


def head_outputs(hidden: jax.Array, weights: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Outputs of the head in float32 for hidden states [..., D]: [...] of one label, [..., 2] of two.

    weights, bias: [D] and [1] of one label, [D, 2] and [2] of two. See Head.
    """
    outputs = hidden.astype(jnp.float32) @ weights.astype(jnp.float32)
    if bias is None:
        return outputs
    return outputs + (bias[0] if weights.ndim == 1 else bias).astype(jnp.float32)


def values_of_outputs(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """Values [...] of `head_outputs`: of one label the output itself, of two the probability of label 1."""
    return outputs if weights.ndim == 1 else jax.nn.softmax(outputs, axis=-1)[..., 1]


def head_values(hidden: jax.Array, weights: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Values [...] in float32 of hidden states [..., D]; arguments as for `head_outputs`."""
    return values_of_outputs(head_outputs(hidden, weights, bias), weights)


class RewardModel(nnx.Module):
    """The decoder with a value head, whose output at the last token of an action is its promise (docs/method.md)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.transformer = Transformer(config, rngs=rngs)
        # Small but not zero: a zero head would pass no gradient to the transformer until it has moved.
        self.head = _initial(HEAD, head_shape(config), config, rngs)
        if config.head.bias:
            self.head_bias = _initial(HEAD_BIAS, HEAD_BIAS.shape(config), config, rngs)

    def value(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> values [...] in float32."""
        bias = self.head_bias[...] if self.transformer.config.head.bias else None
        return head_values(hidden, self.head[...], bias)

    def __call__(self, tokens, positions, segments, read_positions, *, dtype=jnp.float32) -> jax.Array:
        """Values [B, S] at `read_positions` [B, S] of packed rows: tokens, positions and segments [B, T]."""
        hidden = self.transformer(tokens, positions, segments, dtype=dtype).hidden
        return self.value(jnp.take_along_axis(hidden, read_positions[..., None], axis=1))


def reward_model_graph(config: TransformerConfig) -> nnx.GraphDef:
    """The static definition of a RewardModel, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0))))[0]


def transformer_graph(config: TransformerConfig) -> nnx.GraphDef:
    """The static definition of a Transformer, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
