"""How long a step takes at least, by what a chip can do, and how long it may take, by what others got out of one."""

from __future__ import annotations

import dataclasses

from jaxprm.planning.chips import Chip

ASSUMPTIONS = (
    "bound: rows full of tokens; products, recomputed and masked ones too, at the peak of bfloat16, memory and links "
    "at theirs, all at the same time; nothing else takes time",
    "bound, memory: arguments read and outputs written once, temporaries written and read once, the layers' weights "
    "read once a pass; bound, interconnect: what the compiled collectives send, as rings over all links of a chip",
    "expected: the efficiency of tuned trainings of larger models; a small model's narrow products reach less",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step and what follows; `binds` names the largest of the three that bound it.

    step_seconds, tokens_per_second_per_chip, mfu: as expected by the lowest published efficiency, never faster than
    the bound; where nothing is published, the bound itself (`expected` is False). best_seconds: by the highest.
    """

    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    binds: str
    bound_seconds: float
    bound_tokens_per_second_per_chip: float
    step_seconds: float
    best_seconds: float
    tokens_per_second_per_chip: float
    mfu: float
    expected: bool


def estimate(
    chip: Chip,
    devices: int,
    *,
    model_flops: float,
    computed_flops: float,
    memory_bytes: float,
    sent_bytes: float,
    tokens: int,
) -> Estimate:
    """Of a step. FLOPs over all devices; bytes through one device's memory and out of it by its links."""
    seconds = {
        "compute": computed_flops / devices / chip.flops,
        "memory": memory_bytes / chip.hbm,
        "interconnect": sent_bytes / chip.interconnect,
    }
    binds = max(seconds, key=seconds.__getitem__)
    bound = seconds[binds]
    step = best = bound
    if chip.efficiency is not None:
        ideal = model_flops / devices / chip.flops
        step, best = (max(bound, ideal / share) for share in (chip.efficiency.low, chip.efficiency.high))
    return Estimate(
        compute_seconds=seconds["compute"],
        memory_seconds=seconds["memory"],
        interconnect_seconds=seconds["interconnect"],
        binds=binds,
        bound_seconds=bound,
        bound_tokens_per_second_per_chip=tokens / bound / devices,
        step_seconds=step,
        best_seconds=best,
        tokens_per_second_per_chip=tokens / step / devices,
        mfu=model_flops / devices / step / chip.flops,
        expected=chip.efficiency is not None,
    )
