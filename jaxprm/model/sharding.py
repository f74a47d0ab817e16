"""The device mesh, and how parameters, optimizer moments, activations, batches and the KV cache are sharded over it.

Only shardings are declared; XLA's partitioner adds the communication. Mesh axes: `data` (replicas of the model, also
across slices), `fsdp` (rows of the batch, and parameters), `tensor` (heads, ffn and vocabulary), `sequence` (tokens of
a row).

Letters: B rows of a batch, R rows of a scoring call, N slots of a cache, K kv heads, D model.
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
# Fields of Adafactor's state: the row and column means of a matrix, and the placeholder of what it does not factor.
# They are vectors with the names of matrices, and small, so they are replicated.
_FACTORS = {"v_row", "v_col", "v"}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes that it is split over; () replicates it."""

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
        """The PartitionSpec of an array with these logical axes. what: its name, for the error.

        Raises UserError if two axes are split over the same mesh axis.
        """
        axis_by_mesh_axis: dict[str, str] = {}
        for axis in axes:
            for mesh_axis in getattr(self, axis):
                if mesh_axis in axis_by_mesh_axis:
                    raise UserError(
                        f"{what}: its axes {axis_by_mesh_axis[mesh_axis]} and {axis} are both split over mesh axis "
                        f"{mesh_axis}; give one of them another mesh axis in the sharding rules"
                    )
                axis_by_mesh_axis[mesh_axis] = axis
        parts = [getattr(self, axis) or None for axis in axes]
        # One spelling of each sharding: with a trailing None, equal specs compare as different.
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)


RULES = Rules()


def make_mesh(settings: config_lib.MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all, with the axes AXES. With several slices, `data` spans them.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    dcn_data = slices if settings.dcn_data == -1 else settings.dcn_data
    if dcn_data != slices:
        raise UserError(f"mesh.dcn_data = {dcn_data}, but the devices form {slices} slices; set it to {slices} or -1")
    count = len(devices) // slices
    sizes = _sizes(settings, count, "devices" if slices == 1 else "devices of a slice")
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1, 1), **options)
    else:
        grid = mesh_utils.create_device_mesh(sizes, **options)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(settings: config_lib.MeshConfig, count: int, what: str) -> tuple[int, ...]:
    """The size of each of AXES, -1 resolved. count, what: the number of devices, and what they are in an error."""
    sizes = {name: getattr(settings, name) for name in AXES}
    product = " x ".join(f"mesh.{name} = {size}" for name, size in sizes.items())
    if zero := next((name for name, size in sizes.items() if size == 0), None):
        raise UserError(f"mesh.{zero} = 0: must be at least 1, or -1 for the remaining of the {count} {what}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis can be")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    elif free or fixed != count:
        raise UserError(
            f"{product}: the product {fixed} {'does not divide' if free else 'is not'} the number of {what}, {count}; "
            f"use divisors of {count}, and -1 for one axis"
        )
    return tuple(sizes.values())


def check_rows(mesh: Mesh, rows: int, length: int = 0, microbatches: int = 1) -> None:
    """Raises UserError if a batch of `rows` rows of `length` tokens cannot be split evenly over the mesh."""
    data, fsdp, sequence = (mesh.shape[name] for name in ("data", "fsdp", "sequence"))
    parts = data * fsdp * microbatches
    if rows % parts:
        micro = f" x {microbatches} microbatches" if microbatches > 1 else ""
        per_microbatch, remainder = divmod(rows, microbatches)
        candidates = [] if remainder else range(1, per_microbatch + 1)
        divisors = [str(count) for count in candidates if per_microbatch % count == 0]
        raise UserError(
            f"data.rows = {rows} is not a multiple of {parts} ({data} data x {fsdp} fsdp{micro}); "
            f"use {-(-rows // parts) * parts}" + (f", or data x fsdp of {', '.join(divisors)}" if divisors else "")
        )
    if length % sequence:
        raise UserError(f"data.length = {length} is not a multiple of mesh.sequence = {sequence}")


