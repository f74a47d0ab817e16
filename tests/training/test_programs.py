"""The shapes that programs are built from are those of the arrays that training passes to them."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from data_pipeline.batches import training_batches
from jaxprm.model import sharding
from jaxprm.training.programs import batch_fields, batch_shapes, make_programs
from jaxprm.training.reward_model import from_policy
from jaxprm.training.step import FIELDS


def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.parametrize("trainable", ["full", "lora", "last_k"])
def test_states_are_as_described(toy, trainable):
    mesh = sharding.make_mesh(toy.experiment.mesh)
    config, parameters = from_policy(toy.base, 0, mesh)
    settings = toy.settings(trainable=trainable, last_k=1)
    programs = make_programs(settings, config, mesh, length=128, steps=10, seed=0)
    assert described(programs.parameters) == described(parameters)
    trained, frozen = (parameters, nnx.State({})) if trainable == "full" else programs.split(parameters)
    assert described(programs.frozen) == described(frozen)
    assert described(programs.state) == described(programs.init(trained))


def test_batches_are_as_described(toy):
    mesh, data = sharding.make_mesh(toy.experiment.mesh), toy.experiment.data
    batches = training_batches(toy.shards, rows=8, length=128, steps_per_row=32, epochs=1, seed=0)
    batch = sharding.put_batch(next(batches), mesh, FIELDS)
    config, _ = from_policy(toy.base, 0, mesh)
    assert described(batch_shapes(FIELDS, data, config, mesh)) == described(batch)


def test_with_a_frozen_transformer_a_batch_brings_features_and_no_tokens(toy):
    fields = batch_fields(toy.settings(trainable="head"))
    assert "read_features" in fields and "tokens" not in fields and "state_features" not in fields
    assert "state_features" in batch_fields(toy.settings(trainable="head", bootstrap="state"))
    assert batch_fields(toy.settings()) == FIELDS
