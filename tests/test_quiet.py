"""Importing jaxprm keeps other libraries quiet: nothing is printed where libtpu is installed and no TPU is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.toy import walks
from data_pipeline.trajectory import to_line
from jaxprm import quiet
from jaxprm.policies.language_model import default_directory

ROOT = Path(__file__).parents[1]


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


NOISE = re.compile(r"(?i)warning|libtpu|\btpu|absl|tensorflow|transformers|onednn|cuda|\b[EWIF]0000 ")


@pytest.mark.slow
def test_no_verb_prints_messages_of_other_libraries(tmp_path):
    """As a user calls them, with libtpu installed: without the variables that tests set."""
    pytest.importorskip("libtpu")
    (tmp_path / "rows.jsonl").write_text("".join(to_line(row) + "\n" for row in walks(0, "train", 12, 6)))
    config = str(ROOT / "configs/textcraft_tiny.py")
    settings = ["reward_models=[{'label': 'pvm', 'objective': 'pvm', 'beta': 0, 'epochs': 1}]".replace("'", '"')]
    model = "run/reward_models/pvm/seed-0"
    for arguments in (
        ["validate", "rows.jsonl", "--tokenizer", str(default_directory())],
        ["train", config, *settings, "collection.validation_share=0.3", "--data", "rows.jsonl", "--workdir", "run"],
        ["inspect", model],
        ["score", "--model", model, "--input", "rows.jsonl", "--output", "scores.jsonl"],
        ["evaluate", "--model", model, "--input", "run/trajectories/validation.jsonl"],
        ["export", "--model", model, "--output", "export", "--verify"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "jaxprm", *arguments],
            cwd=tmp_path,
            env=bare_environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, (arguments[0], done.stderr)
        lines = re.split(r"[\r\n]+", done.stdout + done.stderr)
        # `export` names the libraries that it compared with.
        noise = [line for line in lines if NOISE.search(line) and not line.startswith("verified")]
        assert not noise, (arguments[0], noise)
