"""What a TPU chip of each generation can do, and what published trainings got out of it; all with their sources."""

from __future__ import annotations

import dataclasses

from jaxprm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Model FLOPs by peak FLOPs of published trainings, the lowest and the highest; attention is counted causally."""

    low: float
    high: float
    source: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    flops: FLOP/s in bfloat16, which float32 products on a TPU run in too unless they are asked for more. hbm: bytes/s.
    interconnect: bytes/s that leave it over all its links; vendors count both directions, which is twice that.
    """

    flops: float
    hbm: float
    interconnect: float
    source: str
    efficiency: Efficiency | None = None


# By the part of a topology's name that is before the colon.
CHIPS = {
    "v4": Chip(
        275e12,
        1228e9,
        150e9,
        "cloud.google.com/tpu/docs/v4",
        Efficiency(
            0.56,
            0.59,
            "MaxText configs/v4/README.md: 22B and 52B models on v4-128 and v4-384, 154 to 162 TFLOP/s/chip "
            "(attention counted as whole squares)",
        ),
    ),
    "v5e": Chip(
        197e12,
        819e9,
        200e9,
        "cloud.google.com/tpu/docs/v5e",
        Efficiency(
            0.61,
            0.67,
            "MaxText configs/v5e/README.md: 16B and 32B models on v5e-256, 120 and 132 TFLOP/s/chip "
            "(attention counted as whole squares, some 2 % above the count here)",
        ),
    ),
    "v5p": Chip(
        459e12,
        2765e9,
        600e9,
        "cloud.google.com/tpu/docs/v5p",
        Efficiency(
            0.65,
            0.72,
            "MaxText runtime performance results: 32B to 1024B models on v5p-128 to v5p-4096 "
            "(attention counted as whole squares, some 2 % above the count here)",
        ),
    ),
    "v6e": Chip(
        918e12,
        1640e9,
        400e9,
        "cloud.google.com/tpu/docs/v6e",
        Efficiency(
            0.40,
            0.40,
            "tpu-recipes v6e-8 Llama3.1-8B-MaxText, T = 8192: 7,139 tokens/s/chip, published as 45 % with attention "
            "counted as whole squares; 40 % by the count here",
        ),
    ),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 300e9, "cloud.google.com/tpu/docs/tpu7x; a device is half a chip"),
}

# What JAX calls a device of each generation, where that is not its name after "TPU ".
_KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e", "7x": "tpu7x"}


def chip_of_device(kind: str) -> Chip | None:
    """Of a device's `device_kind`, as "TPU v5 lite"; None where it is no TPU, or one that is unknown."""
    name = kind.removeprefix("TPU").strip()
    return CHIPS.get(_KINDS.get(name, name)) if kind.startswith("TPU") else None


def chip_of(topology: str) -> Chip:
    """Of a topology's name, as v5e:2x4. Raises UserError, naming the generations that are known."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise UserError(f"--topology {topology}: generation {generation!r} is unknown; known: {', '.join(CHIPS)}")
    return CHIPS[generation]
