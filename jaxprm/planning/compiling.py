"""Ahead-of-time compilation for a TPU topology on any Linux machine, and communication read from the compiled HLO."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from jaxprm.errors import UserError
from jaxprm.training.flops import chip_of

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


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?")  # an attribute over several lines ends in }} and more
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_BODY = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
# Space 5 is the host's memory.
_HOST = re.compile(
    r" (infeed|outfeed)\(|is_host_transfer=true|S\(5\)|"
    r'custom_call_target="(MoveToHost|MoveToDevice|\w*host_compute\w*|xla_\w*python\w*callback)"'
)


@dataclasses.dataclass(frozen=True)
class Communication:
    """counts: collectives of a program by name, each once, loop or not. sent: bytes that a device sends in one run, by
    name: a ring's, (n - 1) / n of an array for a gather or a scatter among n devices, and twice that for a reduction.
    """

    counts: dict[str, int]
    sent: dict[str, float]


def communication(text: str, devices: int) -> Communication:
    """Of an optimized HLO module that is compiled for `devices`."""
    computations = dict(_computations(text))
    times = _times(text, computations)
    found: dict[tuple, tuple[str, float]] = {}
    for name, lines in computations.items():
        scatters = name.startswith("all-reduce-scatter")
        for line in lines:
            if (match := _COLLECTIVE.search(line)) is None:
                continue
            shape, kind, started = match.groups()
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1] if channel else (name, line))
            arrays = _ARRAY.findall(shape)
            if started and kind in ("all-gather", "collective-permute"):  # (operands, results, scalars of its own)
                arrays = [array for array in arrays if array[1]]
                arrays = arrays[len(arrays) // 2 :]
            size = sum(_bytes(*array) for array in arrays)
            sent = _sent(kind, size, _group(line, devices), scattered=not scatters) * times[name]
            if key not in found or found[key][1] < sent:
                found[key] = (kind, sent)
    sent: Counter = Counter()
    for kind, amount in found.values():
        sent[kind] += amount
    return Communication(dict(Counter(kind for kind, _ in found.values())), dict(sent))


def host_transfers(text: str) -> list[str]:
    """The lines of a program that move data to or from the host while it runs."""
    return [line.strip() for line in text.splitlines() if _HOST.search(line)]


def attention_of(text: str) -> str:
    """Which attention was compiled: the kernel leaves its name."""
    return "splash" if "splash_mha" in text else "reference"


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        if name is None:
            if match := _HEADER.match(line):
                name, lines = match[2], [line] if match[1] else []
        elif _END.fullmatch(line):
            yield name, lines
            name = None
        else:
            lines.append(line)


def _times(text: str, computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, by its name."""
    callees: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            trips = 1
            if loop := _BODY.search(line):
                trips = _trips(line, computations.get(loop[1], []))
            called = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                called += [one.strip().lstrip("%") for one in group.split(",")]
            callees[name] += [(one, trips) for one in dict.fromkeys(called)]
    entry = next((name for name, lines in computations.items() if lines and lines[0].startswith("ENTRY")), None)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for callee, trips in callees[name]:
            visit(callee, count * trips)

    if entry is not None:
        visit(entry, 1)
    return times


def _trips(line: str, condition: list[str]) -> int:
    """Runs of a loop's body: as annotated, or the constant that its counter is compared with; 1 where there is none."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = [int(n) for one in condition for n in re.findall(r" = s32\[\]\S* constant\((\d+)\)", one)]
    return max(constants, default=1)


def _bytes(dtype: str, dimensions: str) -> float:
    bits = 8 if dtype == "pred" else int(found[0]) if (found := re.findall(r"\d+", dtype)) else 0
    return bits / 8 * math.prod(int(one) for one in dimensions.split(",") if one)


def _group(line: str, devices: int) -> int:
    """How many devices take part in one group of a collective."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    return devices


def _sent(kind: str, size: float, group: int, *, scattered: bool) -> float:
    """size: bytes of the result, or of what is reduced where the result is not `scattered` yet."""
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter" and scattered:
        size *= group
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group
