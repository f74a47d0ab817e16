"""Attention in blocks and in tiles equals attention at once; tiles are used on CPUs only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprm.model import attention
from jaxprm.model.attention import chunk_mask, packed_attention, tiled_attention

PACKED_IN_TILES = functools.partial(packed_attention, block=tiled_attention)
ROWS, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 4, 2, 149, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE_SCORES", 1)
    monkeypatch.setattr(attention, "MIN_TILE", 16)
    jax.clear_caches()  # programs traced with other tile sizes
    yield
    jax.clear_caches()


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def chunk(dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """Query, keys, values and segments, padding among them."""
    segments = np.sort(np.random.default_rng(9).integers(0, 4, (ROWS, LENGTH)))
    query = normal(0, ROWS, HEADS, LENGTH, HEAD_DIM)
    keys, values = (normal(seed, ROWS, KV_HEADS, LENGTH, HEAD_DIM) for seed in (1, 2))
    return *(x.astype(dtype) for x in (query, keys, values)), jnp.asarray(segments, jnp.int32)


def all_at_once(query, keys, values, segments):
    return attention.attention(query, keys, values, chunk_mask(segments))


def gradients(attend, query, keys, values, segments):
    weights = normal(3, *query.shape)
    loss = lambda *arrays: jnp.sum(attend(*arrays, segments).astype(jnp.float32) * weights)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, keys, values)


def test_packed_attention_and_its_gradients_equal_those_of_the_formula():
    inputs = chunk()
    np.testing.assert_allclose(packed_attention(*inputs), all_at_once(*inputs), atol=1e-6)
    for gradient, expected in zip(
        *(jax.tree.leaves(gradients(attend, *inputs)) for attend in (packed_attention, all_at_once)),
        strict=True,
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_gradients_keep_the_dtype_and_stay_close():
    inputs = chunk(jnp.bfloat16)
    (_, actual), (_, expected) = (gradients(attend, *inputs) for attend in (packed_attention, all_at_once))
    for gradient, reference in zip(actual, expected, strict=True):
        assert gradient.dtype == reference.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient - reference, np.float32))
        error /= np.linalg.norm(np.asarray(reference, np.float32))
        assert error < 0.02


def test_packed_attention_in_tiles_equals_all_at_once():
    inputs = chunk()
    np.testing.assert_allclose(PACKED_IN_TILES(*inputs), all_at_once(*inputs), atol=1e-6)


@pytest.mark.parametrize("shared", [1, 2])
def test_tiles_after_a_cache_equal_all_at_once(shared):
    cached_tokens, (query, keys, values, segments) = 11, chunk()
    cache = (
        normal(4, ROWS // shared, KV_HEADS, HEAD_DIM, cached_tokens),
        normal(5, ROWS // shared, KV_HEADS, cached_tokens, HEAD_DIM),
        jnp.arange(cached_tokens) < jnp.asarray([[5], [cached_tokens]])[: ROWS // shared],
    )
    inputs = query, keys, values, chunk_mask(segments), (cache,)
    np.testing.assert_allclose(tiled_attention(*inputs), attention.attention(*inputs), atol=1e-6)


def test_only_cpus_use_tiles():
    query, keys, values, segments = chunk()
    for attend, last in ((tiled_attention, chunk_mask(segments)), (PACKED_IN_TILES, segments)):
        traced = jax.jit(attend).trace(query, keys, values, last)
        texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
        assert {name: "stablehlo.while" in text for name, text in texts.items()} == {"cpu": True, "tpu": False}
