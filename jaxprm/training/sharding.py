"""The mesh, and where parameters and batches lie on it.

Axes: `data` and `fsdp`. Rows of a batch are split over both; a parameter is split over `fsdp` along its largest axis
that fsdp divides, and kept whole where there is none. XLA inserts the communication (GSPMD).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.training.step import FIELDS

AXES = ("data", "fsdp")


def make_mesh(settings: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; one device gives a (1, 1) mesh.

    Raises UserError, naming the numbers, when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, data, fsdp = len(devices), settings.data, settings.fsdp
    if data == -1:
        if count % fsdp:
            raise UserError(f"mesh.fsdp = {fsdp} does not divide the {count} devices; use a divisor of {count}")
        data = count // fsdp
    if data < 1 or data * fsdp != count:
        raise UserError(
            f"mesh.data = {data} times mesh.fsdp = {fsdp} is not the number of devices, {count}; "
            "set mesh.data to -1 to use all of them"
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raises UserError when a batch of `rows` cannot be split evenly over the mesh."""
    if rows % mesh.size:
        raise UserError(
            f"data.rows = {rows} is not a multiple of the {mesh.size} devices of the mesh "
            f"({mesh.shape['data']} data x {mesh.shape['fsdp']} fsdp); use {-(-rows // mesh.size) * mesh.size}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch, [B, ...]."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def place(mesh: Mesh, shapes: Any) -> Any:
    """A tree of shapes with their shardings. By shape alone, so the optimizer's moments lie where parameters do."""

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, _spec(leaf.shape, mesh.shape["fsdp"]))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """What the step functions read of a batch, on the mesh. Every host has the whole batch and keeps its rows."""
    split = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, split, lambda rows: array[rows])

    return {name: put(batch[name]) for name in FIELDS}


def _spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0 and size > 0]
    if fsdp == 1 or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXES[1] if axis == largest else None for axis in range(largest + 1)))
