"""A plan as JSON, and as text for the terminal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from typing import Any

from jaxprm.model.parameters import parameter_shapes
from jaxprm.planning.compiling import Compilation, Memory
from jaxprm.planning.plan import ASSUMPTIONS, SliceEstimate, StepTimeEstimate
from jaxprm.training.flops import chip_of

GIB = 1 << 30


def as_json(plan: SliceEstimate) -> dict[str, Any]:
    """The plan as JSON types. If the compiler refused the step, the estimate and unknown figures are null."""
    communication = plan.communication
    # Every key is there in every plan, so that readers need no case distinction.
    estimate = dict.fromkeys(field.name for field in dataclasses.fields(StepTimeEstimate))
    if plan.estimate is not None:
        estimate = dataclasses.asdict(plan.estimate)
    return {
        "fits": plan.fits,
        "topology": plan.topology,
        "devices": plan.devices,
        "mesh": plan.mesh,
        "parameters": _parameters(plan),
        "rows": plan.data.rows,
        "length": plan.data.length,
        "reward_model": plan.settings.label,
        "trainable": plan.settings.trainable,
        "optimizer": plan.settings.optimizer,
        "dtype": plan.settings.dtype,
        "remat": plan.settings.remat,
        "microbatches": plan.settings.microbatches,
        "attention": plan.attention,
        "bytes_per_device": _bytes(plan.training.memory),
        "free_bytes_per_device": plan.training.memory.limit - plan.training.memory.total,
        "refused": plan.training.refused or None,
        "flops_per_step": plan.flops.model,
        "flops": dataclasses.asdict(plan.flops),
        "tokens_per_step": plan.tokens,
        "collectives": {} if communication is None else communication.counts,
        "sent_bytes_per_device": {} if communication is None else communication.sent,
        "host_transfers": len(plan.transfers),
        "compile_seconds": round(plan.step.seconds, 1),
        "estimate": estimate | _chip(plan),
        "assumptions": list(ASSUMPTIONS),
        "features": _program(plan.features),
        "scorer": _program(plan.scoring),
        "versions": _versions(),
    }


def as_text(plan: SliceEstimate) -> str:
    """The plan as lines for the terminal: memory, FLOPs, communication, and the estimates with their assumptions."""
    memory, settings = plan.training.memory, plan.settings
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{plan.topology}: {mesh}",
        f"{_si(_parameters(plan))} parameters, {settings.trainable} trained by {settings.optimizer}, "
        f"{settings.dtype}, remat {settings.remat}, {plan.attention} attention",
        f"{plan.data.rows} rows of {plan.data.length} tokens = {plan.tokens:,} tokens a step"
        + (f" in {settings.microbatches} microbatches" if settings.microbatches > 1 else ""),
        "",
        f"memory     {_memory(memory)}",
        f"           {verdict(memory)}",
    ]
    if plan.features is not None:
        lines.append(f"features   {verdict(plan.features.memory)}; the step itself: {verdict(plan.step.memory)}")
    if plan.scoring is not None:
        lines.append(f"scorer     one chip, float32: {verdict(plan.scoring.memory)}")
    flops = plan.flops
    lines += [
        f"FLOPs      {_si(flops.model)} a step by formula (forward {_si(flops.forward)}, backward "
        f"{_si(flops.backward)}" + (f", target {_si(flops.target)}" if flops.target else "") + "); "
        f"recomputed {_si(flops.recomputed)}, masked {_si(flops.masked)}"
    ]
    if plan.communication is not None:
        counts, sent = plan.communication.counts, plan.communication.sent
        collectives = ", ".join(f"{count} {name} ({_size(sent[name])})" for name, count in sorted(counts.items()))
        lines.append(f"between    {collectives or 'nothing is sent'} from each device in a step; {_host(plan)}")
    lines.append(f"compiled   in {plan.step.seconds:.0f} s" + (": refused" if plan.step.refused else ""))
    if plan.training.refused:
        lines.append(f"           {plan.training.refused}")
    return "\n".join(lines + _estimates(plan))


def verdict(memory: Memory) -> str:
    """Whether a program fits, and how much memory is free or missing."""
    free, needed = memory.limit - memory.total, f"{_size(memory.total)} of {_size(memory.limit)}"
    return f"fits: {needed}, {_size(free)} free" if memory.fits else f"does not fit: {needed}, {_size(-free)} too much"


def _estimates(plan: SliceEstimate) -> list[str]:
    time, chip = plan.estimate, _chip(plan)
    if time is None:
        return []
    fastest = time.bound_tokens_per_second_per_chip
    lines = [
        "",
        f"bound      (estimate) a step takes at least {_seconds(time.bound_seconds)}, {time.binds} binds: compute "
        f"{_seconds(time.compute_seconds)}, memory {_seconds(time.memory_seconds)}, interconnect "
        f"{_seconds(time.interconnect_seconds)}; at most {fastest:,.0f} tokens/s/chip",
    ]
    if time.expected:
        tokens = plan.tokens / plan.devices
        lines.append(
            # The longer time is that of the lowest published efficiency, so its MFU is the least to expect.
            f"expected   (estimate) {_seconds(time.best_seconds)} to {_seconds(time.step_seconds)} a step, "
            f"{tokens / time.step_seconds:,.0f} to {tokens / time.best_seconds:,.0f} tokens/s/chip, "
            f"MFU {time.mfu:.0%} or more, if it is as efficient as {chip['efficiency']['source']}"
        )
    else:
        lines.append("expected   nothing published to go by for this generation")
    peaks = chip["peaks"]
    lines.append(
        f"peaks      {peaks['flops'] / 1e12:.0f} TFLOP/s, memory {peaks['hbm'] / 1e9:.0f} GB/s, links "
        f"{peaks['interconnect'] / 1e9:.0f} GB/s ({peaks['source']})"
    )
    return lines + [f"assumed    {text}" for text in ASSUMPTIONS]


def _chip(plan: SliceEstimate) -> dict[str, Any]:
    peaks = dataclasses.asdict(chip_of(plan.topology))
    return {"efficiency": peaks.pop("efficiency"), "peaks": peaks}


def _parameters(plan: SliceEstimate) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(plan.model, reward=True).values())


def _program(program: Compilation | None) -> dict[str, Any] | None:
    if program is None:
        return None
    return {
        "fits": program.memory.fits,
        "bytes_per_device": _bytes(program.memory),
        "compile_seconds": round(program.seconds, 1),
        "refused": program.refused or None,
    }


def _bytes(memory: Memory) -> dict[str, int | None]:
    return dataclasses.asdict(memory)


def _memory(memory: Memory) -> str:
    parts = [("arguments", memory.arguments), ("temporaries", memory.temporaries), ("program", memory.program)]
    if memory.outputs is not None:
        # Most outputs reuse the memory of donated arguments, which is counted there.
        parts.insert(1, ("outputs of their own", memory.outputs - memory.aliased))
    return "a device: " + ", ".join(f"{name} {_size(size)}" for name, size in parts if size is not None)


def _versions() -> dict[str, str | None]:
    """Versions of the packages that decide the numbers; None for a build that is not installed as a package."""
    versions: dict[str, str | None] = {}
    for name in ("jax", "libtpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _host(plan: SliceEstimate) -> str:
    count = len(plan.transfers)
    return f"{count} transfers to or from the host" if count else "no transfer to or from the host"


def _si(count: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} M"


def _size(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if count >= size / 10:  # 0.10 GiB, not 102.40 MiB: most sizes of a plan then share a unit
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
