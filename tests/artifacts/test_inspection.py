"""What a checkpoint says of itself, against digests and sizes computed by hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprm import cli
from jaxprm.artifacts.checkpoints import Checkpoints, inspect
from jaxprm.artifacts.directory import find_checkpoint
from jaxprm.errors import UserError

ROOT = Path(__file__).parents[2]
IDENTITY = {"config": "c", "seed": 3}


def save(directory: Path, *steps: int, scale: float = 1.0) -> Path:
    """Checkpoints of {"parameters": {"b", "a": {"value"}}, "optimizer": (counter, {"mu"})}."""
    checkpoints = Checkpoints(directory / "checkpoints", IDENTITY, config={"label": "some"})
    for step in steps:
        matrix = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) * scale
        state = {
            "parameters": {"b": matrix, "a": {"value": jnp.full(2, step, jnp.bfloat16)}},
            "optimizer": (jnp.int32(step), {"mu": matrix[0]}),
            "step": jnp.int32(step),
        }
        checkpoints.save(step, state, {"batches": step})
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "reward_models/some/seed-0", 3, 12)


def digest(**arrays: np.ndarray) -> str:
    result = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        path = json.dumps([name.replace("__", "/"), str(array.dtype), list(array.shape)])
        result.update(path.encode() + b"\n" + array.tobytes())
    return result.hexdigest()


def test_fingerprints_are_of_every_array_in_the_order_of_their_names(saved):
    result = inspect(saved)
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert result["step"] == 12 and result["position"] == {"batches": 12}
    assert result["fingerprints"] == {
        "parameters": digest(parameters__b=matrix, parameters__a__value=np.full(2, 12, jnp.bfloat16)),
        "optimizer": digest(optimizer__0=np.int32(12), optimizer__1__mu=matrix[0]),
    }
    assert result["sizes"]["parameters"] == {"arrays": 2, "numbers": 8, "bytes": 28}
    assert result["shardings"]["parameters/b"] == {"shape": [2, 3], "dtype": "float32", "split": []}
    assert result["config"] == {"label": "some"} and result["identity"] == IDENTITY


def test_one_bit_is_another_fingerprint(saved, tmp_path):
    other = inspect(save(tmp_path, 12, scale=1.0000001))["fingerprints"]
    same = inspect(save(tmp_path / "again", 12))["fingerprints"]
    result = inspect(saved)["fingerprints"]
    assert same == result
    assert other["parameters"] != result["parameters"] and other["optimizer"] != result["optimizer"]


def test_metadata_that_leave_an_array_out_are_refused(tmp_path):
    path = save(tmp_path, 3) / "checkpoints/3/state/_METADATA"
    metadata = json.loads(path.read_text())
    metadata["tree_metadata"]["('parameters', 'b')"]["value_metadata"]["skip_deserialize"] = True
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="the metadata do not describe the array parameters/b"):
        inspect(tmp_path)


def test_a_step_a_training_and_a_run_are_found(saved):
    checkpoints = saved / "checkpoints"
    assert find_checkpoint(checkpoints / "3") == checkpoints / "3"
    for directory in (checkpoints, saved, saved.parents[2]):
        assert find_checkpoint(directory) == checkpoints / "12"
    assert inspect(checkpoints / "3")["step"] == 3


def test_a_path_may_be_relative(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert inspect("seed-0") == inspect(saved)


def test_none_or_several_are_told_in_one_line(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such directory"), (tmp_path / "empty", "no checkpoint there")):
        with pytest.raises(UserError, match=message):
            find_checkpoint(path)
    for seed in (0, 1):
        save(tmp_path / f"reward_models/x/seed-{seed}", 1)
    with pytest.raises(UserError, match=r"holds 2 training runs; name one of them: .*seed-0, .*seed-1"):
        find_checkpoint(tmp_path)


def test_the_command_prints_it_for_people_and_for_programs(saved, capsys):
    assert cli.main(["inspect", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect(saved)))
    assert cli.main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert inspect(saved)["fingerprints"]["parameters"] in text and "step         12" in text


@pytest.mark.slow
def test_the_command_alone_says_nothing_else(saved):
    command = [sys.executable, "-m", "jaxprm", "inspect", str(saved), "--json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["step"] == 12
