"""Splash attention, the TPU kernel, in the place of `packed_attention`: no scores are ever in memory, nor blocks above
the diagonal computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
                queries, cached, cached, spec(batch, length), spec(batch),
            ),
            out_specs=queries,
            check_vma=False,
        )  # fmt: skip
        return mapped(kernel, query, keys, values, segments, segments)

    return attend
