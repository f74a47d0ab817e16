"""Import onto eight virtual devices: equal parameters in any layout, and no copy of the model on the host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from jaxprm.hf import writer
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.transformer import RewardModel, Transformer
from tests.model import tiny

ROOT = Path(__file__).parents[2]
# Divisible by eight where layouts split, no two axes of equal size, with head norms and a head of two labels.
CONFIG = TransformerConfig(
    vocab_size=48,
    hidden_size=40,
    layers=8,
    heads=4,
    kv_heads=2,
    head_dim=12,
    intermediate_size=56,
    family="qwen3",
    tie_embeddings=False,
    head=Head(2, bias=True),
)


def run(*arguments: str, devices: int | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.slow
def test_every_layout_holds_the_same_numbers(tmp_path):
    for name, kind in (("causal", Transformer), ("reward", RewardModel)):
        (tmp_path / name).mkdir()
        state = tiny.randomised(nnx.state(kind(CONFIG, rngs=nnx.Rngs(0))), seed=0)
        writer.write_model(tmp_path / name, CONFIG, state, pad_id=0, end_id=1, max_length=64)
    script = Path(__file__).with_name("sharded_import.py")
    assert "layouts that split them" in run(str(script), str(tmp_path), devices=8)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_the_host_holds_no_copy_of_the_model(devices):
    """The parameters are 0.23 GB, so a second copy would exceed the bounds."""
    output = run("-m", "benchmarks.import_export", "--shape", "small", "--devices", str(devices))
    size, peak = (float(number) for number in re.search(r"import: ([\d.]+) GB .* memory ([\d.]+) GB", output).groups())
    assert "kept" in output
    assert 0.2 < size < 0.26
    assert peak < size + 0.13
    written, peak = (
        float(number) for number in re.search(r"export: ([\d.]+) GB .* memory ([\d.]+) GB", output).groups()
    )
    assert written == size and peak < 0.13 and "WRONG" not in output
