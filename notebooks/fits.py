"""Memory of the chip and the host and disk space that a training run needs, calculated from the model's config.json.

Sizes are in bytes, and are printed in GB (1e9 bytes). Chip sizes are those of the arrays that must exist. XLA adds
temporaries and saves others, which only its compiler knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxprm.model.config import FAMILIES, TransformerConfig
from jaxprm.model.parameters import layer_matrices, parameter_shapes
from notebooks.colab import HOST_LIMIT, Stop

CHIP = 15.75 * 2**30  # usable part of the 16 GB of a v5e, by its compiler
HOST_BASE = 3e9  # TensorFlow, JAX, the tokenizer and the data
CHECKPOINTS = 3  # two are kept, and a third is written before the first is removed
RANK = 16  # default of jaxprm.config.LoraConfig
# Config overrides for each value of TRAIN.
OVERRIDES = {
    "lora": ("trainable=lora", "optimizer=adamw"),
    "adafactor": ("trainable=full", "optimizer=adafactor"),
    "adamw": ("trainable=full", "optimizer=adamw"),
}


class Needs(NamedTuple):
    """parameters, trained: counts; chip: bytes by purpose; checkpoint, host, disk: bytes."""

    parameters: int
    trained: int
    chip: dict[str, int]
    checkpoint: int
    host: float
    disk: float


def parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of the reward model of a language model with this config.json."""
    return sum(math.prod(shape) for shape in parameter_shapes(_sizes(config), reward=True).values())


def _sizes(config: Mapping[str, Any]) -> TransformerConfig:
    heads, width, family = config["num_attention_heads"], config["hidden_size"], config.get("model_type")
    if family not in FAMILIES:
        raise Stop(f"MODEL: model_type {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or FAMILIES[family].head_dim or width // heads,
        intermediate_size=config["intermediate_size"],
        family=family,
    )


def needs(
    config: Mapping[str, Any], *, train: str, rows: int, length: int, microbatches: int, export_bytes: int
) -> Needs:
    """Needs of a training run in bfloat16 that keeps only the input of each layer (`remat="full"`).

    train: a key of OVERRIDES; rows, length: of a batch, in tokens; export_bytes: size of an exported weight, 2 or 4.
    """
    width, layers, ffn = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    total = parameters(config)
    matrix_edges = sum(inputs + outputs for inputs, outputs in layer_matrices(_sizes(config)).values())
    trained = total if train != "lora" else width + layers * RANK * matrix_edges
    if train == "adafactor":  # one mean per row and per column
        moments = 4 * (layers * matrix_edges + config["vocab_size"] + width)
    else:
        moments = 8 * trained
    tokens = rows * length // microbatches
    chip = {
        "parameters, float32": 4 * total,
        "adapters, float32": 4 * trained if train == "lora" else 0,
        "optimizer": moments,
        # The sum of the batch so far, and those of the microbatch that is computed.
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
        # The host holds a copy of a checkpoint while it is written, and later the whole finished model.
        host=HOST_BASE + max(checkpoint, 4 * total),
        disk=CHECKPOINTS * checkpoint + (4 + export_bytes) * total,
    )


def table(needed: Needs, limit: float = CHIP) -> str:
    """The needs as a table, in GB."""
    chip = sum(needed.chip.values())
    rows = [(f"  {name}", size) for name, size in needed.chip.items()]
    rows += [(f"chip, of {limit / 1e9:.1f}", chip), ("checkpoint", needed.checkpoint)]
    rows += [("host memory, at most", needed.host), ("disk, at most", needed.disk)]
    head = f"{needed.parameters / 1e6:.0f} M parameters, {needed.trained / 1e6:.1f} M trained; GB:"
    return "\n".join([head, *(f"{name:<36}{size / 1e9:7.2f}" for name, size in rows)])


def check(needed: Needs, *, chip: float = CHIP, disk: float, host: float = HOST_LIMIT) -> None:
    """Raises Stop, with the settings to change, if a need is more than the machine has."""
    chip_total = sum(needed.chip.values())
    for what, need, available, fix in (
        ("chip", chip_total, chip, "TRAIN lora or adafactor, more MICROBATCHES, fewer ROWS, a smaller LENGTH or MODEL"),
        ("host's memory", needed.host, host, "TRAIN lora or adafactor, or a smaller MODEL"),
        ("disk of WORKDIR", needed.disk, disk, "TRAIN lora, free space there, or another WORKDIR"),
    ):
        if need > available:
            raise Stop(f"the {what} has {available / 1e9:.1f} GB, and this needs about {need / 1e9:.1f}: choose {fix}")


def used(folder: Path) -> int:
    """Bytes of the files below a folder: space that a resumed run already uses."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
