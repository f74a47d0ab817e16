"""Communication of a compiled program, between devices and with the host, read from its HLO text.

A TPU program holds an asynchronous collective up to three times under one channel: where it begins, next to the
computation it overlaps with, and where it ends. A reduce-scatter is a fusion named all-reduce-scatter. The trip count
of a loop is in its condition.
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
    """Collectives of a program, by name.

    counts: each collective once, in a loop or not. sent: bytes that one device sends in one run, loops as often as they
    run. With ring algorithms a gather or a scatter among n devices sends (n - 1) / n of the array, a reduction twice
    that.
    """

    counts: dict[str, int]
    sent: dict[str, float]


def read_communication(text: str, devices: int) -> Communication:
    """The collectives in the text of an optimized HLO module that is compiled for `devices` devices."""
    computations = dict(_computations(text))
    runs = _runs(computations)
    collectives: dict[tuple, tuple[str, float]] = {}
    for name, lines in computations.items():
        scatters = name.startswith("all-reduce-scatter")
        for line in lines:
            if (match := _COLLECTIVE.search(line)) is None:
                continue
            shape, kind, started = match.groups()
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            channel = re.search(r"channel_id=(\d+)", line)
            # The up to three parts of an asynchronous collective are one: the largest has its bytes.
            key = (kind, channel[1] if channel else (name, line))
            arrays = _ARRAY.findall(shape)
            if started and kind in ("all-gather", "collective-permute"):
                # Its shape is a tuple: operands, results, and scalars for the synchronization.
                arrays = [array for array in arrays if array[1]]
                arrays = arrays[len(arrays) // 2 :]
            size = sum(_bytes(*array) for array in arrays)
            sent = _sent(kind, size, _group_size(line, devices), scattered=not scatters) * runs[name]
            if key not in collectives or collectives[key][1] < sent:
                collectives[key] = (kind, sent)
    sent: Counter = Counter()
    for kind, amount in collectives.values():
        sent[kind] += amount
    return Communication(dict(Counter(kind for kind, _ in collectives.values())), dict(sent))


def host_transfers(text: str) -> list[str]:
    """The lines of a program's text that move data to or from the host while it runs."""
    return [line.strip() for line in text.splitlines() if _HOST.search(line)]


def attention_of(text: str) -> str:
    """The attention in a program's text: "splash", whose kernel leaves its name, or "reference"."""
    return "splash" if "splash_mha" in text else "reference"


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of every computation; the lines of the entry start with its header."""
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


def _runs(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program, by its name."""
    callees: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            trips = 1
            if loop := _BODY.search(line):
                trips = _trips(line, computations.get(loop[1], []))
            called = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                called += [callee.strip().lstrip("%") for callee in group.split(",")]
            # A line that names a computation twice (calls and to_apply) runs it once.
            callees[name] += [(callee, trips) for callee in dict.fromkeys(called)]
    entry = next((name for name, lines in computations.items() if lines and lines[0].startswith("ENTRY")), None)
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        runs[name] += count
        for callee, trips in callees[name]:
            visit(callee, count * trips)

    if entry is not None:
        visit(entry, 1)
    return runs


def _trips(line: str, condition: list[str]) -> int:
    """Trip count of a loop: as annotated, or the constant that its counter is compared with, or 1 without either."""
    if annotated := _TRIPS.search(line):
        return int(annotated[1])
    constants = [int(n) for text in condition for n in re.findall(r" = s32\[\]\S* constant\((\d+)\)", text)]
    return max(constants, default=1)


def _bytes(dtype: str, dimensions: str) -> float:
    # "pred" has no number in its name, "bf16" and "f8e4m3fn" begin with their bits; a token has no size.
    digits = re.findall(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    return bits / 8 * math.prod(int(size) for size in dimensions.split(",") if size)


def _group_size(line: str, devices: int) -> int:
    """Devices in one group of a collective, in any of the three notations; all of them if no group is listed."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    return devices


def _sent(kind: str, size: float, group: int, *, scattered: bool) -> float:
    """Bytes that a device sends. size: of the result; of the reduced array if the result is not `scattered` yet."""
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter" and scattered:
        size *= group
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group
