"""FLOPs of a train step and of a forward pass by formula, and the peaks of TPU chips.

tests/planning/test_flops.py compares the formula with a count of every product in the traced step.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model.attention import BLOCKS, MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK
from jaxprm.model.config import TransformerConfig
from jaxprm.model.parameters import layer_matrices
from jaxprm.objectives import has_target_network, reads_states, trains_on_pairs

Attention = Literal["splash", "reference"]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Lowest and highest MFU (model FLOPs by peak FLOPs) of published training runs; attention is counted causally."""

    low: float
    high: float
    source: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    Attributes:
        flops: FLOP/s in bfloat16. By default float32 products on a TPU are computed in bfloat16 too.
        hbm: bytes/s.
        interconnect: bytes/s sent over all links. Vendors count both directions, which is twice that.
        source: where the peaks are published.
    """

    flops: float
    hbm: float
    interconnect: float
    source: str
    efficiency: Efficiency | None = None


# By generation: the part of a topology's name before the colon.
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

# JAX's `device_kind` after "TPU ", where it is not the generation's name.
_KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e", "7x": "tpu7x"}


def chip_of_device(kind: str) -> Chip | None:
    """The chip of a `device_kind` such as "TPU v5 lite"; None if it is no TPU, or an unknown one."""
    name = kind.removeprefix("TPU").strip()
    return CHIPS.get(_KINDS.get(name, name)) if kind.startswith("TPU") else None


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:2x4. Raises UserError if its generation is unknown."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise UserError(f"--topology {topology}: generation {generation!r} is unknown; known: {', '.join(CHIPS)}")
    return CHIPS[generation]


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one train step over all devices.

    Attributes:
        forward, backward: of the trained pass, with causal attention between T (T + 1) / 2 pairs of tokens.
        target: the forward pass of the target network.
        recomputed: computed again in the backward pass.
        masked: attention between pairs that are masked, in blocks where other pairs are not.
    """

    forward: float
    backward: float
    target: float
    recomputed: float
    masked: float

    @property
    def model(self) -> float:
        """FLOPs of the model's mathematics, the numerator of MFU."""
        return self.forward + self.backward + self.target

    @property
    def computed(self) -> float:
        """FLOPs that the devices execute."""
        return self.model + self.recomputed + self.masked


def attended_pairs(length: int, attention: Attention) -> int:
    """Number of pairs of a query and a key that are multiplied in a row of `length` tokens, masked or not."""
    if attention == "splash":
        size = next((block for block in BLOCKS if length % block == 0), length)
    else:
        size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    return sum((end - start) * end for start, end in zip(range(0, length, size), ends, strict=True))


def train_step_flops(
    config: TransformerConfig, settings: config_lib.RewardModelConfig, data: config_lib.DataConfig, attention: Attention
) -> StepFlops:
    """FLOPs of a train step on a batch of full rows. With the head alone trained there is no transformer in it."""
    reads = data.rows * data.steps_per_row * (1 + reads_states(settings))
    head = 2.0 * reads * config.hidden_size * config.head.labels
    passes = 1.0 * has_target_network(settings)
    if settings.trainable == "head":
        return StepFlops(head, head, passes * head, 0.0, 0.0)  # the backward pass has no gradient of the input
    tokens, sizes = data.rows * data.length, layer_matrices(config)
    layers, trained_layers = config.layers, settings.last_k if settings.trainable == "last_k" else config.layers
    # Of one layer: products with its matrices, and attention (scores and the mixture of values) of one pair per row.
    products = 2.0 * tokens * sum(inputs * outputs for inputs, outputs in sizes.values())
    pair = 4.0 * data.rows * config.heads * config.head_dim
    causal, multiplied = data.length * (data.length + 1) / 2, attended_pairs(data.length, attention)
    adapters = 0.0
    if settings.trainable == "lora":
        adapters = 2.0 * tokens * settings.lora.rank * sum(sum(sizes[name]) for name in settings.lora.targets)
    # A frozen matrix needs the gradient of its input only; a trained one also its own.
    backward_products = (1 if settings.trainable == "lora" else 2) * products + 2 * adapters
    forward = layers * (products + adapters + pair * causal) + head
    backward = trained_layers * (backward_products + 2 * pair * causal) + 2 * head

    # The reference recomputes a block's weights and mixture. The kernel recomputes its scores in both of its backward
    # passes, and the gradients of its weights in one: three products, where a forward pass has two.
    attention_again = 1.0 if attention == "reference" else 1.5
    products_again = 0.0
    if settings.remat != "none":  # the output of attention is not kept either
        attention_again += 1
    if settings.remat == "full":  # all but `down`, whose output no gradient reads
        inputs, outputs = sizes["down"]
        products_again = products - 2.0 * tokens * inputs * outputs + adapters
        if settings.trainable == "lora" and "down" in settings.lora.targets:
            products_again -= 2.0 * tokens * settings.lora.rank * outputs
    recomputed = trained_layers * (products_again + attention_again * pair * multiplied)
    masked = (layers * (1 + passes) + 2 * trained_layers) * pair * (multiplied - causal)
    if trains_on_pairs(settings) and attention == "splash":
        # The kernel computes every row once for each of the two actions of a state.
        masked += (layers + (2 + attention_again) * trained_layers) * pair * multiplied
    return StepFlops(forward, backward, passes * forward, recomputed, masked)


def forward_passes(settings: config_lib.RewardModelConfig) -> float:
    """Number of times that a step reads the layers' weights: forward, backward, recomputation, target network."""
    if settings.trainable == "head":
        return 0.0
    return 2.0 + (settings.remat == "full") + has_target_network(settings)


def flops_per_token(config: TransformerConfig, context: int = 0) -> float:
    """FLOPs of the forward pass of one token: two per weight of the blocks, plus attention over `context` tokens.

    Embedding look-ups cost nothing, and the scalar head is too small to count.
    """
    weights = sum(inputs * outputs for inputs, outputs in layer_matrices(config).values())
    return 2.0 * config.layers * (weights + 2 * context * config.heads * config.head_dim)
