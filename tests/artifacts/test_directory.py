"""Locating the model or the checkpoint that a path means. The files are empty: nothing is read but names."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxprm.artifacts.directory import DESCRIPTION, find_checkpoint, find_model, is_checkpoint
from jaxprm.errors import UserError


def write_output(output: Path, *steps: int, finished: bool = False) -> Path:
    """A training output with checkpoints of these steps, and a model if it is finished."""
    for step in steps:
        (output / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (output / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()
    (output / DESCRIPTION).mkdir(parents=True)
    (output / DESCRIPTION / "config.json").touch()
    if finished:
        (output / "model").mkdir()
        (output / "model" / "model.safetensors").touch()
    return output


@pytest.fixture
def output(tmp_path) -> Path:
    return write_output(tmp_path / "reward_models/orm/seed-0", 9, 10)


@pytest.mark.parametrize("levels", range(4))
def test_the_newest_checkpoint_of_an_unfinished_run_is_both_model_and_checkpoint(output, levels):
    path = (output, *output.parents)[levels]
    assert find_model(path) == find_checkpoint(path) == output / "checkpoints" / "10"


def test_a_folder_of_checkpoints_and_a_step_are_found_relative_to_the_working_directory(output, monkeypatch):
    monkeypatch.chdir(output)
    assert find_model("checkpoints") == find_checkpoint(Path(".")) == Path("checkpoints/10")
    assert find_model(".") == Path("checkpoints/10")
    monkeypatch.chdir(output / "checkpoints")
    assert find_model(".") == find_checkpoint(Path(".")) == Path("10")
    monkeypatch.chdir(output / "checkpoints" / "9")
    assert find_model(".") == find_checkpoint(Path(".")) == Path(".")


def test_a_finished_model_replaces_its_checkpoints_as_model_only(tmp_path):
    output = write_output(tmp_path / "seed-0", 3, finished=True)
    assert find_model(tmp_path) == output / "model"
    assert find_model(output / "checkpoints") == find_checkpoint(tmp_path) == output / "checkpoints" / "3"


def test_finished_and_unfinished_runs_are_counted_together(tmp_path):
    write_output(tmp_path / "seed-0", 3, finished=True)
    write_output(tmp_path / "seed-1", 4)
    with pytest.raises(UserError, match=r"holds 2 reward models; name one of them: .*seed-0/model, .*seed-1/checkpo"):
        find_model(tmp_path)
    with pytest.raises(UserError, match=r"holds 2 training runs; name one of them: .*seed-0, .*seed-1$"):
        find_checkpoint(tmp_path)


def test_no_more_than_eight_candidates_are_listed(tmp_path):
    for seed in range(10):
        write_output(tmp_path / f"seed-{seed}", finished=True)
    with pytest.raises(UserError, match=r"holds 10 reward models; .*seed-7/model, \.\.\.$"):
        find_model(tmp_path)


def test_an_incomplete_checkpoint_is_none(output):
    incomplete = output / "checkpoints" / "11"
    (incomplete / "state").mkdir(parents=True)
    assert not is_checkpoint(incomplete)
    assert find_checkpoint(output) == output / "checkpoints" / "10"
    (incomplete / "_CHECKPOINT_METADATA").touch()
    assert is_checkpoint(incomplete)
    assert not is_checkpoint(incomplete.rename(incomplete.with_name("11.orbax-checkpoint-tmp")))
