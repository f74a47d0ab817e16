"""A killed run, resumed, ends with the same bits as one that was not killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxprm import config as config_lib

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CHANGES = {"epochs": 2, "checkpoint_every": 10, "evaluate_every": 15, "target_update": "ema", "bootstrap": "state"}


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory):
    """start(output, kill_before, wait_for): trains in a new process; returns (exit status, first batch it took)."""
    folder = tmp_path_factory.mktemp("runs")
    experiment = msgspec.structs.replace(toy.experiment, reward_models=(toy.settings(**CHANGES),))
    # Compiled programs are shared between the processes: it is the resumption that is looked at.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(output: str, kill_before: int | None = None, wait_for: int | None = None) -> tuple[Path, int, int]:
        arguments = {
            "experiment": config_lib.to_dict(experiment), "shards": str(toy.shards), "base": str(toy.base),
            "output": str(folder / output), "kill_before": kill_before, "wait_for": wait_for,
        }  # fmt: skip
        (folder / "arguments.json").write_text(json.dumps(arguments))
        command = [sys.executable, str(Path(__file__).with_name("killed_training.py")), str(folder / "arguments.json")]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
        return folder / output, done.returncode, json.loads(done.stdout.splitlines()[0])["began"]

    return run


def final_checkpoint(output: Path) -> tuple[int, dict, dict]:
    """The last step, every array of its state by name, and the data position with the identity."""
    step = max(int(one.name) for one in (output / "checkpoints").iterdir() if one.name.isdigit())
    folder = output / "checkpoints" / str(step)
    arrays = flatten(ocp.StandardCheckpointer().restore(folder / "state"))
    return step, arrays, json.loads((folder / "meta" / "metadata").read_text())


def flatten(tree, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, dict):
        return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {n: leaf for key, value in enumerate(tree) for n, leaf in flatten(value, f"{prefix}/{key}").items()}
    return {} if tree is None else {prefix: np.asarray(tree)}


def test_killed_twice_and_resumed_a_run_ends_with_the_same_bits(start):
    whole, status, _ = start("whole")
    assert status == 0
    # First right after a checkpoint was begun, which may or may not be committed; then well past a committed one.
    killed, status, _ = start("killed", kill_before=11)
    assert status == -signal.SIGKILL
    _, status, began = start("killed", kill_before=28, wait_for=20)
    assert status == -signal.SIGKILL and began in (0, 10)
    assert len((killed / "metrics.jsonl").read_text().splitlines()) > 20
    _, status, began = start("killed")
    assert status == 0 and began == 20

    digests = [hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest() for run in (whole, killed)]
    assert digests[0] == digests[1]
    step, arrays, meta = final_checkpoint(whole)
    found_step, found, found_meta = final_checkpoint(killed)
    assert step == found_step > 28 and meta == found_meta and meta["position"]["batches"] == step
    assert {name.split("/")[1] for name in arrays} == {"parameters", "optimizer", "target", "step"}
    assert arrays.keys() == found.keys() and len(arrays) > 40
    for name, array in arrays.items():
        assert array.tobytes() == found[name].tobytes(), name
    for name in ("metrics.jsonl", "model/reward_model.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
