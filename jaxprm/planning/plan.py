"""A plan: the training step and the scorer compiled for a TPU slice, their memory, and a roofline of the step time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxprm import config as config_lib
from jaxprm.model import sharding
from jaxprm.model.attention import packed_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.parameters import layer_matrices
from jaxprm.model.transformer import reward_model_graph
from jaxprm.planning import compiling
from jaxprm.planning.compiling import Compilation, compile_ahead
from jaxprm.planning.hlo import Communication, attention_of, host_transfers, read_communication
from jaxprm.scoring import engine
from jaxprm.training import reward_model
from jaxprm.training.flops import Chip, StepFlops, chip_of, forward_passes, train_step_flops
from jaxprm.training.programs import batch_fields, batch_shapes, data_fields, make_programs

# The learning rate's schedule needs a length, a constant in the program that changes neither memory nor time.
STEPS = 1000

ASSUMPTIONS = (
    "bound: rows full of tokens; products, recomputed and masked ones too, at the peak of bfloat16, memory and links "
    "at theirs, all at the same time; nothing else takes time",
    "bound, memory: arguments read and outputs written once, temporaries written and read once, the layers' weights "
    "read once a pass; bound, interconnect: what the compiled collectives send, as rings over all links of a chip",
    "expected: the efficiency of tuned training runs of larger models; a small model's narrow products reach less",
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A described TPU slice: its devices, and the bytes of HBM that a program may use on each."""

    topology: str
    devices: tuple[Any, ...]
    limit: int

    @property
    def chip(self) -> Chip:
        return chip_of(self.topology)


@dataclasses.dataclass(frozen=True)
class StepTimeEstimate:
    """Roofline lower bound on the step time, and an expected step time from published MFU. Times in seconds.

    binds: the largest of compute, memory and interconnect, which is the bound. step_seconds, mfu and
    tokens_per_second_per_chip follow from the lowest published efficiency, best_seconds from the highest; none is
    faster than the bound. Where nothing is published they are the bound itself, and `expected` is False.
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


@dataclasses.dataclass(frozen=True)
class SliceEstimate:
    """The programs compiled for a slice, and what follows from them. flops and tokens are of a step, over all devices.

    features: the pass that runs once over the data if only the head is trained. scoring: finished trajectories on one
    chip. communication and estimate are None if the compiler refused the step.
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
        """The program of training that needs more memory."""
        programs = [self.step] if self.features is None else [self.step, self.features]
        # They run one after the other, so the larger one decides.
        return max(programs, key=lambda program: program.memory.total)

    @property
    def fits(self) -> bool:
        return self.training.memory.fits


def open_slice(topology: str) -> Slice:
    """The slice of a topology such as v5e:2x4. Raises UserError for an unknown name."""
    devices = compiling.devices_of(topology)
    return Slice(topology, tuple(devices), compiling.memory_limit(devices[0]))


