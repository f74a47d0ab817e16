"""Search over meshes, batches and rematerialisation for the frontier of memory and speed, by compiling them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from jaxprm import config as config_lib
from jaxprm.model import sharding
from jaxprm.model.config import TransformerConfig
from jaxprm.planning.compiling import Memory
from jaxprm.planning.plan import Slice, SliceEstimate, make_plan
from jaxprm.planning.report import as_json, verdict

REMATS = ("none", "minimal", "full")  # in the order of less memory and more time
# Bounds of the search, in which every try is a compilation of minutes.
MAX_TENSOR, DOUBLINGS = 8, 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to compile; `rows` is the size of the whole batch, over all devices."""

    mesh: config_lib.MeshConfig
    rows: int
    remat: str


@dataclasses.dataclass(frozen=True)
class MeshSearchResult:
    """A compiled candidate; tokens_per_second_per_chip is None if it does not fit."""

    candidate: Candidate
    memory: Memory
    tokens_per_second_per_chip: float | None
    plan: SliceEstimate | None = None


def search_meshes(
    tpu_slice: Slice,
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    mesh: config_lib.MeshConfig | None,
    policy: TransformerConfig,
    *,
    rows: int | None,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Compiles candidates and shows a line for each as it is done, then the frontier.

    Args:
        mesh: the only mesh to try; None tries those of `meshes`.
        rows: of the first batch, as in `compile_candidates`.

    Returns:
        {"tried": plans, "frontier": plans}, each plan as `as_json` writes it.
    """

    def evaluate(candidate: Candidate) -> MeshSearchResult:
        plan = make_plan(tpu_slice, *_apply(candidate, settings, data), candidate.mesh, policy, scores=False)
        speed = plan.estimate.tokens_per_second_per_chip if plan.estimate and plan.fits else None
        result = MeshSearchResult(candidate, plan.training.memory, speed, plan)
        show(_line(result))
        return result

    devices = len(tpu_slice.devices)
    candidate_meshes = meshes(devices, policy)
    if mesh is not None:
        # With the -1 of an axis replaced by its size.
        candidate_meshes = [config_lib.MeshConfig(**dict(sharding.make_mesh(mesh, tpu_slice.devices).shape))]
    results = list(compile_candidates(candidate_meshes, evaluate, settings=settings, devices=devices, rows=rows))
    best = frontier(results)
    summary = f"{len(best)} of {len(results)} are on the frontier of speed (estimate) and memory:"
    show("\n" + (summary if best else "none fits"))
    for result in best:
        show(_line(result))
    return {"tried": [as_json(result.plan) for result in results], "frontier": [as_json(row.plan) for row in best]}


def meshes(devices: int, config: TransformerConfig) -> list[config_lib.MeshConfig]:
    """Meshes to try: copies of the model, then the model split by rows (fsdp), and by heads too (tensor)."""
    axes = [{"data": devices, "fsdp": 1, "tensor": 1}]
    tensor = 1
    while tensor <= min(MAX_TENSOR, devices):
        sizes = (config.heads, config.kv_heads, config.intermediate_size, config.vocab_size)
        fsdp = devices // tensor
        # Heads, MLP and vocabulary are split over tensor, the model dimension over fsdp.
        if devices % tensor == 0 and not any(size % tensor for size in sizes) and config.hidden_size % fsdp == 0:
            axes.append({"data": 1, "fsdp": fsdp, "tensor": tensor})
        tensor *= 2
    distinct = {tuple(sizes.items()): sizes for sizes in axes}  # on one device they are all the same
    return [config_lib.MeshConfig(**sizes) for sizes in distinct.values()]


def compile_candidates(
    meshes: Sequence[config_lib.MeshConfig],
    evaluate: Callable[[Candidate], MeshSearchResult],
    *,
    settings: config_lib.RewardModelConfig,
    devices: int,
    rows: int | None = None,
) -> Iterator[MeshSearchResult]:
    """Evaluates, for each mesh, batches that double, each with as little rematerialisation as fits.

    A larger batch needs more memory. So it is not tried with less rematerialisation than the smaller one needed, and
    not at all once a batch does not fit with full rematerialisation.

    rows: of the first batch, rounded up to divide over the mesh; default: the fewest that divide.
    """
    for mesh in meshes:
        parts = devices // mesh.tensor // mesh.sequence * settings.microbatches
        count = parts if rows is None else -(-rows // parts) * parts
        level = 0  # not reset with a larger batch
        for _ in range(DOUBLINGS):
            while level < len(REMATS):
                result = evaluate(Candidate(mesh, count, REMATS[level]))
                yield result
                if result.memory.fits:
                    break
                level += 1
            if level == len(REMATS):
                break
            count *= 2


def frontier(results: Sequence[MeshSearchResult]) -> list[MeshSearchResult]:
    """The results that fit and that no other beats in both memory and speed; the fastest first."""
    fits = [result for result in results if result.memory.fits and result.tokens_per_second_per_chip is not None]
    fits.sort(key=lambda result: (-result.tokens_per_second_per_chip, result.memory.total))
    best: list[MeshSearchResult] = []
    for result in fits:
        # All results so far are at least as fast, so this one must need less memory than any of them.
        if not best or result.memory.total < best[-1].memory.total:
            best.append(result)
    return best


def _apply(
    candidate: Candidate, settings: config_lib.RewardModelConfig, data: config_lib.DataConfig
) -> tuple[config_lib.RewardModelConfig, config_lib.DataConfig]:
    """(settings, data) with the candidate's rematerialisation and rows."""
    return (
        msgspec.structs.replace(settings, remat=candidate.remat),
        msgspec.structs.replace(data, rows=candidate.rows),
    )


def _line(result: MeshSearchResult) -> str:
    """The options that select a candidate, and what came out."""
    candidate = result.candidate
    sizes = {axis: getattr(candidate.mesh, axis) for axis in ("data", "fsdp", "tensor", "sequence")}
    axes = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"
    speed = result.tokens_per_second_per_chip
    estimate = "" if speed is None else f"; {speed:,.0f} tokens/s/chip (estimate)"
    return f"--mesh {axes} --batch {candidate.rows} remat={candidate.remat}: {verdict(result.memory)}{estimate}"
