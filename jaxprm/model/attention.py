"""Grouped-query attention within packed rows and after cached prefixes, in plain JAX, on every platform.

Letters: B batch, T queries, S keys, C cached tokens, H heads, K kv heads, E head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Blocks of queries: large enough for a good matrix product, few enough for a quick compilation.
MIN_QUERY_BLOCK, MAX_QUERY_BLOCKS = 64, 8
# On a CPU: scores computed at once, and the fewest queries of a row that make a product worth its call.
TILE_SCORES, MIN_TILE = 1 << 20, 64


def chunk_mask(segments: jax.Array) -> jax.Array:
    """[B, T, T]: a token reads itself and earlier tokens of its own segment. Segment 0 is padding."""
    length = segments.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def attention(query, keys, values, mask, cached=()) -> jax.Array:
    """Grouped-query attention over cached tokens and a chunk.

    query [B, H, T, E]; keys, values [B, K, S, E]; mask [B, T, S];
    cached: blocks of (keys [G, K, E, C], values [G, K, C, E], filled bool [G, C]), where a cached row serves B / G
    consecutive rows of the chunk and is read once for all of them. Returns [B, H, T, E].
    Blocks keep their places: no cache is copied.
    """
    batch, heads, length, head_dim = query_shape = query.shape
    kv_heads = keys.shape[1]
    query = query.reshape(batch, kv_heads, heads // kv_heads * length, head_dim) * (head_dim**-0.5)

    def gather(x, rows):  # [B, K, X, .] -> [G, K, B / G * X, .]
        if rows == batch:
            return x
        return x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2).reshape(rows, kv_heads, -1, x.shape[-1])

    def spread(x):  # and back
        if len(x) == batch:
            return x
        x = x.reshape(len(x), kv_heads, batch // len(x), -1, x.shape[-1])
        return x.swapaxes(1, 2).reshape(batch, kv_heads, -1, x.shape[-1])

    def scores_against(these, allowed):
        scores = jnp.einsum("gkxe,gkes->gkxs", gather(query, len(these)), these, preferred_element_type=jnp.float32)
        if allowed.ndim == 2:
            return jnp.where(allowed[:, None, None], scores, -1e30)
        whole = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        return jnp.where(allowed[:, None, None], whole, -1e30).reshape(scores.shape)

    blocks = [*(block for block in cached if block[1].shape[2]), (keys.swapaxes(2, 3), values, mask)]
    scores = [scores_against(these, allowed) for these, _, allowed in blocks]
    # One softmax over all blocks, each in its place: joining them would copy the scores.
    peaks = [spread(block.max(axis=-1, keepdims=True)) for block in scores]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    weights = [jnp.exp(block - gather(peak, len(block))) for block in scores]
    total = sum(spread(block.sum(axis=-1, keepdims=True)) for block in weights)
    mixed = sum(
        spread(block.astype(those.dtype) @ those) for block, (_, those, _) in zip(weights, blocks, strict=True)
    )
    return (mixed / total).astype(values.dtype).reshape(query_shape)


def tiled_attention(query, keys, values, mask, cached=()) -> jax.Array:
    """`attention`, on a CPU in tiles of queries whose scores stay in its caches.

    For forward passes: what a backward pass would keep of every tile costs more than the tiles save.
    """
    given = (query, keys, values, mask, tuple(cached))
    size = _tile(*query.shape[:2], keys.shape[2] + sum(block[1].shape[2] for block in cached))
    if size >= query.shape[2]:
        return attention(*given)

    def tiles(query, keys, values, mask, cached):
        mixed = jax.lax.map(
            lambda tile: attention(tile[0], keys, values, tile[1], cached), (_cut(query, 2, size), _cut(mask, 1, size))
        )
        return _join(mixed, 2, query.shape[2])

    return jax.lax.platform_dependent(*given, cpu=tiles, default=attention)


def packed_attention(query, keys, values, segments, *, block=jax.checkpoint(attention)) -> jax.Array:
    """`attention` within a chunk, without caches: shapes as there, segments [B, T].

    A block of queries reads only the keys up to its own end, so no [T, T] array exists and almost half of the products
    are never made; the backward pass makes a block's weights again instead of keeping them.
    """
    length = query.shape[2]
    size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    mixed = []
    for start in range(0, length, size):
        end = min(start + size, length)
        mask = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        mask &= segments[:, start:end, None] == segments[:, None, :end]
        mixed.append(block(query[:, :, start:end], keys[:, :, :end], values[:, :, :end], mask))
    return jnp.concatenate(mixed, axis=2)


def _tile(batch: int, heads: int, read: int) -> int:
    """Queries of a row whose scores are about TILE_SCORES in number."""
    return max(MIN_TILE, TILE_SCORES // (batch * heads * read) // MIN_TILE * MIN_TILE)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Tiles of `size` along an axis, on a new first one; the last is filled with zeros."""
    count = -(-x.shape[axis] // size)
    room = count * size - x.shape[axis]
    x = jnp.pad(x, [(0, room if at == axis else 0) for at in range(x.ndim)]) if room else x
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(tiles: jax.Array, axis: int, length: int) -> jax.Array:
    """What was cut, without what the last tile was filled with."""
    whole = jnp.moveaxis(tiles, 0, axis)
    whole = whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis)
