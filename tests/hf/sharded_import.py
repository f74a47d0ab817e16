"""Loads a model in many layouts; run by test_sharded_import.py in a process with eight virtual devices.

python sharded_import.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxprm import config as config_lib
from jaxprm.hf import reader
from jaxprm.model import sharding

# Specs of stacked matrices [L, I, O]: replicated, split along each axis, along two, and over both mesh axes at once.
LAYOUTS = [
    (),
    ("fsdp",),
    (None, "fsdp"),
    (None, None, "fsdp"),
    ("data", "fsdp"),
    ("data", None, "fsdp"),
    (None, "fsdp", "data"),
    (None, ("data", "fsdp")),
    (None, None, ("fsdp", "data")),
    (("data", "fsdp"), None),
]


def fits(shape: tuple[int, ...], spec: tuple, mesh) -> bool:
    axes = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in spec]
    return len(axes) <= len(shape) and all(
        size % int(np.prod([mesh.shape[name] for name in names], dtype=int)) == 0
        for size, names in zip(shape, axes, strict=False)
    )


def main(directory: Path) -> None:
    assert jax.device_count() == 8
    checked = 0
    for load, dtype in ((reader.load_transformer, jnp.bfloat16), (reader.load_reward_model, jnp.float32)):
        reward = load is reader.load_reward_model
        model_dir = directory / ("reward" if reward else "causal")
        config, replicated = load(model_dir, dtype=dtype)
        shapes = reader.abstract(config, reward=reward, dtype=dtype)
        for data, layout in [*((2, layout) for layout in LAYOUTS), *((1, layout) for layout in LAYOUTS[:4])]:
            mesh = sharding.make_mesh(config_lib.MeshConfig(data=data, fsdp=8 // data))

            def sharding_of(leaf, mesh=mesh, layout=layout):
                return NamedSharding(mesh, PartitionSpec(*(layout if fits(leaf.shape, layout, mesh) else ())))

            shardings = jax.tree.map(sharding_of, shapes)
            _, split = load(model_dir, dtype=dtype, shardings=shardings)
            assert jax.tree.structure(split) == jax.tree.structure(replicated)
            for ours, theirs, expected in zip(*map(jax.tree.leaves, (split, replicated, shardings)), strict=True):
                assert ours.sharding == expected, (ours.sharding, expected)
                assert ours.dtype == theirs.dtype == dtype
                np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
                checked += expected.spec != PartitionSpec()
        # As training shardings them, and in a computation with them.
        mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, fsdp=4))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, sharding.with_shardings(mesh, shapes))
        _, split = load(model_dir, dtype=dtype, shardings=shardings)
        total = jax.jit(lambda state: sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(state)))
        np.testing.assert_allclose(total(split), total(replicated), rtol=1e-3)
    assert checked > 80
    print(f"{checked} parameters in layouts that split them; {len(nnx.to_flat_state(replicated))} in a model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
