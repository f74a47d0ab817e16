"""Where the rows of a call and the keys and values of a cache lie on a mesh; on one device nothing is said of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


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
