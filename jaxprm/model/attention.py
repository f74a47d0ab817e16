"""Grouped-query attention in packed rows and after cached prefixes: plain JAX, or the splash kernel on TPUs.

Letters: B batch, T tokens of a chunk, S tokens that are read, C cached tokens, G cached rows, H heads, K kv heads,
E head dim. The H / K query heads of a kv head are next to each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Blocks of queries in `packed_attention`: large enough for efficient matrix products, few enough to compile quickly.
MIN_QUERY_BLOCK, MAX_QUERY_BLOCKS = 64, 8
# Tiles of queries on a CPU: scores computed at once (4 MB in float32), and the fewest queries of an efficient product.
TILE_SCORES, MIN_TILE = 1 << 20, 64
# The splash kernel: block sizes, of which the largest that divides the tokens of a row on one device is used, and the
# divisor that it requires of the head dim.
BLOCKS = (512, 256, 128)
HEAD_DIM_DIVISOR = 64

MeshAxes = tuple[str, ...]


def chunk_mask(segments: jax.Array) -> jax.Array:
    """Mask [B, T, T] of segments [B, T]: a token reads itself and earlier tokens of its segment.

    Segment 0 is padding, which reads padding: no row of the mask is empty, so no softmax divides by zero.
    """
    length = segments.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def attention(query, keys, values, mask, cached=()) -> jax.Array:
    """Grouped-query attention over cached tokens and a chunk; returns [B, H, T, E].

    query: [B, H, T, E]. keys, values: [B, K, S, E]. mask: bool [B, T, S].
    cached: blocks of (keys [G, K, E, C], values [G, K, C, E], filled bool [G, C]). A cached row serves B / G
    consecutive rows of the chunk.
    """
    batch, heads, length, head_dim = query_shape = query.shape
    kv_heads = keys.shape[1]
    # All queries that read one kv head, and with `gather` one cached row, become rows of a single matrix product: keys
    # and values are never repeated, and a shared cache is read once.
    query = query.reshape(batch, kv_heads, heads // kv_heads * length, head_dim) * (head_dim**-0.5)

    def gather(x, rows):  # [B, K, X, .] -> [G, K, B / G * X, .]
        if rows == batch:
            return x
        return x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2).reshape(rows, kv_heads, -1, x.shape[-1])

    def spread(x):  # [G, K, B / G * X, .] -> [B, K, X, .]
        if len(x) == batch:
            return x
        x = x.reshape(len(x), kv_heads, batch // len(x), -1, x.shape[-1])
        return x.swapaxes(1, 2).reshape(batch, kv_heads, -1, x.shape[-1])

    def masked_scores(keys, readable):
        scores = jnp.einsum("gkxe,gkes->gkxs", gather(query, len(keys)), keys, preferred_element_type=jnp.float32)
        if readable.ndim == 2:  # cached tokens [G, C]: the same for every query
            return jnp.where(readable[:, None, None], scores, -1e30)
        per_head = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        return jnp.where(readable[:, None, None], per_head, -1e30).reshape(scores.shape)

    blocks = [*(block for block in cached if block[1].shape[2]), (keys.swapaxes(2, 3), values, mask)]
    scores = [masked_scores(keys, readable) for keys, _, readable in blocks]
    # One softmax over all blocks without concatenating them: that would copy the caches or their scores.
    peaks = [spread(block.max(axis=-1, keepdims=True)) for block in scores]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    weights = [jnp.exp(block - gather(peak, len(block))) for block in scores]
    total = sum(spread(block.sum(axis=-1, keepdims=True)) for block in weights)
    mixed = sum(
        spread(block.astype(values.dtype) @ values) for block, (_, values, _) in zip(weights, blocks, strict=True)
    )
    return (mixed / total).astype(values.dtype).reshape(query_shape)


def tiled_attention(query, keys, values, mask, cached=()) -> jax.Array:
    """`attention`, on a CPU in tiles of queries whose scores fit its cache. Shapes as in `attention`.

    For forward passes only: what a backward pass would keep of every tile costs more than the tiles save.
    """
    arguments = (query, keys, values, mask, tuple(cached))
    size = _tile(*query.shape[:2], keys.shape[2] + sum(block[1].shape[2] for block in cached))
    if size >= query.shape[2]:
        return attention(*arguments)

    def tiles(query, keys, values, mask, cached):
        mixed = jax.lax.map(
            lambda tile: attention(tile[0], keys, values, tile[1], cached), (_cut(query, 2, size), _cut(mask, 1, size))
        )
        return _join(mixed, 2, query.shape[2])

    return jax.lax.platform_dependent(*arguments, cpu=tiles, default=attention)


def packed_attention(query, keys, values, segments, branches=None, *, block=jax.checkpoint(attention)) -> jax.Array:
    """`attention` within packed rows, without caches: query [B, H, T, E]; keys, values [B, K, T, E]; segments [B, T].

    branches: int32 [B, T], or None without branches. Tokens of branch 0 are read by all later ones of their segment;
    those of another branch, which continues the tokens of branch 0, only by their own branch.
    block: attention of one block of queries, by default recomputed in the backward pass.
    """
    # A block of queries reads only the keys up to its own end: no [T, T] array exists, and almost half of the products
    # are skipped. Its weights are computed again in the backward pass instead of being kept.
    length = query.shape[2]
    size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    mixed = []
    for start in range(0, length, size):
        end = min(start + size, length)
        mask = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        mask &= segments[:, start:end, None] == segments[:, None, :end]
        if branches is not None:
            read = branches[:, None, :end]
            mask &= (read == 0) | (read == branches[:, start:end, None])
        mixed.append(block(query[:, :, start:end], keys[:, :, :end], values[:, :, :end], mask))
    return jnp.concatenate(mixed, axis=2)


def _tile(batch: int, heads: int, read: int) -> int:
    """Queries per tile, so that a tile has about TILE_SCORES scores. read: keys per query."""
    return max(MIN_TILE, TILE_SCORES // (batch * heads * read) // MIN_TILE * MIN_TILE)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Tiles of `size` along an axis, stacked on a new first axis; the last tile is padded with zeros."""
    count = -(-x.shape[axis] // size)
    padding = count * size - x.shape[axis]
    x = jnp.pad(x, [(0, padding if at == axis else 0) for at in range(x.ndim)]) if padding else x
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(tiles: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_cut`: the tiles along an axis, without the padding beyond `length`."""
    x = jnp.moveaxis(tiles, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def fits(length: int, head_dim: int, sequence_shards: int = 1) -> bool:
    """Whether the splash kernel supports rows of `length` tokens that are split over `sequence_shards` devices."""
    return length % (BLOCKS[-1] * sequence_shards) == 0 and head_dim % HEAD_DIM_DIVISOR == 0


def splash_attention(
    mesh: Mesh,
    *,
    batch: MeshAxes,
    heads: MeshAxes,
    kv_heads: MeshAxes,
    length: MeshAxes,
    most_branches: int = 2,
    interpret: bool = False,
) -> Callable[..., jax.Array]:
    """The splash kernel as a function of (query, keys, values, segments, branches), like `packed_attention`.

    The kernel masks by equal segments only, so rows with branches are computed once for each branch.

    Args:
        batch, heads, kv_heads, length: mesh axes that these axes of the arrays are split over. If tokens are split,
            every device has its part of the queries and all keys.
        most_branches: the highest branch, where rows have branches.
        interpret: runs the kernel in Pallas' interpreter, on any platform and slowly.
    """

    def shards(axes: MeshAxes) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    def attend(
        query: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array, branches: jax.Array | None = None
    ) -> jax.Array:
        if branches is None:
            return attend_segments(query, keys, values, segments)

        def attend_branch(branch: int) -> jax.Array:
            # The other branches get a segment of their own, which no token reads whose result is used.
            readable = (branches == 0) | (branches == branch)
            return attend_segments(query, keys, values, jnp.where(readable, segments, -segments))

        mixed = attend_branch(1)
        for branch in range(2, most_branches + 1):
            mixed = jnp.where((branches == branch)[:, None, :, None], attend_branch(branch), mixed)
        return mixed

    def attend_segments(query: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
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
            # The kernel has no batch axis, and does not scale the scores.
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
