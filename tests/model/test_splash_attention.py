"""The TPU's attention kernel, interpreted on the CPU, against the reference attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprm.model import attention, sharding
from jaxprm.model.attention import packed_attention

ROWS, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 4, 2, 256, 64


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    arrays = [jax.random.normal(key, (ROWS, count, LENGTH, HEAD_DIM)) for key, count in zip(keys, heads, strict=True)]
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, :200] = np.repeat([1, 2, 3], [70, 3, 127])  # and padding
    segments[1] = np.repeat([1, 2], [128, 128])
    return *arrays, jnp.asarray(segments)


@pytest.mark.slow
def test_the_kernel_equals_the_reference_in_values_and_gradients():
    from jaxprm import config as config_lib

    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    rules = {name: getattr(sharding.RULES, name) for name in ("batch", "heads", "kv_heads", "length")}
    kernel = attention.splash_attention(mesh, **rules, interpret=True)
    *arrays, segments = inputs()
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape) * (segments > 0)[:, None, :, None]

    def with_gradients(attend):
        def total(*arrays):
            mixed = attend(*arrays, segments)
            return (mixed * weights).sum(), mixed

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)

    ((_, values), kernel_gradients) = with_gradients(kernel)
    ((_, expected), gradients) = with_gradients(packed_attention)
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(np.moveaxis(values, 2, 1)[real], np.moveaxis(expected, 2, 1)[real], rtol=1e-4, atol=1e-5)
    for gradient, reference in zip(kernel_gradients, gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "length, head_dim, shards, expected",
    [(256, 64, 1, True), (256, 128, 2, True), (192, 64, 1, False), (256, 64, 4, False), (256, 80, 1, False)],
)
def test_supported_shapes_of_the_kernel(length, head_dim, shards, expected):
    assert attention.fits(length, head_dim, shards) is expected
