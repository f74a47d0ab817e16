"""Any mesh gives the same gradients as one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_mesh(toy):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, str(Path(__file__).with_name("mesh_gradients.py")), str(toy.shards)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report, checkpoint, attention, supervised = map(json.loads, done.stdout.splitlines()[-4:])
    assert set(report) == {"1x1x1x1", "8x1x1x1", "1x8x1x1", "2x2x2x1", "1x2x2x2"}
    for mesh, differences in report.items():
        assert differences["gradient"] < 1e-5, (mesh, differences)
        assert differences["parameters"] < 1e-4, (mesh, differences)
    # Matrices and biases are split over fsdp or tensor, norms and the head are not; data splits no parameter.
    split = {mesh: differences["split"] for mesh, differences in report.items()}
    assert split == {"1x1x1x1": 0, "8x1x1x1": 0, "1x8x1x1": 8, "2x2x2x1": 11, "1x2x2x2": 11}
    # A checkpoint goes from one mesh to another: the same values, the same fingerprints, another layout.
    assert checkpoint["restored"] and checkpoint["fingerprints"]
    assert checkpoint["split"] == [[{}, {"fsdp": 2}, {"tensor": 2}], [{}, {"fsdp": 8}, {}]]
    assert attention["splash"] < 1e-5 and attention["branches"] < 1e-5
    # Step labels next to outcomes, and pairs, whose actions are branches of a row.
    assert supervised["labels"] < 1e-5 and supervised["preference"] < 1e-5
