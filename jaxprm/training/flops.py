"""FLOPs of training steps and forward passes by formula, and what TPU chips can do."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model.attention import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK
from jaxprm.model.config import TransformerConfig
from jaxprm.model.parameters import layer_matrices
from jaxprm.training.step import has_target_network, reads_states


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


Attention = Literal["splash", "reference"]


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of one step over all devices.

    forward, backward: of the trained pass, and what the model's mathematics asks for: attention between T (T + 1) / 2
    pairs. target: the target network's pass. recomputed: what the backward pass computes again. masked: products with
    tokens that are not read, in blocks that hold some that are.
    """

    forward: float
    backward: float
    target: float
    recomputed: float
    masked: float

    @property
    def model(self) -> float:
        return self.forward + self.backward + self.target

    @property
    def computed(self) -> float:
        return self.model + self.recomputed + self.masked


def attended_pairs(length: int, attention: Attention) -> int:
    """Pairs of a query and a key that are multiplied in a row of `length` tokens, read or not."""
    if attention == "splash":
        from jaxprm.model.attention import BLOCKS

        size = next((block for block in BLOCKS if length % block == 0), length)
    else:
        size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    return sum((end - start) * end for start, end in zip(range(0, length, size), ends, strict=True))


def train_step_flops(
    config: TransformerConfig, settings: config_lib.RewardModelConfig, data: config_lib.DataConfig, attention: Attention
) -> StepFlops:
    """Of a batch of full rows. With the head alone trained no transformer is in the step."""
    reads = data.rows * data.steps_per_row * (1 + reads_states(settings))
    head = 2.0 * reads * config.hidden_size
    passes = 1.0 * has_target_network(settings)
    if settings.trainable == "head":
        return StepFlops(head, head, passes * head, 0.0, 0.0)  # its input has no gradient
    tokens, sizes = data.rows * data.length, layer_matrices(config)
    layers, trained_layers = config.layers, settings.last_k if settings.trainable == "last_k" else config.layers
    products = 2.0 * tokens * sum(inputs * outputs for inputs, outputs in sizes.values())  # of a layer
    pair = 4.0 * data.rows * config.heads * config.head_dim  # scores and mixing, of a layer
    read, multiplied = data.length * (data.length + 1) / 2, attended_pairs(data.length, attention)
    adapters = 0.0
    if settings.trainable == "lora":
        adapters = 2.0 * tokens * settings.lora.rank * sum(sum(sizes[name]) for name in settings.lora.targets)
    # A frozen matrix has a gradient of its input alone; a trained one, of itself too.
    backward_products = (1 if settings.trainable == "lora" else 2) * products + 2 * adapters
    forward = layers * (products + adapters + pair * read) + head
    backward = trained_layers * (backward_products + 2 * pair * read) + 2 * head

    # The reference computes a block's weights and mixture again; the kernel its scores in both backward passes, and
    # the gradients of its weights twice: three products of the two that a forward pass has.
    again = 1.0 if attention == "reference" else 1.5
    repeated = 0.0
    if settings.remat != "none":  # the output of attention
        again += 1
    if settings.remat == "full":  # nothing reads what `down` makes
        inputs, outputs = sizes["down"]
        repeated = products - 2.0 * tokens * inputs * outputs + adapters
        if settings.trainable == "lora" and "down" in settings.lora.targets:
            repeated -= 2.0 * tokens * settings.lora.rank * outputs
    recomputed = trained_layers * (repeated + again * pair * multiplied)
    masked = (layers * (1 + passes) + 2 * trained_layers) * pair * (multiplied - read)
    return StepFlops(forward, backward, passes * forward, recomputed, masked)


def forward_passes(settings: config_lib.RewardModelConfig) -> float:
    """How often a step goes through the layers' weights: forward, backward, again, and for the target network."""
    if settings.trainable == "head":
        return 0.0
    return 2.0 + (settings.remat == "full") + has_target_network(settings)


def flops_per_token(config: TransformerConfig, context: int = 0) -> float:
    """FLOPs of one token's forward pass: two per weight of the layers, plus attention over `context` tokens.

    An embedding look-up is no product, and the value head is too small to count.
    """
    weights = sum(inputs * outputs for inputs, outputs in layer_matrices(config).values())
    return 2.0 * config.layers * (weights + 2 * context * config.heads * config.head_dim)
