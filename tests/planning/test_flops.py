"""The formula against a count of every matrix product in the program that JAX traces."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxprm import config as config_lib
from jaxprm.model import sharding
from jaxprm.planning.models import MODELS
from jaxprm.training.flops import attended_pairs, train_step_flops
from jaxprm.training.programs import batch_fields, batch_shapes, make_programs
from jaxprm.training.reward_model import from_policy_config
from tests.planning.fakes import TINY

LENGTHS = {"one block": 64, "three blocks": 160}
SETTINGS = {
    "full": {},
    "minimal": {"remat": "minimal"},
    "remat": {"remat": "full"},
    "states and target": {"bootstrap": "state", "target_update": "ema"},
    "microbatches": {"microbatches": 2},
    "lora": {"trainable": "lora", "lora": config_lib.LoraConfig(rank=4, targets=("query", "down"))},
    "lora and remat": {
        "trainable": "lora",
        "lora": config_lib.LoraConfig(rank=4, targets=("value", "up")),
        "remat": "full",
    },
    "last": {"trainable": "last_k", "last_k": 2, "remat": "minimal"},
    "head": {"trainable": "head"},
    "pairs": {"objective": "preference"},
    "labels": {"labels": config_lib.LabelsConfig(weight=0.5)},
}


def products(jaxpr) -> int:
    """FLOPs of every dot_general; those in a loop count as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values()))]
        total += times * sum(products(part) for part in inner if hasattr(part, "eqns"))
    return total


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_the_formula_counts_every_traced_product(changes, length):
    settings = config_lib.RewardModelConfig(label="x", **changes)
    data = config_lib.DataConfig(rows=2, length=length, steps_per_row=5)
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    config = from_policy_config(TINY, settings)
    programs = make_programs(settings, config, mesh, length=length, steps=10, seed=0)
    batch = batch_shapes(batch_fields(settings), data, config, mesh)
    traced = jax.make_jaxpr(programs.train_step)(programs.state, batch, programs.frozen)
    assert train_step_flops(config, settings, data, "reference").computed == products(traced.jaxpr)


def test_the_counter_counts_loops():
    def twice(x):
        return jax.lax.scan(lambda carry, _: (carry @ jnp.ones((3, 3)), None), x, length=4)[0]

    assert products(jax.make_jaxpr(twice)(jnp.ones((2, 3))).jaxpr) == 4 * 2 * 2 * 3 * 3


def test_pairs_by_hand():
    assert attended_pairs(64, "reference") == 64 * 64
    assert attended_pairs(128, "reference") == 64 * 64 + 64 * 128
    assert attended_pairs(100, "reference") == 64 * 64 + 36 * 100
    assert attended_pairs(1024, "splash") == 512 * 512 + 512 * 1024
    assert attended_pairs(384, "splash") == 128 * (128 + 256 + 384)


def test_six_flops_a_weight_and_token():
    """The rule of thumb of 6 N FLOPs a token, N without the embedding, at short rows."""
    model = MODELS["llama-3.1-8b"]
    data = config_lib.DataConfig(rows=1, length=128, steps_per_row=1)
    flops = train_step_flops(model, config_lib.RewardModelConfig(label="x"), data, "splash")
    weights = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14_336)
    assert flops.model / 128 == pytest.approx(6 * weights, rel=0.01)
    assert flops.backward == 2 * flops.forward
