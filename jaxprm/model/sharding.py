"""The mesh, and how parameters, optimizer moments, activations, batches and the KV cache are sharded over it.

XLA adds the communication (GSPMD). Mesh axes: `data` (copies of the model; across slices too), `fsdp` (rows of the
batch, and parameters), `tensor` (heads, ffn and vocabulary), `sequence` (tokens of a row).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model.config import TransformerConfig
from jaxprm.model.parameters import PARAMETERS

AXES = ("data", "fsdp", "tensor", "sequence")
# What Adafactor keeps of a matrix, its rows' and columns' means, and what it holds in place of one: small, kept whole.
_FACTORS = {"v_row", "v_col", "v"}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes that it is split over; one that is empty is kept whole."""

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    hidden: tuple[str, ...] = ()  # D of an activation
    vocabulary: tuple[str, ...] = ("tensor",)
    width: tuple[str, ...] = ("fsdp",)  # D of a matrix
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    ffn: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    vector: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()

    def spec(self, axes: Sequence[str], what: str) -> PartitionSpec:
        """Of an array with these logical axes. Raises UserError when two of them want the same mesh axis."""
        taken: dict[str, str] = {}
        for axis in axes:
            for mesh_axis in getattr(self, axis):
                if mesh_axis in taken:
                    raise UserError(
                        f"{what}: its axes {taken[mesh_axis]} and {axis} are both split over mesh axis {mesh_axis}; "
                        "give one of them another in the sharding rules"
                    )
                taken[mesh_axis] = axis
        parts = [getattr(self, axis) or None for axis in axes]
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)


RULES = Rules()


def make_mesh(settings: config_lib.MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one device is a mesh too. With several slices `data` spans them, slice by slice.

    Raises UserError, naming the numbers, when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    over = slices if settings.dcn_data == -1 else settings.dcn_data
    if over != slices:
        raise UserError(f"mesh.dcn_data = {over}, but the devices form {slices} slices; set it to {slices} or -1")
    count = len(devices) // slices
    sizes = _sizes(settings, count, "devices" if slices == 1 else "devices of a slice")
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1, 1), **options)
    else:
        grid = mesh_utils.create_device_mesh(sizes, **options)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(settings: config_lib.MeshConfig, count: int, what: str) -> tuple[int, ...]:
    sizes = {name: getattr(settings, name) for name in AXES}
    given = " x ".join(f"mesh.{name} = {size}" for name, size in sizes.items())
    if zero := next((name for name, size in sizes.items() if size == 0), None):
        raise UserError(f"mesh.{zero} = 0: must be at least 1, or -1 for what is left of the {count} {what}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh.{free[0]} and mesh.{free[1]} are both -1; one axis alone can take what is left")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    elif free or fixed != count:
        raise UserError(
            f"{given}: the product {fixed} {'does not divide' if free else 'is not'} the number of {what}, {count}; "
            f"use divisors of {count}, and -1 for one axis"
        )
    return tuple(sizes.values())


def check_rows(mesh: Mesh, rows: int, length: int = 0, microbatches: int = 1) -> None:
    """Raises UserError when a batch of `rows` rows of `length` tokens cannot be split evenly over the mesh."""
    data, fsdp, sequence = (mesh.shape[name] for name in ("data", "fsdp", "sequence"))
    parts = data * fsdp * microbatches
    if rows % parts:
        micro = f" x {microbatches} microbatches" if microbatches > 1 else ""
        each, left = divmod(rows, microbatches)
        divisors = [] if left else [str(count) for count in range(1, each + 1) if each % count == 0]
        raise UserError(
            f"data.rows = {rows} is not a multiple of {parts} ({data} data x {fsdp} fsdp{micro}); "
            f"use {-(-rows // parts) * parts}" + (f", or data x fsdp of {', '.join(divisors)}" if divisors else "")
        )
    if length % sequence:
        raise UserError(f"data.length = {length} is not a multiple of mesh.sequence = {sequence}")


def check_model(mesh: Mesh, config: TransformerConfig, rules: Rules = RULES) -> None:
    """Raises UserError when an axis of the model does not divide over the mesh, or two collide in a parameter."""
    sizes = {
        "vocabulary": ("vocab_size", config.vocab_size),
        "width": ("hidden_size", config.hidden_size),
        "heads": ("heads", config.heads),
        "kv_heads": ("kv_heads", config.kv_heads),
        "ffn": ("intermediate_size", config.intermediate_size),
    }
    for axis, (field, size) in sizes.items():
        _check_divides(mesh, getattr(rules, axis), size, f"the model's {field} = {size}")


