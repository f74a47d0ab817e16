"""The real TPU compiler, on a machine without a TPU: a small model's training step for eight chips."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm.hf.config import hf_config
from jaxprm.model.config import TransformerConfig

ROOT = Path(__file__).parents[2]
# Figures of one version of the compiler. If another needs more, check why and record its figures.
RECORDED = json.loads((Path(__file__).parent / "recorded_memory.json").read_text())
MODEL = TransformerConfig(
    vocab_size=1024, hidden_size=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate_size=512
)


@pytest.mark.slow
def test_a_small_model_fits_without_host_transfers_in_the_recorded_memory(tmp_path):
    config = hf_config(MODEL, reward=False, pad_id=0, end_id=1, max_length=512)
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "jaxprm",
        "plan",
        "configs/forkme.py",
        "reward_models.0.dtype=bfloat16",
        "reward_models.0.remat=full",
        "--model",
        tmp_path,
        "--topology",
        "v5e:2x4",
        "--mesh",
        "data=2,fsdp=4",
        "--batch",
        "16",
        "--length",
        "512",
        "--json",
        tmp_path / "plan.json",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["fits"] and report["scorer"]["fits"]
    assert report["attention"] == "splash"
    assert report["host_transfers"] == 0
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= set(report["collectives"])
    # Parameters and two moments in float32, split over four devices; norms and the head are on every device.
    state_bytes = report["parameters"] * 4 * 3 / 4
    assert report["bytes_per_device"]["arguments"] == pytest.approx(state_bytes, rel=0.1)
    assert report["bytes_per_device"]["limit"] == pytest.approx(15.75 * 2**30)
    for program, sizes in (("step", report["bytes_per_device"]), ("scorer", report["scorer"]["bytes_per_device"])):
        for part, recorded in RECORDED[program].items():
            message = f"{program}: {part} {sizes[part]}, recorded {recorded} with {RECORDED['versions']}"
            assert 0.5 * recorded <= sizes[part] <= 1.05 * recorded, message


@pytest.mark.slow
def test_the_kernel_compiles_for_pairs_whose_actions_are_branches(tmp_path):
    config = hf_config(dataclasses.replace(MODEL, layers=1), reward=False, pad_id=0, end_id=1, max_length=512)
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "jaxprm", "plan", "configs/forkme.py", "reward_models.0.objective=preference"]
    command += ["--model", tmp_path, "--topology", "v5e:2x4", "--mesh", "data=4,fsdp=2", "--batch", "8"]
    command += ["--length", "128", "--json", tmp_path / "plan.json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["fits"] and report["attention"] == "splash" and report["host_transfers"] == 0
