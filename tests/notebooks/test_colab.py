"""Every cell of the Colab notebook, on the CPU with a small random model: killed in training, then run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
import pytest

from data_pipeline.trajectory import read
from jaxprm import api
from tests.docs import base_model
from tests.notebooks import notebook

pytestmark = pytest.mark.slow
SECONDS = 900
BEFORE = 5  # steps that are saved before the kill


class Done(NamedTuple):
    folder: Path
    cells: dict[str, str]  # what each printed, by id
    reached: int  # step of the checkpoint from which training resumes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("colab")
    base_model.write(folder / "base")
    settings = {
        "CODE": str(notebook.ROOT),
        "WORKDIR": str(folder / "work"),
        "MODEL": str(folder / "base"),
        "PLATFORM": "cpu",
        "LENGTH": 1280,
        "ROWS": 4,
        "EPOCHS": 1,
        "LEARNING_RATE": 1e-3,
        "CHECKPOINT_MINUTES": 0.01,
    }
    nbformat.write(notebook.with_settings(notebook.load(), **settings), folder / "in.ipynb")
    kill_in_training(start(folder, "first.ipynb"), training(folder) / "checkpoints")
    assert not (training(folder) / "model").exists()
    # As docs/tpu.md says for an incomplete newest checkpoint on Drive: without its folder, the one before is used.
    *_, reached, newest = sorted(steps(training(folder) / "checkpoints"))
    shutil.rmtree(training(folder) / "checkpoints" / str(newest))
    again = start(folder, "second.ipynb")
    output, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, output.decode()[-3000:]
    cells = nbformat.read(folder / "second.ipynb", as_version=4).cells
    shown = {
        cell.id: "".join(part.get("text", "") for part in cell.outputs) for cell in cells if cell.cell_type == "code"
    }
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
    return Done(folder, shown, reached)


def start(folder: Path, output: str) -> subprocess.Popen:
    command = [sys.executable, Path(__file__).with_name("execute.py"), "in.ipynb", output]
    return subprocess.Popen(command, cwd=folder, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def training(folder: Path) -> Path:
    return folder / "work/run/reward_models/agentprm/seed-0"


def steps(checkpoints: Path) -> list[int]:
    """Steps of the committed checkpoints; the name of an uncommitted one is not a number."""
    return [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]


def kill_in_training(process: subprocess.Popen, checkpoints: Path) -> None:
    """Kills the notebook, its kernel and its command once there are two checkpoints, of step BEFORE and later."""
    end = time.monotonic() + SECONDS
    while len(saved := steps(checkpoints)) < 2 or min(saved) < BEFORE:
        assert process.poll() is None, process.communicate()[0].decode()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    for running in [*psutil.Process(process.pid).children(recursive=True), process]:
        running.kill()
    process.communicate()


def test_training_resumes_from_the_checkpoint(done):
    lines = [json.loads(line) for line in (training(done.folder) / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if "value_loss" in line and "validation_loss" not in line]
    assert trained == list(range(1, len(trained) + 1)) and BEFORE <= done.reached < len(trained)
    assert f"| {done.reached}/{len(trained)}" in done.cells["train"]


def test_finished_steps_are_not_repeated(done):
    assert "trajectories.jsonl exists and is used" in done.cells["import"]
    assert "240 trajectories, 0 bad" in done.cells["validate"]


def test_only_adapters_are_in_the_checkpoints(done):
    recipe = json.loads((training(done.folder) / "model/reward_model.json").read_text())
    assert recipe["config"]["trainable"] == "lora" and recipe["config"]["dtype"] == "bfloat16"


def test_the_export_is_verified_and_scores_every_step(done):
    assert "verified: largest difference" in done.cells["export"]
    model = api.load(done.folder / "work/my-prm")
    trajectory = next(read(done.folder / "work/run/trajectories/validation.jsonl"))
    (scored,) = model.score([trajectory])
    written = json.loads((done.folder / "work/scores.jsonl").read_text().splitlines()[0])
    promises = [step["promise"] for step in written["steps"]]
    # The export's weights are rounded to bfloat16.
    assert [step["promise"] for step in scored["steps"]] == pytest.approx(promises, abs=0.05)


def test_steps_that_need_colab_are_reported_as_skipped(done):
    assert "not on Drive: nothing to mount" in done.cells["folder"]
    assert "PUSH_TO is empty" in done.cells["push"]


def test_packages_and_platform_are_checked_and_jax_is_kept(done):
    assert "keeping jax==" in done.cells["packages"]
    assert "(cpu)" in done.cells["platform"]
    assert "M trained" in done.cells["fits"]
    assert "host memory of its largest process" in done.cells["train"]
