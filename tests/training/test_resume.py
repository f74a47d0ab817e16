"""A killed run, resumed, ends with the same bits as one that was not killed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.crash_runs import KILLED, Trainer
from benchmarks.killed_training import NAMED
from jaxprm.artifacts.checkpoints import inspect
from jaxprm.errors import RESUMABLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("runs"), toy)


@pytest.fixture(scope="module")
def undisturbed(start) -> Path:
    output, status, *_ = start("undisturbed")
    assert status == 0
    return output


def final_checkpoint(output: Path) -> tuple[int, dict, dict]:
    """The last step, every array of its state by name, and the data position with the identity."""
    step = max(int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdigit())
    folder = output / "checkpoints" / str(step)
    arrays = flatten(ocp.StandardCheckpointer().restore(folder / "state"))
    return step, arrays, json.loads((folder / "meta" / "metadata").read_text())


def flatten(tree, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, dict):
        return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {n: leaf for key, value in enumerate(tree) for n, leaf in flatten(value, f"{prefix}/{key}").items()}
    return {} if tree is None else {prefix: np.asarray(tree)}


def assert_same_bits(actual: Path, undisturbed: Path) -> None:
    """Model, every array of the last checkpoint, data position, identity, and what was logged."""
    digests = [
        hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest() for run in (undisturbed, actual)
    ]
    assert digests[0] == digests[1]
    step, arrays, meta = final_checkpoint(undisturbed)
    actual_step, actual_arrays, actual_meta = final_checkpoint(actual)
    assert step == actual_step > 28 and meta == actual_meta and meta["position"]["batches"] == step
    assert {name.split("/")[1] for name in arrays} == {"parameters", "optimizer", "target", "step"}
    assert arrays.keys() == actual_arrays.keys() and len(arrays) > 40
    for name, array in arrays.items():
        assert array.tobytes() == actual_arrays[name].tobytes(), name
    for name in ("metrics.jsonl", "model/reward_model.json"):
        assert (undisturbed / name).read_bytes() == (actual / name).read_bytes(), name
    expected, inspected = inspect(undisturbed), inspect(actual)
    assert inspected["fingerprints"] == expected["fingerprints"] and inspected["step"] == expected["step"] == step


def test_killed_twice_and_resumed_a_run_ends_with_the_same_bits(start, undisturbed):
    # First right after a checkpoint was begun, which may or may not be committed; then well past a committed one.
    killed, status, *_ = start("killed", kill_before=7)
    assert status == KILLED
    _, status, began, _ = start("killed", kill_before=28, wait_for=24)
    assert status == KILLED and began in (0, 6)
    assert len((killed / "metrics.jsonl").read_text().splitlines()) > 24
    _, status, began, _ = start("killed")
    assert status == 0 and began == 24
    assert_same_bits(killed, undisturbed)


def test_a_stopped_run_saves_at_once_and_says_how_to_resume(start, undisturbed):
    stopped, status, began, stderr = start("stopped", kill_before=9, signal="SIGTERM")
    assert (status, began) == (RESUMABLE, 0)
    last = stderr.strip().splitlines()[-1]
    assert "told to stop at step 10 of 32; saved in" in last and "checkpoints/10" in last
    assert final_checkpoint(stopped)[2]["position"]["batches"] == 10 and not (stopped / "model").exists()
    _, status, began, _ = start("stopped")
    assert (status, began) == (0, 10)
    assert_same_bits(stopped, undisturbed)


def test_a_run_that_is_stopped_during_its_last_validation_does_not_write_its_model(start, undisturbed):
    stopped, status, *_, stderr = start("late", stop_in_validation=2)
    assert status == RESUMABLE
    assert "told to stop after step 32 of 32; saved in" in stderr.strip().splitlines()[-1]
    assert final_checkpoint(stopped)[0] == 32 and not (stopped / "model").exists()
    assert start("late").status == 0
    assert_same_bits(stopped, undisturbed)


def test_killed_at_every_point_of_a_checkpoint_it_ends_with_the_same_bits(start, undisturbed):
    """One run is killed at each point; the next process resumes from whatever is left."""
    begins = []
    for point in NAMED:
        killed, status, began, _ = start("points", kill_at=point)
        assert status == KILLED, point
        begins.append(began)
    assert begins[0] == 0 and begins[3] >= 12 and begins == sorted(begins)
    _, status, *_ = start("points")
    assert status == 0
    assert_same_bits(killed, undisturbed)
