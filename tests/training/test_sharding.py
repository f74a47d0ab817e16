"""Meshes that divide, and where arrays lie."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.training import sharding


def shapes(**named: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in named.items()}


def specs(mesh: AbstractMesh, **named: tuple[int, ...]) -> dict[str, PartitionSpec]:
    return {name: leaf.sharding.spec for name, leaf in sharding.place(mesh, shapes(**named)).items()}


def test_one_device_is_a_mesh_too():
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1}
    sharding.check_rows(mesh, 7)


@pytest.mark.parametrize(
    "data, fsdp, devices, numbers",
    [(-1, 3, 8, ["fsdp = 3", "8 devices"]), (3, 2, 8, ["data = 3", "fsdp = 2", "8"]), (0, 1, 1, ["data = 0", "1"])],
)
def test_sizes_that_do_not_divide_are_named(data, fsdp, devices, numbers):
    with pytest.raises(UserError) as raised:
        sharding.make_mesh(config_lib.Mesh(data=data, fsdp=fsdp), jax.devices()[:1] * devices)
    assert all(number in str(raised.value) for number in numbers)
    assert "\n" not in str(raised.value)


def test_rows_that_do_not_divide_are_named():
    mesh = AbstractMesh((4, 2), sharding.AXES)
    sharding.check_rows(mesh, 16)
    with pytest.raises(UserError, match=r"data.rows = 12 .* 8 devices .*4 data x 2 fsdp.* use 16"):
        sharding.check_rows(mesh, 12)


def test_a_parameter_is_split_along_its_largest_axis_that_fsdp_divides():
    found = specs(
        AbstractMesh((2, 4), sharding.AXES),
        matrix=(2, 32, 64), wide=(2, 64, 33), odd=(3, 5), vector=(32,), scalar=(), empty=(0, 3),
    )  # fmt: skip
    assert found == {
        "matrix": PartitionSpec(None, None, "fsdp"),
        "wide": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(),
        "vector": PartitionSpec("fsdp"),
        "scalar": PartitionSpec(),
        "empty": PartitionSpec(),
    }


def test_without_fsdp_parameters_are_whole():
    assert specs(AbstractMesh((8, 1), sharding.AXES), matrix=(2, 32, 64)) == {"matrix": PartitionSpec()}


def test_a_batch_on_the_mesh_holds_what_the_host_gave():
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
    batch = {name: np.arange(6).reshape(2, 3) + index for index, name in enumerate(sharding.FIELDS)}
    placed = sharding.put_batch(batch | {"example": np.zeros((2, 3))}, mesh)
    assert set(placed) == set(sharding.FIELDS)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
