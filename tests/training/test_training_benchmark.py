"""benchmarks/training.py at a size of seconds: what it counts, and that both sides train the same thing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import training
from data_pipeline.shards import ShardSplit
from jaxprm import files


def split() -> ShardSplit:
    """Two trajectories of 5 and 3 tokens, the second of which fails, with steps that end at 2 and 4, and at 1."""
    return ShardSplit(
        ids=["a", "b"],
        tasks=["a", "b"],
        weights=np.ones(2, np.float32),
        outcomes=np.array([1, 0], np.float32),
        tokens=np.arange(10, 18, dtype=np.int32),
        token_starts=np.array([0, 5, 8]),
        step_starts=np.array([0, 2, 3]),
        read_positions=np.array([2, 4, 1], np.int32),
        state_positions=np.array([1, 3, 0], np.int32),
        rewards=np.zeros(3, np.float32),
        step_labels=np.zeros(3, np.float32),
    )


def test_padded_batches_are_labelled_where_steps_end():
    from benchmarks.training_torch import IGNORED, collate

    batch = {name: array.tolist() for name, array in collate(split(), np.array([1, 0]), pad_id=9).items()}
    assert batch == {
        "input_ids": [[15, 16, 17, 9, 9], [10, 11, 12, 13, 14]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[IGNORED, 0, IGNORED, IGNORED, IGNORED], [IGNORED, IGNORED, 1, IGNORED, 1]],
    }


@pytest.mark.slow
def test_everything_is_counted_at_a_tiny_size(tmp_path, capsys):
    written = tmp_path / "found.json"
    small = "--tasks 1 --attempts 2 --rounds 2 --sizes tiny --rows 1 --length 1024 --hidden 64"
    training.main(["--workdir", str(tmp_path / "run"), "--json", str(written), *small.split()])
    results = files.read_json(written)
    assert results["cpus"] >= 1 and results["load_before"] >= 0
    peak, padding, speed = results["peak"], results["padding"], results["speed"]["tiny"]
    assert set(peak["peak_flops"]) == {"jax", "torch"} and min(peak["peak_flops"].values()) > 1e8
    assert len(peak["shares"]) == 2 and peak["share"] > 0 and peak["batch"] == [4, 512]
    # Six operations for every weight of a layer and token; attention and the head are more, and the head is tiny.
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert 1 < peak["flops_per_step"] / (6 * weights * 4 * 512) < 2.5
    assert 0 <= padding["padding"] < 1 and padding["lengths"]["max"] <= 1024
    assert set(speed["runs"]) == {"jaxprm", "torch", "torch_by_length"}
    for name, run in speed["runs"].items():
        assert run["tokens"] > 0 and run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"]), name
        assert name == "jaxprm" or len(speed["ratios"][name]) == 2
    assert speed["torch_parameters"] == speed["parameters"] + 128 + 2  # a second label, and a bias
    assert len(capsys.readouterr().out.splitlines()) >= 5
