"""What a compiled program sends between devices and to the host, read from its HLO text.

A TPU program holds an asynchronous collective up to three times, where it begins, beside what it runs, and where it
ends, under one channel; a reduce-scatter is a fusion named all-reduce-scatter; a loop's length is in its condition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

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
