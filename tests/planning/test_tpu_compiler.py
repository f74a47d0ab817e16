"""The real TPU compiler, on a machine without a TPU: a small model's training step for eight chips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm.hf.config import hf_config
from jaxprm.model.config import TransformerConfig

ROOT = Path(__file__).parents[2]
# Figures of one version of the compiler; another may need more, which is then to be looked at and recorded.
RECORDED = json.loads((Path(__file__).parent / "recorded_memory.json").read_text())
MODEL = TransformerConfig(
    vocab_size=1024, hidden_size=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate_size=512
)


@pytest.mark.slow
def test_a_small_model_fits_sends_nothing_to_the_host_and_has_not_grown(tmp_path):
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
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["scorer"]["fits"]
    assert found["attention"] == "splash"
    assert found["host_transfers"] == 0
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= set(found["collectives"])
    # Parameters and moments over four devices, in float32; norms and the head are whole on each.
    state = found["parameters"] * 4 * 3 / 4
    assert found["bytes_per_device"]["arguments"] == pytest.approx(state, rel=0.1)
    assert found["bytes_per_device"]["limit"] == pytest.approx(15.75 * 2**30)
    for program, sizes in (("step", found["bytes_per_device"]), ("scorer", found["scorer"]["bytes_per_device"])):
        for part, recorded in RECORDED[program].items():
            said = f"{program}: {part} {sizes[part]}, recorded {recorded} with {RECORDED['versions']}"
            assert 0.5 * recorded <= sizes[part] <= 1.05 * recorded, said