def check_model(mesh: Mesh, config: TransformerConfig, rules: Rules = RULES) -> None:
    """Raises UserError if an axis of the model does not divide over the mesh."""
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
        product = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
        raise UserError(f"{what} is not a multiple of {product}; use a divisor of {size}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The sharding of every array of a batch, [B, ...]: split by rows."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def with_shardings(mesh: Mesh, shapes: Any, rules: Rules = RULES) -> Any:
    """A tree of shapes with shardings, by the names of the parameters; optimizer moments are placed as their parameter.

    Raises:
        UserError: an axis does not divide over its mesh axes, or two axes are split over the same mesh axis.
        ValueError: an array is neither a scalar, nor a parameter, nor derived from one.
    """

    def with_sharding(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # Parameter names are dictionary keys in the path, fields of an optimizer's state are attributes.
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        attributes = {key.name for key in path if isinstance(getattr(key, "name", None), str)}
        name, axes = ".".join(names), parameter_axes(names, leaf.ndim)
        if not leaf.ndim or (attributes & _FACTORS and len(axes or ()) != leaf.ndim):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))
        if axes is None or len(axes) != leaf.ndim:
            raise ValueError(f"{name} {leaf.shape}: its axes are {axes}; declare them in jaxprm/model/parameters.py")
        for axis, size in zip(axes, leaf.shape, strict=True):
            _check_divides(mesh, getattr(rules, axis), size, f"{name}: its axis {axis} = {size}")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, rules.spec(axes, name)))

    return jax.tree_util.tree_map_with_path(with_sharding, shapes)


def shardings(shapes: Any) -> Any:
    """The shardings of a tree that `with_shardings` made."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def constrain(mesh: Mesh, rules: Rules, x: jax.Array, *axes: str) -> jax.Array:
    """The activation `x`, with logical axes `axes`, constrained to its sharding by the rules."""
    sharding = NamedSharding(mesh, rules.spec(axes, "activation"))
    return jax.lax.with_sharding_constraint(x, sharding)


def constraints(mesh: Mesh, rules: Rules = RULES) -> Any:
    """`ForwardOptions.constrain` for a mesh."""
    return functools.partial(constrain, mesh, rules)


def local_rows(mesh: Mesh, rows: int, rules: Rules = RULES) -> np.ndarray:
    """Ascending indices of the rows of a batch that are on this process's devices."""
    indices = batch_sharding(mesh, rules).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def put_batch(
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    fields: Sequence[str],
    *,
    held: np.ndarray | None = None,
    rows: int | None = None,
) -> dict[str, jax.Array]:
    """The arrays `fields` of a batch, on the mesh.

    Args:
        batch: all rows, or, with several processes, only the rows `held` (those of `local_rows`) out of `rows`.
    """
    by_rows = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        count = len(array) if held is None else rows

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(count)
            begin = first if held is None else int(np.searchsorted(held, first))
            return array[begin : begin + last - first]

        return jax.make_array_from_callback((count, *array.shape[1:]), by_rows, part)

    return {name: put(batch[name]) for name in fields}


def parameter_axes(path: Sequence[str], ndim: int) -> tuple[str, ...] | None:
    """Logical axes of the parameter that a path such as ("transformer", "blocks", "query") names, or None.

    ndim: of the parameter; a head has one axis or two.
    """
    # From the end: an optimizer's moments are below its own names, and an adapter's factors below their matrix.
    name = next((name for name in reversed(path) if name in PARAMETERS), None)
    if name is None:
        return None
    axes = PARAMETERS[name].sharding
    if name == "head":
        axes = axes[:ndim]
    if path[-1] in ("a", "b"):  # the factors [I, R] and [R, O] of an adapter
        axes = (axes[0], "rank") if path[-1] == "a" else ("rank", axes[1])
    return ("layers", *axes) if "blocks" in path else axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sharding of scoring calls and of the KV cache; without a mesh, a no-op on one device.

    rows, heads: mesh axes that rows [R] and kv heads [K] are split over. Slots [N] of a cache are split by heads only:
    every group of devices has all slots, so that any row can read any slot without communication.
    """

    mesh: Mesh | None = None
    rows: tuple[str, ...] = ("data", "fsdp")
    heads: tuple[str, ...] = ("tensor",)

    @property
    def parts(self) -> int:
        """The number of groups of devices that rows are split over."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.rows)

    def constrain_rows(self, tree: Any) -> Any:
        """Constrains arrays [R, K, ., .], and others [R, ...]; rows that do not divide are replicated."""
        return self._constrain(tree, self.rows)

    def constrain_slots(self, tree: Any) -> Any:
        """Constrains arrays [N, K, ., .] of a cache; others are replicated."""
        return self._constrain(tree, ())

    @property
    def slot_sharding(self) -> NamedSharding | None:
        """Sharding of the arrays [N, K, ., .] of a cache, to create them with: no device ever has all heads."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(None, self.heads))

    def _constrain(self, tree: Any, rows: tuple[str, ...]) -> Any:
        if self.mesh is None:
            return tree

        def constrain_array(x: jax.Array) -> jax.Array:
            first = rows if rows and x.shape[0] % self.parts == 0 else None
            spec = PartitionSpec(first, self.heads) if x.ndim == 4 else PartitionSpec(first)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(constrain_array, tree)


ONE_DEVICE = Layout()