def make_plan(
    tpu_slice: Slice,
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    mesh: config_lib.MeshConfig,
    policy: TransformerConfig,
    *,
    scores: bool = True,
) -> SliceEstimate:
    """Compiles the step of `train`, jitted as there, and with `scores` the program that `score` runs.

    policy: the config of the model that the reward model starts from.

    Raises UserError for a mesh, a batch or a model that does not divide, as training would.
    """
    config = reward_model.from_policy_config(policy, settings)
    device_mesh = sharding.make_mesh(mesh, tpu_slice.devices)
    sharding.check_rows(device_mesh, data.rows, data.length, settings.microbatches)
    programs = make_programs(settings, config, device_mesh, length=data.length, steps=STEPS, seed=0)
    batch = batch_shapes(batch_fields(settings), data, config, device_mesh)
    # From shapes alone: these are the jitted functions of training, and no weights are read.
    step = compile_ahead(programs.train_step, programs.state, batch, programs.frozen, limit=tpu_slice.limit)
    features = None
    if settings.trainable == "head":
        # The step then reads hidden states, which this program computes once from the full batch.
        full_batch = batch_shapes(data_fields(settings), data, config, device_mesh)
        features = compile_ahead(programs.features_step, programs.parameters, full_batch, limit=tpu_slice.limit)
    # Where only the head is trained, attention is in the pass over the data. A refused program has no text.
    text = (features or step).text
    chosen = "reference" if programs.forward_options.attend is packed_attention else "splash"
    attention = attention_of(text) if text else chosen
    flops = train_step_flops(config, settings, data, attention)
    communication = read_communication(step.text, len(tpu_slice.devices)) if step.text else None
    estimate = None
    if communication is not None:
        estimate = _step_time(tpu_slice, settings, data, config, device_mesh, step, flops, communication)
    return SliceEstimate(
        settings=settings,
        data=data,
        model=config,
        topology=tpu_slice.topology,
        devices=len(tpu_slice.devices),
        mesh=dict(device_mesh.shape),
        step=step,
        features=features,
        scoring=_compile_scorer(tpu_slice, config, data.length) if scores else None,
        flops=flops,
        attention=attention,
        communication=communication,
        transfers=tuple(host_transfers(step.text)),
        estimate=estimate,
    )


def _compile_scorer(tpu_slice: Slice, config: TransformerConfig, length: int) -> Compilation:
    """`score` on one chip in float32: rows of the length bucket that such trajectories fall into."""
    # `score` refuses longer trajectories, so rows of training that are longer hold several.
    bucket = engine.bucket_of(min(length, engine.LENGTH_BUCKETS[-1]), "plan")
    device = SingleDeviceSharding(tpu_slice.devices[0])

    def on_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    rows = max(1, engine.TOKENS_A_CALL // bucket)
    parameters = jax.tree.map(on_device, reward_model.abstract(config))
    tokens, counts = (on_device(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in ((rows, bucket), (rows,)))
    arguments = (reward_model_graph(config), parameters, tokens, counts, jnp.dtype(jnp.float32))
    return compile_ahead(engine.values_of_rows, *arguments, limit=tpu_slice.limit)


def _step_time(
    tpu_slice: Slice,
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    config: TransformerConfig,
    mesh: jax.sharding.Mesh,
    step: Compilation,
    flops: StepFlops,
    communication: Communication,
) -> StepTimeEstimate:
    memory = step.memory
    weights = config.layers * sum(inputs * outputs for inputs, outputs in layer_matrices(config).values())
    # fsdp gathers the weights before they are read; tensor parallelism reads a part of them on each device.
    read = forward_passes(settings) * weights * jnp.dtype(settings.dtype).itemsize / mesh.shape["tensor"]
    # As ASSUMPTIONS says: arguments are read, outputs written, temporaries written and read.
    return estimate_step_time(
        tpu_slice.chip,
        len(tpu_slice.devices),
        model_flops=flops.model,
        computed_flops=flops.computed,
        memory_bytes=memory.arguments + memory.outputs + 2 * memory.temporaries + read * settings.microbatches,
        sent_bytes=sum(communication.sent.values()),
        tokens=data.rows * data.length,
    )


def estimate_step_time(
    chip: Chip,
    devices: int,
    *,
    model_flops: float,
    computed_flops: float,
    memory_bytes: float,
    sent_bytes: float,
    tokens: int,
) -> StepTimeEstimate:
    """Roofline of a step (Williams et al. 2009), and the time that published MFU predicts.

        bound    = max(computed_flops / devices / peak, memory_bytes / bandwidth, sent_bytes / links)
        expected = max(bound, model_flops / devices / peak / MFU)

    Args:
        model_flops, computed_flops: of a step over all devices; recomputed and masked products are only in the latter.
        memory_bytes: through the HBM of one device; sent_bytes: out of one device over its links.
        tokens: of a step over all devices.
    """
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
