"""scripts/tpu_check.py: the devices that a worker must see before a run may start."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest

from tests.launcher.fakes import ROOT

PATH = ROOT / "scripts" / "tpu_check.py"
problem = runpy.run_path(str(PATH))["problem"]


@pytest.mark.parametrize(
    "platforms, local, devices, workers, words",
    [
        (["tpu"] * 8, 8, 8, 1, None),
        (["tpu"] * 16, 4, 16, 4, None),
        (["cpu"], 1, 8, 1, "sees no TPU but platform cpu"),
        (["tpu"] * 8, 8, 16, 4, "sees 8 of its 4 chips"),
        (["tpu"] * 12, 4, 16, 4, "sees 12 chips in the slice, expected 16"),
        (["tpu"] * 3, 3, 4, 1, "sees 3 of its 4 chips"),
    ],
)
def test_what_is_wrong_is_named(platforms, local, devices, workers, words):
    message = problem(platforms, local, devices, workers)
    assert message is None if words is None else words in message


@pytest.mark.parametrize("platforms, words", [("cpu", "sees no TPU but platform cpu"), ("tpu,cpu", "sees no TPU: ")])
def test_this_machine_has_no_tpu(platforms, words):
    """With the real jax: it uses the CPU, or raises if a TPU is requested and missing."""
    environment = os.environ | {"JAX_PLATFORMS": platforms, "TPU_SKIP_MDS_QUERY": "1"}
    process = subprocess.run([sys.executable, str(PATH), "1", "1"], env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    assert words in process.stdout.splitlines()[-1]
