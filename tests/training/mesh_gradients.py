"""Gradients and updates on meshes of eight virtual devices, compared with one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python mesh_gradients.py SHARDS BASE

Prints {"DATAxFSDP": {"gradient", "update", "split"}}: differences by norm, relative, and parameters that are split.
"""

import json
import sys
from pathlib import Path

import jax
import optax
from flax import nnx

from data_pipeline.batches import training_batches
from jaxprm import config as config_lib
from jaxprm.model import huggingface
from jaxprm.training import reward_model, sharding
from jaxprm.training.optimizer import adamw
from jaxprm.training.step import initial_state, make_train_step, reward_loss

MESHES = ((1, 1), (8, 1), (2, 4), (4, 2))
STEPS = 20
SETTINGS = config_lib.RewardModel(label="mesh", bootstrap="state", target_update="ema")
OPTIMIZER = adamw(learning_rate=1e-3, steps=STEPS, warmup_steps=2, weight_decay=0.01, clip=1.0)


def run(data: int, fsdp: int, graph, parameters, batches) -> tuple[dict, dict, int]:
    """(gradients of the first batch, parameters after all batches) on the host, and how many parameters are split."""
    mesh = sharding.make_mesh(config_lib.Mesh(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])

    def init(parameters):
        return initial_state(parameters, OPTIMIZER, SETTINGS)

    placed = jax.tree.map(lambda leaf: leaf.sharding, sharding.place(mesh, jax.eval_shape(init, parameters)))
    state = jax.jit(init, out_shardings=placed)(jax.device_put(parameters, placed["parameters"]))

    def gradients_of(parameters, batch):
        return jax.grad(lambda p: reward_loss(graph, p, None, batch, SETTINGS)[0])(parameters)

    gradients = jax.jit(gradients_of, out_shardings=placed["parameters"])(
        state["parameters"], sharding.put_batch(batches[0], mesh)
    )
    step = jax.jit(make_train_step(graph, OPTIMIZER, SETTINGS), donate_argnums=0, out_shardings=(placed, None))
    for batch in batches:
        state, _ = step(state, sharding.put_batch(batch, mesh))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state["parameters"]))
    return jax.device_get(gradients), jax.device_get(state["parameters"]), split


def difference(found, expected, scale) -> float:
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, found, expected)) / optax.tree.norm(scale))


def main() -> None:
    shards, base = map(Path, sys.argv[1:])
    config, parameters = reward_model.from_policy(base, 0)
    head = jax.random.normal(jax.random.key(1), (config.hidden_size,)) * config.hidden_size**-0.5
    parameters = jax.device_get(nnx.State(dict(parameters.items()) | {"head": nnx.Param(head)}))
    graph = huggingface.reward_model_graph(config)
    stream = training_batches(shards, rows=8, length=128, steps_per_row=32, epochs=2, seed=0)
    batches = [next(stream) for _ in range(STEPS)]
    results = {mesh: run(*mesh, graph, parameters, batches) for mesh in MESHES}
    gradients, final, _ = results[1, 1]
    moved = jax.tree.map(lambda a, b: a - b, final, parameters)
    report = {
        f"{data}x{fsdp}": {
            "gradient": difference(found[0], gradients, gradients),
            "parameters": difference(found[1], final, final),
            "update": difference(found[1], final, moved),
            "split": found[2],
        }
        for (data, fsdp), found in results.items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
