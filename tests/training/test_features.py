"""Hidden states of a split, computed once: kept when the pass is killed, and computed again for other batches."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.batches import evaluation_batches
from jaxprm.training import features as features_lib
from jaxprm.training.features import features_of_split

WIDTH = 4


@pytest.fixture(autouse=True)
def save_after_every_batch(monkeypatch):
    monkeypatch.setattr(features_lib, "SAVE_SECONDS", -1.0)


def batches_of(toy, rows: int = 8):
    return evaluation_batches(toy.shards, "validation", rows=rows, length=128, steps_per_row=32)


class Compute:
    """Features that name their step: (trajectory, step, 1, 1), and as the state's the same, negative."""

    def __init__(self, *, fails_at: int | None = None):
        self.calls, self._fails_at = 0, fails_at

    def __call__(self, batch):
        if self.calls == self._fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        ones = np.ones_like(batch["example"])
        stacked = jnp.asarray(np.stack([batch["example"], batch["step_index"], ones, ones], -1), jnp.float32)
        return stacked, -stacked


def check(features, batches) -> None:
    for batch in batches:
        attached, valid = features.attach(batch), batch["valid"]
        expected = np.stack([batch["example"][valid], batch["step_index"][valid]], -1)
        np.testing.assert_array_equal(attached["read_features"][valid][:, :2], expected)
        np.testing.assert_array_equal(attached["state_features"][valid][:, :2], -expected)
        assert not attached["read_features"][~valid].any()


def run(compute: Compute, batches, path: Path):
    return features_of_split(compute, batches, path, width=WIDTH, label="hidden states")


def test_a_killed_pass_resumes_after_the_last_saved_batch(toy, tmp_path, capsys):
    batches, path = batches_of(toy), tmp_path / "features" / "validation"
    assert len(batches) > 4
    with pytest.raises(KeyboardInterrupt):
        run(Compute(fails_at=3), batches, path)
    assert not path.exists()
    capsys.readouterr()
    second = Compute()
    features, done = run(second, batches, path)
    assert second.calls == len(batches) - 3
    check(features, batches)
    # The bar says what it counts, and starts where the pass does.
    assert f"3/{len(batches)}" in capsys.readouterr().err
    assert done.tokens == sum(int((batch["segments"] > 0).sum()) for batch in batches.starting_at(3))
    third = Compute()
    features, done = run(third, batches, path)
    assert (third.calls, done) == (0, None)
    check(features, batches)


def test_what_is_left_of_other_batches_is_not_used(toy, tmp_path):
    path = tmp_path / "validation"
    with pytest.raises(KeyboardInterrupt):
        run(Compute(fails_at=3), batches_of(toy), path)
    other = batches_of(toy, rows=4)
    compute = Compute()
    features, _ = run(compute, other, path)
    assert compute.calls == len(other)
    check(features, other)


def test_a_pass_that_was_killed_before_its_first_save_starts_over(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(features_lib, "SAVE_SECONDS", 1e9)
    batches, path = batches_of(toy), tmp_path / "validation"
    with pytest.raises(KeyboardInterrupt):
        run(Compute(fails_at=3), batches, path)
    compute = Compute()
    features, _ = run(compute, batches, path)
    assert compute.calls == len(batches)
    check(features, batches)
