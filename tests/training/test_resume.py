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
def whole(start) -> Path:
    output, status, *_ = start("whole")
    assert status == 0
    return output


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


def assert_same_bits(found: Path, whole: Path) -> None:
    """Model, every array of the last checkpoint, data position, identity, and what was logged."""
    digests = [hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest() for run in (whole, found)]
    assert digests[0] == digests[1]
    step, arrays, meta = final_checkpoint(whole)
    found_step, found_arrays, found_meta = final_checkpoint(found)
    assert step == found_step > 28 and meta == found_meta and meta["position"]["batches"] == step
    assert {name.split("/")[1] for name in arrays} == {"parameters", "optimizer", "target", "step"}
    assert arrays.keys() == found_arrays.keys() and len(arrays) > 40
    for name, array in arrays.items():
        assert array.tobytes() == found_arrays[name].tobytes(), name
    for name in ("metrics.jsonl", "model/reward_model.json"):
        assert (whole / name).read_bytes() == (found / name).read_bytes(), name
    expected, same = inspect(whole), inspect(found)
    assert same["fingerprints"] == expected["fingerprints"] and same["step"] == expected["step"] == step


def test_killed_twice_and_resumed_a_run_ends_with_the_same_bits(start, whole):
    # First right after a checkpoint was begun, which may or may not be committed; then well past a committed one.
    killed, status, *_ = start("killed", kill_before=7)
    assert status == KILLED
    _, status, began, _ = start("killed", kill_before=28, wait_for=24)
    assert status == KILLED and began in (0, 6)
    assert len((killed / "metrics.jsonl").read_text().splitlines()) > 24
    _, status, began, _ = start("killed")
    assert status == 0 and began == 24
    assert_same_bits(killed, whole)


def test_told_to_stop_it_saves_at_once_and_says_how_to_go_on(start, whole):
    stopped, status, began, said = start("stopped", kill_before=9, signal="SIGTERM")
    assert (status, began) == (RESUMABLE, 0)
    last = said.strip().splitlines()[-1]
    assert "told to stop at step 10 of 32; saved in" in last and "checkpoints/10" in last
    assert final_checkpoint(stopped)[2]["position"]["batches"] == 10 and not (stopped / "model").exists()
    _, status, began, _ = start("stopped")
    assert (status, began) == (0, 10)
    assert_same_bits(stopped, whole)


def test_told_to_stop_during_the_last_validation_it_does_not_go_on_to_the_next_training(start, whole):
    stopped, status, *_, said = start("late", stop_in_validation=2)
    assert status == RESUMABLE
    assert "told to stop after step 32 of 32; saved in" in said.strip().splitlines()[-1]
    assert final_checkpoint(stopped)[0] == 32 and not (stopped / "model").exists()
    assert start("late").status == 0
    assert_same_bits(stopped, whole)


def test_killed_at_every_point_of_a_checkpoint_it_ends_with_the_same_bits(start, whole):
    """One run, killed at one point after the other; whatever is left behind, the next process goes on from it."""
    begins = []
    for point in NAMED:
        killed, status, began, _ = start("points", kill_at=point)
        assert status == KILLED, point
        begins.append(began)
    assert begins[0] == 0 and begins[3] >= 12 and begins == sorted(begins)
    _, status, *_ = start("points")
    assert status == 0
    assert_same_bits(killed, whole)
