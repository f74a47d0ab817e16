"""Grouped-query attention in packed rows and after cached prefixes: plain JAX, or the splash kernel on TPUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    mixed = sum(spread(block.astype(those.dtype) @ those) for block, (_, those, _) in zip(weights, blocks, strict=True))
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


# Tokens of a row on one device come in multiples of these; the largest that fits is used.
BLOCKS = (512, 256, 128)
HEAD_DIMS = 64  # and its multiples

MeshAxes = tuple[str, ...]


def fits(length: int, head_dim: int, sequence_shards: int = 1) -> bool:
    """Whether the kernel takes rows of `length` tokens, split over so many devices."""
    return length % (BLOCKS[-1] * sequence_shards) == 0 and head_dim % HEAD_DIMS == 0


def splash_attention(
    mesh: Mesh, *, batch: MeshAxes, heads: MeshAxes, kv_heads: MeshAxes, length: MeshAxes, interpret: bool = False
) -> Callable[..., jax.Array]:
    """An attention over (query, keys, values, segments), shapes and result as `packed_attention`'s.

    Args:
        batch, heads, kv_heads, length: mesh axes that these axes of the arrays are split over. Where tokens are split,
            every device has its own queries and all keys.
        interpret: runs the kernel's own program on any platform, slowly.
    """

    def shards(axes: MeshAxes) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    def attend(query: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
        _, count, tokens, head_dim = query.shape
        size = next(block for block in BLOCKS if tokens // shards(length) % block == 0)
        names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * count),
            block_sizes=kernels.BlockSizes(**dict.fromkeys(names, size)),
            head_shards=shards(heads),
            q_seq_shards=shards(length),
            interpret=interpret,
        )

        def local(kernel, query, keys, values, query_segments, key_segments):
            ids = kernels.SegmentIds(query_segments, key_segments)
            return jax.vmap(kernel)(query * head_dim**-0.5, keys, values, ids)

        spec = PartitionSpec
        queries, cached = spec(batch, heads, length), spec(batch, kv_heads)
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                kernel.manual_sharding_spec(NamedSharding(mesh, spec(heads, length))),
                queries,
                cached,
                cached,
                spec(batch, length),
                spec(batch),
            ),
            out_specs=queries,
            check_vma=False,
        )
        return mapped(kernel, query, keys, values, segments, segments)

    return attend
