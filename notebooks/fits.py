"""What a training needs of the chip, the host and the disk, by arithmetic on the model's config.json.

Sizes are in bytes, decimal where they are shown. The chip's are those of the arrays that there must be; what XLA adds,
and saves, only its compiler knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxprm.model.config import FAMILIES, TransformerConfig
from jaxprm.model.parameters import layer_matrices, parameter_shapes
from notebooks.colab import HOST_LIMIT, Stop

CHIP = 15.75 * 2**30  # of 16 GB of a v5e, what its compiler gives out
HOST_BASE = 3e9  # TensorFlow, JAX, the tokenizer and the data
CHECKPOINTS = 3  # two are kept, and a third is there before the first is removed
RANK = 16  # jaxprm.config.Lora
# How TRAIN is said in the config.
OVERRIDES = {
    "lora": ("trainable=lora", "optimizer=adamw"),
    "adafactor": ("trainable=full", "optimizer=adafactor"),
    "adamw": ("trainable=full", "optimizer=adamw"),
}


class Needs(NamedTuple):
    """parameters, trained: counts; chip: bytes by what they are for; checkpoint, host, disk: bytes."""

    parameters: int
    trained: int
    chip: dict[str, int]
    checkpoint: int
    host: float
    disk: float


def parameters(config: Mapping[str, Any]) -> int:
    """The number of parameters of the reward model made from a language model with this config.json."""
    return sum(math.prod(shape) for shape in parameter_shapes(_sizes(config), reward=True).values())


def _sizes(config: Mapping[str, Any]) -> TransformerConfig:
    heads, width, family = config["num_attention_heads"], config["hidden_size"], config["model_type"]
    default_head_dim = FAMILIES[family].head_dim if family in FAMILIES else None
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or default_head_dim or width // heads,
        intermediate_size=config["intermediate_size"],
        family=family,
    )


def needs(
    config: Mapping[str, Any], *, train: str, rows: int, length: int, microbatches: int, export_bytes: int
) -> Needs:
    """Of a training with bfloat16 arithmetic that keeps a layer's input alone (`remat="full"`).

    train: a key of OVERRIDES; export_bytes: of an exported weight, 2 or 4.
    """
    width, layers, ffn = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    total = parameters(config)
    edges = sum(inputs + outputs for inputs, outputs in layer_matrices(_sizes(config)).values())
    trained = total if train != "lora" else width + layers * RANK * edges
    if train == "adafactor":  # a mean for each row and each column
        moments = 4 * (layers * edges + config["vocab_size"] + width)
    else:
        moments = 8 * trained
    tokens = rows * length // microbatches
    chip = {
        "parameters, float32": 4 * total,
        "adapters, float32": 4 * trained if train == "lora" else 0,
        "optimizer": moments,
        # Of the batch so far and, beside it, of the part that is computed.
        "gradients": 4 * trained * (2 if microbatches > 1 else 1),
        "parameters, bfloat16": 2 * total,
        "inputs of layers": 2 * layers * tokens * width,
        "one layer, forward and backward": 2 * 2 * tokens * (3 * ffn + 6 * width),
    }
    checkpoint = 4 * trained + moments
    return Needs(
        total,
        trained,
        {name: size for name, size in chip.items() if size},
        checkpoint,
        # A checkpoint is copied before it is written, the finished model fetched as a whole.
        host=HOST_BASE + max(checkpoint, 4 * total),
        disk=CHECKPOINTS * checkpoint + (4 + export_bytes) * total,
    )


def table(found: Needs, limit: float = CHIP) -> str:
    """The needs, line by line, in GB."""
    chip = sum(found.chip.values())
    rows = [(f"  {name}", size) for name, size in found.chip.items()]
    rows += [(f"chip, of {limit / 1e9:.1f}", chip), ("checkpoint", found.checkpoint)]
    rows += [("host memory, at most", found.host), ("disk, at most", found.disk)]
    head = f"{found.parameters / 1e6:.0f} M parameters, {found.trained / 1e6:.1f} M trained; GB:"
    return "\n".join([head, *(f"{name:<36}{size / 1e9:7.2f}" for name, size in rows)])


def check(found: Needs, *, chip: float = CHIP, disk: float, host: float = HOST_LIMIT) -> None:
    """Raises Stop, with what to change, where one of the needs is more than there is."""
    used = sum(found.chip.values())
    for what, need, have, fix in (
        ("chip", used, chip, "TRAIN lora or adafactor, more MICROBATCHES, fewer ROWS, a smaller LENGTH or MODEL"),
        ("host's memory", found.host, host, "TRAIN lora or adafactor, or a smaller MODEL"),
        ("disk of WORKDIR", found.disk, disk, "TRAIN lora, more room there, or another WORKDIR"),
    ):
        if need > have:
            raise Stop(f"the {what} has {have / 1e9:.1f} GB, and this needs about {need / 1e9:.1f}: choose {fix}")


def used(folder: Path) -> int:
    """Bytes of the files below a folder: room that a run which goes on has taken already."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