def _check_divides(mesh: Mesh, axes: tuple[str, ...], size: int, what: str) -> None:
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
        over = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
        raise UserError(f"{what} is not a multiple of {over}; use a divisor of {size}")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Of every array of a batch, [B, ...]: by rows."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def with_shardings(mesh: Mesh, shapes: Any, rules: Rules = RULES) -> Any:
    """A tree of shapes with their shardings, by the names of the parameters; an optimizer's moments lie where they do.

    Raises:
        UserError: an axis does not divide, or two collide on one mesh axis.
        ValueError: an array is no parameter, nor made of one, and not a scalar.
    """

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # Names of parameters are keys of dictionaries; the fields of an optimizer's state are attributes.
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        attributes = {key.name for key in path if isinstance(getattr(key, "name", None), str)}
        name, axes = ".".join(names), parameter_axes(names, leaf.ndim)
        if not leaf.ndim or (attributes & _FACTORS and len(axes or ()) != leaf.ndim):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))
        if axes is None or len(axes) != leaf.ndim:
            raise ValueError(f"{name} {leaf.shape}: its axes are {axes}; declare them in jaxprm/model/sharding.py")
        for axis, size in zip(axes, leaf.shape, strict=True):
            _check_divides(mesh, getattr(rules, axis), size, f"{name}: its axis {axis} = {size}")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, rules.spec(axes, name)))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def shardings(placed: Any) -> Any:
    """The shardings of a tree that `place` made."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def constrain(mesh: Mesh, rules: Rules, x: jax.Array, *axes: str) -> jax.Array:
    """An activation with the logical axes `axes`, laid out by the rules."""
    sharding = NamedSharding(mesh, rules.spec(axes, "activation"))
    return jax.lax.with_sharding_constraint(x, sharding)


def constraints(mesh: Mesh, rules: Rules = RULES) -> Any:
    """`Compute.constrain` for a mesh."""
    return functools.partial(constrain, mesh, rules)


def local_rows(mesh: Mesh, rows: int, rules: Rules = RULES) -> np.ndarray:
    """The rows of a batch, ascending, that lie on this process's devices."""
    places = batch_sharding(mesh, rules).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[with_shardings] for with_shardings in places]))


def put_batch(
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    fields: Sequence[str],
    *,
    held: np.ndarray | None = None,
    rows: int | None = None,
) -> dict[str, jax.Array]:
    """The arrays of a batch that the step functions read, on the mesh.

    Args:
        batch: the whole batch, or its rows `held` out of `rows`: those that `held_rows` says.
    """
    split = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        count = len(array) if held is None else rows

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(count)
            begin = first if held is None else int(np.searchsorted(held, first))
            return array[begin : begin + last - first]

        return jax.make_array_from_callback((count, *array.shape[1:]), split, part)

    return {name: put(batch[name]) for name in fields}


def parameter_axes(path: Sequence[str], ndim: int) -> tuple[str, ...] | None:
    """Axes of the parameter that a path of names ends in, as ("transformer", "blocks", "query"); None if none is.

    The path may begin with anything, so that the moments an optimizer keeps of a parameter have its axes. ndim is the
    parameter's: a head has one axis or two.
    """
    found = next((name for name in reversed(path) if name in PARAMETERS), None)
    if found is None:
        return None
    axes = PARAMETERS[found].sharding
    if found == "head":
        axes = ("vector",) * ndim
    if path[-1] in ("a", "b"):  # the factors of an adapter
        axes = (axes[0], "rank") if path[-1] == "a" else ("rank", axes[1])
    return ("layers", *axes) if "blocks" in path else axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of `mesh` that rows, and that kv heads, are split over; None is a single device.

    Slots are on every group of devices that computes rows, so that any row may read any of them.
    """

    mesh: Mesh | None = None
    rows: tuple[str, ...] = ("data", "fsdp")
    heads: tuple[str, ...] = ("tensor",)

    @property
    def parts(self) -> int:
        """Groups of devices that rows are split over."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.rows)

    def of_rows(self, tree: Any) -> Any:
        """Arrays [R, K, ...] of four axes and others [R, ...]; rows that do not divide are kept whole."""
        return self._constrained(tree, self.rows)

    def of_slots(self, tree: Any) -> Any:
        """Arrays [N, K, ...] of a cache, and others whole."""
        return self._constrained(tree, ())

    @property
    def slots(self) -> NamedSharding | None:
        """Where the arrays [N, K, ...] of a cache are made: no device ever has the whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(None, self.heads))

    def _constrained(self, tree: Any, rows: tuple[str, ...]) -> Any:
        if self.mesh is None:
            return tree

        def constrained(x: jax.Array) -> jax.Array:
            first = rows if rows and x.shape[0] % self.parts == 0 else None
            spec = PartitionSpec(first, self.heads) if x.ndim == 4 else PartitionSpec(first)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(constrained, tree)


ONE_DEVICE = Layout()
