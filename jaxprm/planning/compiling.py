"""Ahead-of-time compilation for a TPU topology on any Linux machine: the programs' memory and HLO text."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from jaxprm import quiet
from jaxprm.errors import UserError

# Shown with an unknown topology.
EXAMPLES = "v5e:1x1, v5e:2x4, v5e:4x4, v5p:2x2x2, v6e:2x4"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_AMOUNT = r"([\d.]+)([KMGT]?)i?B?"
# What the compiler calls temporaries here is all of the program: 39.9 GiB for a scorer that needs 39.7 GiB on a chip
# where it fits.
_NEEDED = (re.compile(rf"Used {_AMOUNT} of"), re.compile(rf"required for HLO temporaries \({_AMOUNT}\)"))
_AVAILABLE = (re.compile(rf"of {_AMOUNT} hbm", re.I), re.compile(rf"available HBM \({_AMOUNT}\)"))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a program on one device, in bytes.

    aliased: the outputs that reuse the buffers of donated arguments. total: what is needed at once. limit: what the
    compiler allows. If the compiler refused the program, only arguments, total and limit are known.
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
    """A compiled program, or one that the compiler refused as too large.

    seconds: to lower and compile. text: the optimized HLO, empty if refused. refused: the compiler's reason, or empty.
    """

    memory: Memory
    seconds: float
    text: str = ""
    refused: str = ""


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that libtpu needs on a machine without a TPU. Call it before JAX is imported.

    Raises UserError if the TPU compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        wanted = f"jax[tpu]=={importlib.metadata.version('jax')}"  # each jax wants a libtpu of its own
        raise UserError(f"plan needs the TPU compiler, libtpu, which is not installed: pip install '{wanted}'")
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet.without_tpu(environment)


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, one per chip (two for tpu7x). Raises UserError for an unknown name."""
    import jax
    from jax.experimental import topologies

    from jaxprm.training.flops import chip_of

    chip_of(topology)
    options: dict[str, Any] = {}
    if topology.endswith(":1x1"):  # a single chip of a host; the default is a full host
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.startswith("v4:"):  # both cores of a chip as one device, as on a TPU machine
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology}: {reason}; for example {EXAMPLES}") from None


def memory_limit(device: Any) -> int:
    """Bytes of HBM that the compiler allows a program.

    The compiler states the limit only when it refuses, so a program that cannot fit is compiled.
    """
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
    """Compiles a jitted function for the devices of its arguments' shardings. Too large is a result, not an error.

    shapes: the arguments, with a ShapeDtypeStruct for every array. limit: bytes allowed on a device.

    Raises UserError if the compiler refuses for another reason.
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


def compiled_memory(analysis: Any, limit: int) -> Memory:
    """Memory from a compiled program's `memory_analysis()`."""
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    program = analysis.generated_code_size_in_bytes
    total = arguments + outputs - aliased + temporaries + program
    return Memory(arguments, outputs, aliased, temporaries, program, total, limit)


def refused_memory(message: str, arguments: int, limit: int) -> Memory:
    """Memory from the compiler's message that a program does not fit; without a figure, one byte over the limit."""
    limit = _amount(_AVAILABLE, message) or limit
    total = max(_amount(_NEEDED, message) or 0, limit + 1)
    return Memory(arguments, None, None, None, None, total, limit)


def argument_bytes(shapes: Any) -> int:
    """Bytes of arguments on one device: those of the ShapeDtypeStructs, by their shardings."""
    import jax

    leaves = [leaf for leaf in jax.tree.leaves(shapes) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _amount(patterns: tuple[re.Pattern, ...], message: str) -> int | None:
    for pattern in patterns:
        if match := pattern.search(message):
            return round(float(match[1]) * _UNITS[match[2]])
    return None
