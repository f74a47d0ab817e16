"""What a checkpoint gives back, and what it refuses."""

from __future__ import annotations

import errno

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprm.artifacts.checkpoints import Checkpoints, abstract
from jaxprm.errors import UserError

IDENTITY = {"config": "c", "base model": "b", "dataset": "d", "tokenizer": "t", "seed": 3}


def state_of(value: float) -> dict:
    return {"parameters": {"head": jnp.full(3, value)}, "step": jnp.int32(value)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Three checkpoints, of which the last two are kept."""
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(directory, IDENTITY, keep_latest=2)
    for step in (10, 20, 30):
        checkpoints.save(step, state_of(step), {"batches": step})
    checkpoints.close()
    return directory


def test_the_newest_comes_back_with_its_position(directory):
    checkpoints = Checkpoints(directory, IDENTITY)
    step, state, position = checkpoints.restore(abstract(state_of(0)))
    checkpoints.close()
    assert (step, position, int(state["step"])) == (30, {"batches": 30}, 30)
    np.testing.assert_array_equal(state["parameters"]["head"], np.full(3, 30, np.float32))
    assert sorted(path.name for path in directory.iterdir()) == ["20", "30"]


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", IDENTITY)
    assert checkpoints.restore(abstract(state_of(0))) is None
    assert checkpoints.latest_step() is None
    checkpoints.close()


def test_the_best_are_kept_and_the_latest_always(tmp_path):
    """Of losses .4 .1 .3 .2 and one that was not measured: the two smallest, and the newest, which has none."""
    losses = {1: 0.4, 2: 0.1, 3: 0.3, 4: 0.2, 5: None}
    kept = {}
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep_latest=1, keep_best=2)
    for step, loss in losses.items():
        checkpoints.save(step, state_of(step), {"batches": step}, validation_loss=loss)
        checkpoints._manager.wait_until_finished()
        kept[step] = sorted(int(path.name) for path in tmp_path.iterdir())
    checkpoints.close()
    assert kept[3] == [2, 3] and kept[4] == [2, 4] and kept[5] == [2, 4, 5]
    # Another process knows the losses from the files.
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep_latest=1, keep_best=2)
    assert checkpoints.restore(abstract(state_of(0)))[0] == 5
    checkpoints.save(6, state_of(6), {"batches": 6}, validation_loss=0.15)
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 6]


def test_a_step_is_written_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    for value in (1, 2):
        checkpoints.save(7, state_of(value), {"batches": value})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.restore(abstract(state_of(0)))[2] == {"batches": 1}
    checkpoints.close()


@pytest.mark.parametrize("name", IDENTITY)
def test_another_identity_is_refused_by_name(directory, name):
    checkpoints = Checkpoints(directory, IDENTITY | {name: "other"})
    with pytest.raises(UserError, match=f"its {name} differs") as raised:
        checkpoints.restore(abstract(state_of(0)))
    checkpoints.close()
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "full", IDENTITY)
    message = "RESOURCE_EXHAUSTED: ... Failed to write 9 bytes to file 4: No space left on device [os_error_code='28']"

    def fail(*_, **__):
        raise ValueError(message)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(OSError) as raised:
            checkpoints.save(1, state_of(1), {})
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "full")
        message = "another mistake"
        with pytest.raises(ValueError, match="another mistake"):
            checkpoints.save(1, state_of(1), {})
    checkpoints.close()


def test_what_a_killed_process_left_unfinished_is_neither_restored_nor_kept(tmp_path):
    unfinished = tmp_path / "20.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "garbage").write_text("half a tensor")
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.restore(abstract(state_of(0))) is None
    checkpoints.save(20, state_of(20), {"batches": 20})
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["20"]
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.restore(abstract(state_of(0)))[0] == 20
    checkpoints.close()
