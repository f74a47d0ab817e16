"""Compiling for a TPU that is not here: libtpu's compiler runs on any Linux machine, given a topology's name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from jaxprm.errors import UserError
from jaxprm.planning.chips import chip_of

# Devices of the example names that fit users' slices.
EXAMPLES = "v5e:1x1, v5e:2x4, v5e:4x4, v5p:2x2x2, v6e:2x4"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_AMOUNT = r"([\d.]+)([KMGT]?)i?B?"
# What the compiler calls temporaries here is all of the program: 39.9 of a scorer that needs 39.7 where there is room.
_NEEDED = (re.compile(rf"Used {_AMOUNT} of"), re.compile(rf"required for HLO temporaries \({_AMOUNT}\)"))
_AVAILABLE = (re.compile(rf"of {_AMOUNT} hbm", re.I), re.compile(rf"available HBM \({_AMOUNT}\)"))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. outputs that lie where arguments lay are in `aliased`; None where compiling was refused.

    total: what is needed at once; limit: what the compiler gives a program.
    """

    arguments: int
    outputs: int | None
    aliased: int | None
    temporaries: int | None
    program: int | None
    total: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Compilation:
    """memory; seconds it took to lower and to compile; text: optimized HLO, or nothing and why it was `refused`."""

    memory: Memory
    seconds: float
    text: str = ""
    refused: str = ""


def prepare(environment: MutableMapping[str, str]) -> None:
    """To be called before JAX is imported. Raises UserError where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        wanted = f"jax[tpu]=={importlib.metadata.version('jax')}"  # each jax wants a libtpu of its own
        raise UserError(f"plan needs the TPU compiler, libtpu, which is not installed: pip install '{wanted}'")
    environment["JAX_PLATFORMS"] = "cpu"
    # No questions to the metadata server, and no lock against a second process that has no TPU either.
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # What a TPU machine would tell; without, a page of complaints.
    for name, value in {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        environment.setdefault(name, value)


def devices_of(topology: str) -> list[Any]:
    """Described devices, one a chip (of tpu7x, two). Raises UserError for a name that is none."""
    import jax
    from jax.experimental import topologies

    chip_of(topology)
    options: dict[str, Any] = {}
    if topology.endswith(":1x1"):  # a part of a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.startswith("v4:"):  # both cores of a chip as one device, as users have them
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology}: {reason}; for example {EXAMPLES}") from None


def memory_limit(device: Any) -> int:
    """Bytes of HBM that the compiler gives a program: asked by a program that cannot fit."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    huge = jax.ShapeDtypeStruct((1 << 40,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if (limit := _amount(_AVAILABLE, str(error))) is not None:
            return limit
        raise
    raise AssertionError("four tebibytes fit a chip")


def compile_ahead(function: Callable, *shapes: Any, limit: int) -> Compilation:
    """Compiles a jitted function for the devices that the shapes lie on. Too large is an answer, not an error.

    Raises UserError where the compiler refuses for another reason.
    """
    import jax

    began = time.monotonic()
    lowered = function.lower(*shapes)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise UserError(f"the TPU compiler refuses the program: {message.splitlines()[0]}") from error
        memory = refused_memory(message, argument_bytes(shapes), limit)
        return Compilation(memory, time.monotonic() - began, refused=" ".join(message.split())[:500])
    seconds = time.monotonic() - began
    return Compilation(compiled_memory(compiled.memory_analysis(), limit), seconds, compiled.as_text())


def compiled_memory(found: Any, limit: int) -> Memory:
    """Of a compiled program's `memory_analysis()`."""
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    aliased, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
    program = found.generated_code_size_in_bytes
    total = arguments + outputs - aliased + temporaries + program
    return Memory(arguments, outputs, aliased, temporaries, program, total, limit)


def refused_memory(message: str, arguments: int, limit: int) -> Memory:
    """Of the compiler's message that a program does not fit; where it gives no figure, more than the limit is known."""
    limit = _amount(_AVAILABLE, message) or limit
    total = max(_amount(_NEEDED, message) or 0, limit + 1)
    return Memory(arguments, None, None, None, None, total, limit)


def argument_bytes(shapes: Any) -> int:
    """Bytes of arguments on one device: of the ShapeDtypeStructs with shardings among them."""
    import jax

    leaves = [leaf for leaf in jax.tree.leaves(shapes) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _amount(patterns: tuple[re.Pattern, ...], message: str) -> int | None:
    for pattern in patterns:
        if match := pattern.search(message):
            return round(float(match[1]) * _UNITS[match[2]])
    return None
