"""Which meshes, batches and rematerialisations fit a slice, and which of those are worth having."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from jaxprm import config as config_lib
from jaxprm.model.transformer import TransformerConfig
from jaxprm.planning.compiling import Memory

REMATS = ("none", "minimal", "full")  # in the order of less memory and more time
MAX_TENSOR, DOUBLINGS = 8, 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is tried: `rows` of the whole batch."""

    mesh: config_lib.Mesh
    rows: int
    remat: str


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate that was compiled; tokens_per_second_per_chip is None where it does not fit."""

    candidate: Candidate
    memory: Memory
    tokens_per_second_per_chip: float | None
    plan: Any = None


def meshes(devices: int, config: TransformerConfig) -> list[config_lib.Mesh]:
    """Whole copies, then the model split by rows, and by heads too in as many parts as divide them."""
    found = [{"data": devices, "fsdp": 1, "tensor": 1}]
    tensor = 1
    while tensor <= min(MAX_TENSOR, devices):
        sizes = (config.heads, config.kv_heads, config.intermediate_size, config.vocab_size)
        fsdp = devices // tensor
        if devices % tensor == 0 and not any(size % tensor for size in sizes) and config.hidden_size % fsdp == 0:
            found.append({"data": 1, "fsdp": fsdp, "tensor": tensor})
        tensor *= 2
    return [config_lib.Mesh(**one) for one in {tuple(one.items()): one for one in found}.values()]


def staircase(
    meshes: Sequence[config_lib.Mesh],
    evaluate: Callable[[Candidate], Found],
    *,
    settings: config_lib.RewardModel,
    devices: int,
    rows: int | None = None,
) -> Iterator[Found]:
    """Compiles what is worth it, as it goes: rows double, and what does not fit is rematerialised more.

    Once a batch does not fit however it is rematerialised no larger one is tried, and a larger one with less is not
    tried either: it needs more. rows: of the first batch; the fewest that divide where not given.
    """
    for mesh in meshes:
        parts = devices // mesh.tensor // mesh.sequence * settings.microbatches
        count = parts if rows is None else -(-rows // parts) * parts
        level = 0
        for _ in range(DOUBLINGS):
            while level < len(REMATS):
                found = evaluate(Candidate(mesh, count, REMATS[level]))
                yield found
                if found.memory.fits:
                    break
                level += 1
            if level == len(REMATS):
                break
            count *= 2


def frontier(found: Sequence[Found]) -> list[Found]:
    """Those that fit and that no other beats in memory and in speed at once; the fastest first."""
    fits = [one for one in found if one.memory.fits and one.tokens_per_second_per_chip is not None]
    fits.sort(key=lambda one: (-one.tokens_per_second_per_chip, one.memory.total))
    kept: list[Found] = []
    for one in fits:
        if not kept or one.memory.total < kept[-1].memory.total:
            kept.append(one)
    return kept


def changed(settings: config_lib.RewardModel, data: config_lib.Data, candidate: Candidate) -> tuple[Any, Any]:
    """(settings, data) of a candidate."""
    return (
        msgspec.structs.replace(settings, remat=candidate.remat),
        msgspec.structs.replace(data, rows=candidate.rows),
    )
