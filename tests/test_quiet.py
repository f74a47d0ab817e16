"""Importing jaxprm keeps other libraries quiet: nothing is printed where libtpu is installed and no TPU is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm import quiet


def plug(folder: Path, *devices: tuple[str, str]) -> Path:
    for index, (vendor, kind) in enumerate(devices):
        (folder / str(index)).mkdir()
        (folder / str(index) / "vendor").write_text(vendor + "\n")
        (folder / str(index) / "class").write_text(kind + "\n")
    return folder


def test_tpu_chips_are_counted_and_google_network_cards_are_not(tmp_path):
    tpu, card, gpu = ("0x1ae0", "0x120000"), ("0x1ae0", "0x020000"), ("0x10de", "0x030200")
    assert quiet.tpu_chips(plug(tmp_path, tpu, card, gpu, tpu)) == 2
    assert quiet.tpu_chips(tmp_path / "nothing") == 0


def test_a_machine_with_a_tpu_and_the_users_own_settings_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "tpu").mkdir()
    (tmp_path / "none").mkdir()
    environment = {"TF_CPP_MIN_LOG_LEVEL": "0"}
    quiet.silence(environment, plug(tmp_path / "tpu", ("0x1ae0", "0x120000")))
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == "0" and not any(name.startswith("TPU_") for name in environment)
    environment["TPU_WORKER_HOSTNAMES"] = "mine"
    quiet.silence(environment, tmp_path / "none")
    assert environment["TPU_WORKER_HOSTNAMES"] == "mine" and environment["TPU_SKIP_MDS_QUERY"] == "1"


def bare_environment() -> dict[str, str]:
    """The environment of a user: without the variables that make tests quiet."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "TF_", "ALLOW_"))}


@pytest.mark.parametrize(
    "imports", ["import jaxprm, jax", "import jax, jaxprm", "from data_pipeline import batches; import jax, jaxprm"]
)
def test_looking_for_a_tpu_prints_nothing(imports):
    pytest.importorskip("libtpu")
    script = f"{imports}; print(jax.devices()[0].platform)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare_environment(), capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")
