"""A plan: the training step and the scorer compiled for a TPU slice, what they need, and how fast they may be."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import SingleDeviceSharding

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model import huggingface
from jaxprm.model.attention import packed_attention
from jaxprm.model.transformer import TransformerConfig
from jaxprm.planning import compiling
from jaxprm.planning.chips import Chip, chip_of
from jaxprm.planning.compiling import Compilation, compile_ahead
from jaxprm.planning.flops import StepFlops, forward_passes, matrices, train_step_flops
from jaxprm.planning.hlo import Communication, attention_of, communication, host_transfers
from jaxprm.planning.roofline import Estimate, estimate
from jaxprm.scoring import engine
from jaxprm.training import reward_model, sharding
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
class Plan:
    """What was compiled and what came out. flops, tokens: of a step, over all devices.

    features: the pass that runs once over the data where the head alone is trained; scoring: finished trajectories on
    one chip. communication and estimate are None where the compiler refused the step.
    """

    settings: config_lib.RewardModel
    data: config_lib.Data
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
    estimate: Estimate | None

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
    settings: config_lib.RewardModel,
    data: config_lib.Data,
    mesh: config_lib.Mesh,
    policy: TransformerConfig,
    *,
    scores: bool = True,
) -> Plan:
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
    chosen = "reference" if programs.compute.attend is packed_attention else "splash"
    attention = attention_of(text) if text else chosen
    flops = train_step_flops(config, settings, data, attention)
    sends = communication(step.text, len(where.devices)) if step.text else None
    return Plan(
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
    arguments = (huggingface.reward_model_graph(config), parameters, tokens, counts, jnp.dtype(jnp.float32))
    return compile_ahead(engine.values_of_rows, *arguments, limit=where.limit)


def _estimate(
    where: Slice,
    settings: config_lib.RewardModel,
    data: config_lib.Data,
    config: TransformerConfig,
    mesh: jax.sharding.Mesh,
    step: Compilation,
    flops: StepFlops,
    sends: Communication,
) -> Estimate:
    memory = step.memory
    weights = config.layers * sum(inputs * outputs for inputs, outputs in matrices(config).values())
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


def mesh_of(text: str, base: config_lib.Mesh) -> config_lib.Mesh:
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
    return config_lib.Mesh(**sizes)


def versions() -> dict[str, str | None]:
    """Of what decides the numbers of a plan; None for a build that is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in ("jax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
