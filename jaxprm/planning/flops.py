"""Floating-point operations of a training step, by formula: of its matrix products, where nearly all of them are.

A compiler's own count takes the body of a loop once, and that of a kernel not at all.
Letters: D model, H heads, K kv heads, E head dim, F ffn, L layers, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxprm import config as config_lib
from jaxprm.model.attention import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK
from jaxprm.model.transformer import TransformerConfig
from jaxprm.training.step import has_target_network, reads_states

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
        from jaxprm.model.splash import BLOCKS

        size = next((block for block in BLOCKS if length % block == 0), length)
    else:
        size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    return sum((end - start) * end for start, end in zip(range(0, length, size), ends, strict=True))


def matrices(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of a layer, by name."""
    width, ffn = config.hidden_size, config.intermediate_size
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "query": (width, query), "key": (width, kv), "value": (width, kv), "output": (query, width),
        "gate": (width, ffn), "up": (width, ffn), "down": (ffn, width),
    }  # fmt: skip


def train_step_flops(
    config: TransformerConfig, settings: config_lib.RewardModel, data: config_lib.Data, attention: Attention
) -> StepFlops:
    """Of a batch of full rows. With the head alone trained no transformer is in the step."""
    reads = data.rows * data.steps_per_row * (1 + reads_states(settings))
    head = 2.0 * reads * config.hidden_size
    passes = 1.0 * has_target_network(settings)
    if settings.trainable == "head":
        return StepFlops(head, head, passes * head, 0.0, 0.0)  # its input has no gradient
    tokens, sizes = data.rows * data.length, matrices(config)
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


def forward_passes(settings: config_lib.RewardModel) -> float:
    """How often a step goes through the layers' weights: forward, backward, again, and for the target network."""
    if settings.trainable == "head":
        return 0.0
    return 2.0 + (settings.remat == "full") + has_target_network(settings)
