"""Every cell of the Colab notebook, on the CPU with a small random model: cut off in its training, then run again."""

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
BEFORE = 5  # steps that are saved when the machine is taken away


class Done(NamedTuple):
    folder: Path
    cells: dict[str, str]  # what each printed, by id
    reached: int  # the step of the checkpoint that is gone on from


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("colab")
    base_model.write(folder / "base")
    settings = {
        "CODE": str(notebook.ROOT),
        "WORKDIR": str(folder / "work"),
        "MODEL": str(folder / "base"),
        "PLATFORM": "cpu",
        "LENGTH": 1024,
        "ROWS": 4,
        "EPOCHS": 1,
        "LEARNING_RATE": 1e-3,
        "CHECKPOINT_MINUTES": 0.01,
    }
    nbformat.write(notebook.with_settings(notebook.load(), **settings), folder / "in.ipynb")
    cut_off(start(folder, "first.ipynb"), training(folder) / "checkpoints")
    assert not (training(folder) / "model").exists()
    # As the page has it where Drive had not sent all of the newest: the one before is taken.
    *_, reached, newest = sorted(steps(training(folder) / "checkpoints"))
    shutil.rmtree(training(folder) / "checkpoints" / str(newest))
    again = start(folder, "second.ipynb")
    said, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said.decode()[-3000:]
    cells = nbformat.read(folder / "second.ipynb", as_version=4).cells
    shown = {
        one.id: "".join(output.get("text", "") for output in one.outputs) for one in cells if one.cell_type == "code"
    }
    assert all(one.execution_count for one in cells if one.cell_type == "code")
    return Done(folder, shown, reached)


def start(folder: Path, output: str) -> subprocess.Popen:
    command = [sys.executable, Path(__file__).with_name("execute.py"), "in.ipynb", output]
    return subprocess.Popen(command, cwd=folder, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def training(folder: Path) -> Path:
    return folder / "work/run/reward_models/agentprm/seed-0"


def steps(checkpoints: Path) -> list[int]:
    """Those that are committed: until then their names are others."""
    return [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]


def cut_off(process: subprocess.Popen, checkpoints: Path) -> None:
    """Kills the notebook, its kernel and its command once there are two checkpoints, of step BEFORE and later."""
    end = time.monotonic() + SECONDS
    while len(found := steps(checkpoints)) < 2 or min(found) < BEFORE:
        assert process.poll() is None, process.communicate()[0].decode()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate()


def test_the_training_goes_on_from_the_checkpoint(done):
    lines = [json.loads(line) for line in (training(done.folder) / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if "value_loss" in line and "validation_loss" not in line]
    assert trained == list(range(1, len(trained) + 1)) and BEFORE <= done.reached < len(trained)
    assert f"| {done.reached}/{len(trained)}" in done.cells["train"]


def test_what_was_finished_is_not_done_again(done):
    assert "trajectories.jsonl is there, and used" in done.cells["import"]
    assert "240 trajectories, 0 bad" in done.cells["validate"]


def test_only_adapters_are_in_the_checkpoints(done):
    recipe = json.loads((training(done.folder) / "model/reward_model.json").read_text())
    assert recipe["config"]["trainable"] == "lora" and recipe["config"]["dtype"] == "bfloat16"


def test_the_export_is_verified_and_scores_every_step(done):
    assert "verified: largest difference" in done.cells["export"]
    model = api.load(done.folder / "work/my-prm")
    trajectory = next(read(done.folder / "work/run/trajectories/validation.jsonl"))
    (found,) = model.score([trajectory])
    written = json.loads((done.folder / "work/scores.jsonl").read_text().splitlines()[0])
    promises = [step["promise"] for step in written["steps"]]
    # The export's weights are rounded to bfloat16.
    assert [step["promise"] for step in found["steps"]] == pytest.approx(promises, abs=0.05)


def test_what_colab_alone_can_do_is_said_to_be_left_out(done):
    assert "not on Drive: nothing to mount" in done.cells["folder"]
    assert "PUSH_TO is empty" in done.cells["push"]


def test_packages_and_platform_are_checked_and_jax_stays(done):
    assert "jax==" in done.cells["packages"] and "stay" in done.cells["packages"]
    assert "(cpu)" in done.cells["platform"]
    assert "M trained" in done.cells["fits"]
    assert "host memory of its largest process" in done.cells["train"]
