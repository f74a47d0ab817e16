"""Meshes that divide, the shardings of arrays, and the errors with their numbers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model import sharding
from jaxprm.model.config import FAMILIES, Head, TransformerConfig
from jaxprm.model.parameters import PARAMETERS
from jaxprm.model.sharding import AXES, Rules
from jaxprm.model.transformer import RewardModel, Transformer
from jaxprm.training.step import FIELDS

SIZES = TransformerConfig(
    vocab_size=320, hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=96
)


def mesh_of(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, AXES)


def model_shapes(config: TransformerConfig = SIZES):
    return nnx.state(nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0))))


def specs(tree) -> dict[str, PartitionSpec]:
    """Specs by the last name of the path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [[key.key for key in path if isinstance(getattr(key, "key", None), str)][-1] for path, _ in leaves]
    return {name: leaf.sharding.spec for name, (_, leaf) in zip(names, leaves, strict=True)}


def devices_of(slices: list[int]) -> list:
    """Fake devices; slices[i] is the slice of device i."""
    return [
        SimpleNamespace(id=i, slice_index=s, platform="cpu", device_kind="cpu", process_index=s)
        for i, s in enumerate(slices)
    ]


def refused(match: str, call, *arguments, **options) -> None:
    with pytest.raises(UserError, match=match) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_one_device_is_a_mesh_too():
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    sharding.check_rows(mesh, 7, 5)
    sharding.check_model(mesh, SIZES)


