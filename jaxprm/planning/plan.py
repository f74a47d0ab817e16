"""A plan: the training step and the scorer compiled for a TPU slice, their memory, and bounds on their time."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import SingleDeviceSharding

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model import sharding
from jaxprm.model.attention import packed_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.parameters import layer_matrices
from jaxprm.model.transformer import reward_model_graph
from jaxprm.planning import compiling
from jaxprm.planning.compiling import (
    Communication,
    Compilation,
    Memory,
    attention_of,
    communication,
    compile_ahead,
    host_transfers,
)
from jaxprm.scoring import engine
from jaxprm.training import reward_model
from jaxprm.training.flops import Chip, StepFlops, chip_of, forward_passes, train_step_flops
from jaxprm.training.programs import batch_fields, batch_shapes, make_programs
from jaxprm.training.step import FIELDS

# Of the learning rate's schedule, whose length is a constant in the program.
STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Slice:
    """A described slice: its devices, and the bytes of HBM that a program gets on each."""

    topology: str
    devices: tuple[Any, ...]
    limit: int

    @property
    def chip(self) -> Chip:
        return chip_of(self.topology)


@dataclasses.dataclass(frozen=True)
class SliceEstimate:
    """What was compiled and what came out. flops, tokens: of a step, over all devices.

    features: the pass that runs once over the data where the head alone is trained; scoring: finished trajectories on
    one chip. communication and estimate are None where the compiler refused the step.
    """

    settings: config_lib.RewardModelConfig
    data: config_lib.DataConfig
    model: TransformerConfig
    topology: str
    devices: int
    mesh: dict[str, int]
    step: Compilation
    features: Compilation | None
    scoring: Compilation | None
    flops: StepFlops
    attention: str
    communication: Communication | None
    transfers: tuple[str, ...]
    estimate: StepTimeEstimate | None

    @property
    def tokens(self) -> int:
        return self.data.rows * self.data.length

    @property
    def training(self) -> Compilation:
        """The larger of the programs that a training needs."""
        parts = [self.step] if self.features is None else [self.step, self.features]
        return max(parts, key=lambda part: part.memory.total)

    @property
    def fits(self) -> bool:
        return self.training.memory.fits


def open_slice(topology: str) -> Slice:
    """Raises UserError for a name that is none."""
    devices = compiling.devices_of(topology)
    return Slice(topology, tuple(devices), compiling.memory_limit(devices[0]))


def make_plan(
    where: Slice,
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    mesh: config_lib.MeshConfig,
    policy: TransformerConfig,
    *,
    scores: bool = True,
) -> SliceEstimate:
    """Compiles the step of `train`, jitted as there, and, where `scores`, the program that `score` runs.

    Raises UserError for a mesh, a batch or a model that does not divide, as training would.
    """
    config = reward_model.from_policy_config(policy)
    placed = sharding.make_mesh(mesh, where.devices)
    sharding.check_rows(placed, data.rows, data.length, settings.microbatches)
    programs = make_programs(settings, config, placed, length=data.length, steps=STEPS, seed=0)
    batch = batch_shapes(batch_fields(settings), data, config, placed)
    step = compile_ahead(programs.train_step, programs.state, batch, programs.frozen, limit=where.limit)
    features = None
    if settings.trainable == "head":
        whole = batch_shapes(FIELDS, data, config, placed)
        features = compile_ahead(programs.features_step, programs.parameters, whole, limit=where.limit)
    scoring = _scoring(where, config, data.length) if scores else None
    text = (features or step).text
    chosen = "reference" if programs.forward_options.attend is packed_attention else "splash"
    attention = attention_of(text) if text else chosen
    flops = train_step_flops(config, settings, data, attention)
    sends = communication(step.text, len(where.devices)) if step.text else None
    return SliceEstimate(
        settings=settings,
        data=data,
        model=config,
        topology=where.topology,
        devices=len(where.devices),
        mesh=dict(placed.shape),
        step=step,
        features=features,
        scoring=scoring,
        flops=flops,
        attention=attention,
        communication=sends,
        transfers=tuple(host_transfers(step.text)),
        estimate=None if sends is None else _estimate(where, settings, data, config, placed, step, flops, sends),
    )


def _scoring(where: Slice, config: TransformerConfig, length: int) -> Compilation:
    """`score` on one chip, which is how it runs: rows of the length bucket that such trajectories come in."""
    bucket = engine.bucket_of(min(length, engine.LENGTH_BUCKETS[-1]), "plan")
    place = SingleDeviceSharding(where.devices[0])

    def put(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    rows = max(1, engine.TOKENS_A_CALL // bucket)
    parameters = jax.tree.map(put, reward_model.abstract(config))
    tokens, counts = (put(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in ((rows, bucket), (rows,)))
    arguments = (reward_model_graph(config), parameters, tokens, counts, jnp.dtype(jnp.float32))
    return compile_ahead(engine.values_of_rows, *arguments, limit=where.limit)


def _estimate(
    where: Slice,
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    config: TransformerConfig,
    mesh: jax.sharding.Mesh,
    step: Compilation,
    flops: StepFlops,
    sends: Communication,
) -> StepTimeEstimate:
    memory = step.memory
    weights = config.layers * sum(inputs * outputs for inputs, outputs in layer_matrices(config).values())
    read = forward_passes(settings) * weights * jnp.dtype(settings.dtype).itemsize / mesh.shape["tensor"]
    return estimate(
        where.chip,
        len(where.devices),
        model_flops=flops.model,
        computed_flops=flops.computed,
        memory_bytes=memory.arguments + memory.outputs + 2 * memory.temporaries + read * settings.microbatches,
        sent_bytes=sum(sends.sent.values()),
        tokens=data.rows * data.length,
    )


def mesh_of(text: str, base: config_lib.MeshConfig) -> config_lib.MeshConfig:
    """`data=-1,fsdp=16`: axes that are not named are 1, and `data` takes what is left where no axis does.

    Raises UserError naming the axis or the size that cannot be.
    """
    axes = tuple(field.name for field in msgspec.structs.fields(base))
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, separator, value = part.strip().partition("=")
        if name not in axes or not separator:
            raise UserError(f"--mesh {text}: {part.strip()!r} is not AXIS=DEVICES; axes are {', '.join(axes)}")
        if name in sizes:
            raise UserError(f"--mesh {text}: {name} is given twice")
        try:
            sizes[name] = int(value)
        except ValueError:
            sizes[name] = 0
        if sizes[name] < -1 or sizes[name] == 0:
            raise UserError(f"--mesh {text}: {name} = {value!r} must be at least 1, or -1 for what is left")
    if "data" not in sizes:
        sizes["data"] = 1 if -1 in sizes.values() else -1
    return config_lib.MeshConfig(**sizes)


def versions() -> dict[str, str | None]:
    """Of what decides the numbers of a plan; None for a build that is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in ("jax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


ASSUMPTIONS = (
    "bound: rows full of tokens; products, recomputed and masked ones too, at the peak of bfloat16, memory and links "
    "at theirs, all at the same time; nothing else takes time",
    "bound, memory: arguments read and outputs written once, temporaries written and read once, the layers' weights "
    "read once a pass; bound, interconnect: what the compiled collectives send, as rings over all links of a chip",
    "expected: the efficiency of tuned trainings of larger models; a small model's narrow products reach less",
)


@dataclasses.dataclass(frozen=True)
class StepTimeEstimate:
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
) -> StepTimeEstimate:
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
    return StepTimeEstimate(
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


REMATS = ("none", "minimal", "full")  # in the order of less memory and more time
MAX_TENSOR, DOUBLINGS = 8, 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is tried: `rows` of the whole batch."""

    mesh: config_lib.MeshConfig
    rows: int
    remat: str


@dataclasses.dataclass(frozen=True)
class MeshSearchResult:
    """A candidate that was compiled; tokens_per_second_per_chip is None where it does not fit."""

    candidate: Candidate
    memory: Memory
    tokens_per_second_per_chip: float | None
    plan: Any = None


def meshes(devices: int, config: TransformerConfig) -> list[config_lib.MeshConfig]:
    """Whole copies, then the model split by rows, and by heads too in as many parts as divide them."""
    found = [{"data": devices, "fsdp": 1, "tensor": 1}]
    tensor = 1
    while tensor <= min(MAX_TENSOR, devices):
        sizes = (config.heads, config.kv_heads, config.intermediate_size, config.vocab_size)
        fsdp = devices // tensor
        if devices % tensor == 0 and not any(size % tensor for size in sizes) and config.hidden_size % fsdp == 0:
            found.append({"data": 1, "fsdp": fsdp, "tensor": tensor})
        tensor *= 2
    return [config_lib.MeshConfig(**one) for one in {tuple(one.items()): one for one in found}.values()]


def staircase(
    meshes: Sequence[config_lib.MeshConfig],
    evaluate: Callable[[Candidate], MeshSearchResult],
    *,
    settings: config_lib.RewardModelConfig,
    devices: int,
    rows: int | None = None,
) -> Iterator[MeshSearchResult]:
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


def frontier(found: Sequence[MeshSearchResult]) -> list[MeshSearchResult]:
    """Those that fit and that no other beats in memory and in speed at once; the fastest first."""
    fits = [one for one in found if one.memory.fits and one.tokens_per_second_per_chip is not None]
    fits.sort(key=lambda one: (-one.tokens_per_second_per_chip, one.memory.total))
    kept: list[MeshSearchResult] = []
    for one in fits:
        if not kept or one.memory.total < kept[-1].memory.total:
            kept.append(one)
    return kept


def changed(
    settings: config_lib.RewardModelConfig, data: config_lib.DataConfig, candidate: Candidate
) -> tuple[Any, Any]:
    """(settings, data) of a candidate."""
    return (
        msgspec.structs.replace(settings, remat=candidate.remat),
        msgspec.structs.replace(data, rows=candidate.rows),
    )
