"""Gradients and updates on meshes of eight virtual devices, compared with one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python mesh_gradients.py SHARDS

Prints {"DATAxFSDPxTENSORxSEQUENCE": {"gradient", "parameters", "split"}}: differences by norm, relative, and how many
parameters are split. One mesh computes in microbatches and rematerialises: that changes no gradient either. Then
{"restored", "fingerprints", "split"} of a checkpoint that another mesh wrote, and {"splash", "branches"}: differences
of the TPU's attention, interpreted on a mesh, from the reference, the second with branches. The last line has those of
the gradients of step labels mixed into AgentPRM, and of pairs, on a mesh.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from flax import nnx

from data_pipeline.batches import training_batches
from jaxprm import config as config_lib
from jaxprm.artifacts.checkpoints import Checkpoints, inspect
from jaxprm.model import sharding
from jaxprm.model.attention import packed_attention, splash_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import ForwardOptions, RewardModel, reward_model_graph
from jaxprm.training.optimizer import make_optimizer
from jaxprm.training.step import (
    FIELDS,
    LABEL_FIELDS,
    PAIR_FIELDS,
    initial_state,
    loss_and_gradients,
    make_train_step,
)
from tests.training.supervised_records import batch_of, pair, walk

SIZES = TransformerConfig(
    vocab_size=300, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=64
)
GRAPH = reward_model_graph(SIZES)
MESHES = ((1, 1, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2))
IN_PARTS = (2, 2, 2, 1)
STEPS = 20
SETTINGS = config_lib.RewardModelConfig(label="mesh", bootstrap="state", target_update="ema")
OPTIMIZER = make_optimizer(learning_rate=1e-3, steps=STEPS, warmup_steps=2, weight_decay=0.01, clip=1.0)


def run(sizes: tuple[int, ...], parameters, batches) -> tuple[dict, dict, int]:
    """(gradients of the first batch, parameters after all batches) on the host, and how many parameters are split."""
    named = dict(zip(sharding.AXES, sizes, strict=True))
    mesh = sharding.make_mesh(config_lib.MeshConfig(**named), jax.devices()[: math.prod(sizes)])
    parts = sizes == IN_PARTS
    settings = msgspec.structs.replace(SETTINGS, microbatches=2 if parts else 1)
    sharding.check_rows(mesh, 8, 128, settings.microbatches)
    sharding.check_model(mesh, SIZES)
    forward_options = ForwardOptions(remat="full" if parts else "none", constrain=sharding.constraints(mesh))

    def init(parameters):
        return initial_state(parameters, OPTIMIZER, settings)

    placed = jax.tree.map(lambda leaf: leaf.sharding, sharding.with_shardings(mesh, jax.eval_shape(init, parameters)))
    state = jax.jit(init, out_shardings=placed)(jax.device_put(parameters, placed["parameters"]))

    def gradients_of(parameters, batch):
        return loss_and_gradients(GRAPH, parameters, None, batch, settings, forward_options)[2]

    gradients = jax.jit(gradients_of, out_shardings=placed["parameters"])(
        state["parameters"], sharding.put_batch(batches[0], mesh, FIELDS)
    )
    step = jax.jit(
        make_train_step(GRAPH, OPTIMIZER, settings, forward_options), donate_argnums=0, out_shardings=(placed, None)
    )
    for batch in batches:
        state, _ = step(state, sharding.put_batch(batch, mesh, FIELDS))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state["parameters"]))
    return jax.device_get(gradients), jax.device_get(state["parameters"]), split


def restored(parameters) -> dict:
    """Saves a state on one mesh, restores and saves it on another, and compares the two checkpoints."""
    folder = Path(tempfile.mkdtemp())
    saved = []
    for sizes in ((2, 2, 2, 1), (1, 8, 1, 1)):
        mesh = sharding.make_mesh(config_lib.MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))
        shapes = sharding.with_shardings(
            mesh, jax.eval_shape(lambda p: initial_state(p, OPTIMIZER, SETTINGS), parameters)
        )
        if not saved:
            init = jax.jit(lambda p: initial_state(p, OPTIMIZER, SETTINGS), out_shardings=sharding.shardings(shapes))
            state = init(parameters)
        else:
            checkpoints = Checkpoints(folder / "0", {})
            step, state, position = checkpoints.restore(shapes)
            checkpoints.close()
            assert (step, position) == (5, {"batches": 5})
            assert jax.tree.all(jax.tree.map(lambda leaf, shape: leaf.sharding == shape.sharding, state, shapes))
        checkpoints = Checkpoints(folder / str(len(saved)), {})
        checkpoints.save(5, state, {"batches": 5})
        checkpoints.close()
        saved.append((jax.device_get(state), inspect(folder / str(len(saved)))))
    (first, inspection), (second, later_inspection) = saved
    same = jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, second))
    inspections = (inspection, later_inspection)
    splits = [result["shardings"]["parameters/transformer/blocks/query/value"]["split"] for result in inspections]
    return {
        "restored": same,
        "fingerprints": inspection["fingerprints"] == later_inspection["fingerprints"],
        "split": splits,
    }


def splash_difference(branches=None) -> float:
    mesh = sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=2, tensor=2, sequence=2))
    rules = {name: getattr(sharding.RULES, name) for name in ("batch", "heads", "kv_heads", "length")}
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (2, count, 256, 64)) for key, count in zip(keys, (4, 2, 2), strict=True)]
    segments = jnp.asarray(np.repeat([[1, 2, 3], [1, 2, 4]], [100, 60, 96], axis=1), jnp.int32)
    splash = jax.jit(splash_attention(mesh, **rules, interpret=True))(*arrays, segments, branches)
    return float(np.abs(splash - jax.jit(packed_attention)(*arrays, segments, branches)).max())


def supervised_difference(objective: str) -> float:
    """Difference of the gradients on a mesh from those on one device."""
    if objective == "preference":
        records, fields = [pair(seed, 9 + 3 * seed, (4, 5)) for seed in range(1, 5)], FIELDS + PAIR_FIELDS
        settings = config_lib.RewardModelConfig(label="mesh", objective=objective)
    else:
        records = [walk(seed, [1, np.nan, 0], outcome=seed % 2) for seed in range(1, 5)]
        fields = FIELDS + LABEL_FIELDS
        settings = msgspec.structs.replace(SETTINGS, labels=config_lib.LabelsConfig(loss="mse", weight=0.5))
    batch, parameters, gradients = batch_of(records, rows=4, length=64), spread_model(), []
    for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)):
        named = dict(zip(sharding.AXES, sizes, strict=True))
        mesh = sharding.make_mesh(config_lib.MeshConfig(**named), jax.devices()[: math.prod(sizes)])
        options = ForwardOptions(constrain=sharding.constraints(mesh))
        shapes = jax.eval_shape(lambda p: p, parameters)
        placed = jax.tree.map(lambda leaf: leaf.sharding, sharding.with_shardings(mesh, shapes))
        compute = jax.jit(
            lambda p, batch, options=options: loss_and_gradients(GRAPH, p, None, batch, settings, options)[2],
            out_shardings=placed,
        )
        put = sharding.put_batch(batch, mesh, fields)
        gradients.append(jax.device_get(compute(jax.device_put(parameters, placed), put)))
    return difference(gradients[1], gradients[0])


def difference(actual, expected) -> float:
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, actual, expected)) / optax.tree.norm(expected))


def spread_model():
    """A random model whose values spread: an embedding of unit scale and a head that reads it."""
    state = jax.jit(lambda: nnx.state(RewardModel(SIZES, rngs=nnx.Rngs(0))))()
    state["transformer"]["embedding"] = nnx.Param(state["transformer"]["embedding"][...] * 50)
    state["head"] = nnx.Param(jax.random.normal(jax.random.key(1), (SIZES.hidden_size,)) * SIZES.hidden_size**-0.5)
    return jax.device_get(jax.tree.map(jnp.asarray, state))


def main() -> None:
    stream = training_batches(Path(sys.argv[1]), rows=8, length=128, steps_per_row=32, epochs=2, seed=0)
    batches = [next(stream) for _ in range(STEPS)]
    results = {mesh: run(mesh, spread_model(), batches) for mesh in MESHES}
    gradients, final, _ = results[MESHES[0]]
    report = {
        "x".join(map(str, mesh)): {
            "gradient": difference(result[0], gradients),
            "parameters": difference(result[1], final),
            "split": result[2],
        }
        for mesh, result in results.items()
    }
    print(json.dumps(report))
    print(json.dumps(restored(spread_model())))
    branches = jnp.asarray(np.repeat([[0, 1, 2, 0, 1, 2]], [50, 30, 20, 90, 40, 26], axis=1).repeat(2, 0), jnp.int32)
    print(json.dumps({"splash": splash_difference(), "branches": splash_difference(branches)}))
    print(json.dumps({name: supervised_difference(name) for name in ("labels", "preference")}))


if __name__ == "__main__":
    main()