@pytest.mark.parametrize(
    "axes, sizes",
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 1, "fsdp": 2, "tensor": -1, "sequence": 2}, (1, 2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}, (2, 2, 2, 1)),
    ],
)
def test_minus_one_takes_what_is_left(axes, sizes):
    assert sharding._sizes(config_lib.MeshConfig(**axes), 8, "devices") == sizes


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"fsdp": 3}, r"mesh.fsdp = 3 .* the product 3 does not divide the number of devices, 8"),
        ({"data": 3, "fsdp": 2}, r"mesh.data = 3 x mesh.fsdp = 2 .* the product 6 is not the number of devices, 8"),
        ({"data": 0}, r"mesh.data = 0: must be at least 1, or -1"),
        ({"tensor": -1}, r"mesh.data and mesh.tensor are both -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(axes, message):
    refused(message, sharding.make_mesh, config_lib.MeshConfig(**axes), jax.devices()[:1] * 8)


def test_data_spans_the_slices_and_nothing_else_does(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, axis_types: grid)
    for dcn_data in (-1, 2):
        grid = sharding.make_mesh(
            config_lib.MeshConfig(fsdp=2, tensor=2, dcn_data=dcn_data), devices_of([0, 0, 0, 0, 1, 1, 1, 1])
        )
        assert grid.shape == (2, 2, 2, 1)
        placed = np.vectorize(lambda device: device.slice_index)(grid)
        assert (placed[0] == 0).all() and (placed[1] == 1).all()


def test_another_number_of_slices_is_refused():
    two = devices_of([0, 0, 1, 1])
    refused(
        r"mesh.dcn_data = 4, but the devices form 2 slices", sharding.make_mesh, config_lib.MeshConfig(dcn_data=4), two
    )
    refused(r"is not the number of devices of a slice, 2", sharding.make_mesh, config_lib.MeshConfig(data=4), two)


def test_rows_and_lengths_that_do_not_divide_are_named():
    mesh = mesh_of(4, 2, 2, 2)
    sharding.check_rows(mesh, 16, 64)
    sharding.check_rows(mesh, 16, 64, microbatches=2)
    twelve = r"data.rows = 12 .* multiple of 8 \(4 data x 2 fsdp\); use 16, or data x fsdp of 1, 2, 3, 4, 6, 12$"
    refused(twelve, sharding.check_rows, mesh, 12, 64)
    refused(r"multiple of 24 \(4 data x 2 fsdp x 3 microbatches\); use 24$", sharding.check_rows, mesh, 16, 64, 3)
    refused(r"data.length = 63 .* mesh.sequence = 2", sharding.check_rows, mesh, 16, 63)


@pytest.mark.parametrize(
    "changes, mesh, message",
    [
        ({"vocab_size": 321}, (1, 1, 2, 1), r"vocab_size = 321 is not a multiple of mesh.tensor = 2"),
        ({"hidden_size": 60}, (1, 8, 1, 1), r"hidden_size = 60 is not a multiple of mesh.fsdp = 8"),
        ({}, (1, 1, 4, 1), r"kv_heads = 2 is not a multiple of mesh.tensor = 4"),
    ],
)
def test_a_model_that_does_not_divide_is_named(changes, mesh, message):
    refused(message, sharding.check_model, mesh_of(*mesh), dataclasses.replace(SIZES, **changes))


@pytest.mark.parametrize("head", [Head(), Head(labels=2, bias=True)])
def test_every_parameter_of_every_family_has_its_axes_declared_and_nothing_else_is(head):
    mesh, declared = mesh_of(1, 1, 1, 1), set()
    for family in FAMILIES:
        config = dataclasses.replace(SIZES, tie_embeddings=False, family=family, head=head)
        language = nnx.state(nnx.eval_shape(lambda config=config: Transformer(config, rngs=nnx.Rngs(0))))
        declared |= set(specs(sharding.with_shardings(mesh, model_shapes(config))))
        declared |= set(specs(sharding.with_shardings(mesh, language)))
    assert declared == set(PARAMETERS) - ({"head_bias"} if not head.bias else set())


def test_parameters_are_split_by_what_their_axes_are():
    placed = specs(sharding.with_shardings(mesh_of(2, 2, 2, 1), model_shapes()))
    fsdp, tensor = ("fsdp",), ("tensor",)
    assert placed["query"] == placed["value"] == placed["gate"] == PartitionSpec(None, fsdp, tensor)
    assert placed["output"] == placed["down"] == PartitionSpec(None, tensor, fsdp)
    assert placed["embedding"] == PartitionSpec(tensor, fsdp)
    assert placed["key_bias"] == PartitionSpec(None, tensor)
    assert placed["norm"] == placed["head"] == PartitionSpec()


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=64)])
def test_moments_have_the_shardings_of_their_parameters(optimizer):
    shapes = model_shapes()
    placed = sharding.with_shardings(mesh_of(1, 4, 2, 1), {"parameters": shapes, "optimizer": optimizer.init(shapes)})
    by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(placed["parameters"])}
    moments = [leaf for leaf in jax.tree.leaves(placed["optimizer"]) if leaf.ndim == 3]
    assert moments
    for leaf in moments:
        assert leaf.sharding == by_shape[leaf.shape], leaf


def test_an_array_that_was_not_declared_is_an_error():
    with pytest.raises(ValueError, match=r"transformer.novelty \(3, 4\): its axes are None"):
        sharding.with_shardings(mesh_of(1, 1, 1, 1), {"transformer": {"novelty": np.zeros((3, 4))}})
    with pytest.raises(ValueError, match=r"query \(3,\): its axes are"):
        sharding.with_shardings(mesh_of(1, 1, 1, 1), {"query": np.zeros(3)})


def test_two_axes_on_one_mesh_axis_collide():
    rules = Rules(width=("tensor",))
    message = r"transformer.blocks.down: its axes ffn and width are both split over mesh axis tensor"
    refused(message, sharding.with_shardings, mesh_of(1, 1, 2, 1), model_shapes(), rules)


def test_a_batch_on_the_mesh_equals_the_hosts():
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    batch = {name: np.arange(6).reshape(2, 3) + index for index, name in enumerate(FIELDS)}
    placed = sharding.put_batch(batch | {"example": np.zeros((2, 3))}, mesh, FIELDS)
    assert set(placed) == set(FIELDS)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
