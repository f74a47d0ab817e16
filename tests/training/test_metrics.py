"""What is logged: read back with TensorFlow's own reader, cut at a checkpoint, timed by a clock that is set by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from jaxprm import files
from jaxprm.evaluation.value_metrics import StepRecords
from jaxprm.training import metrics as metrics_lib
from jaxprm.training.metrics import Metrics, not_finite, numbers


def events(directory) -> list:
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        found += list(tf.compat.v1.train.summary_iterator(str(path)))
    return found


def records() -> StepRecords:
    values = np.array([0.0, 0.25, 0.5, 1.0], np.float32)
    blank = np.ones(4)
    return StepRecords(
        values=values, targets=np.ones(4, np.float32), depths=blank, tasks=blank, weights=np.array([1.0, 2, 1, 1]),
        success=blank,
    )  # fmt: skip


def test_scalars_and_histograms_are_events_that_tensorflow_reads(tmp_path):
    with Metrics(tmp_path, 0, writes=True) as metrics:
        metrics.step({"step": 1, "loss": 0.5, "tokens": 7})
        metrics.validation(1, {"validation_loss": 0.25, "auroc": None}, records())
    assert list(files.read_lines(tmp_path / "metrics.jsonl")) == [
        {"step": 1, "loss": 0.5, "tokens": 7},
        {"step": 1, "validation_loss": 0.25, "auroc": None},
    ]
    values = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    assert values["training/loss"].simple_value == 0.5 and values["validation/validation_loss"].simple_value == 0.25
    assert "validation/auroc" not in values and values["training/tokens"].simple_value == 7
    histogram = values["validation/values"].histo
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (0, 1, 5, 2)
    assert sum(histogram.bucket) == 5 and len(histogram.bucket) == len(histogram.bucket_limit) == metrics_lib.BINS
    assert histogram.bucket[5] == 2 and values["validation/returns"].histo.sum == 5


def test_what_lies_past_the_checkpoint_is_forgotten(tmp_path):
    with Metrics(tmp_path, 0, writes=True) as metrics:
        for step in range(1, 25):
            metrics.step({"step": step, "loss": 1.0, "tokens": 1})
    with Metrics(tmp_path, 15, writes=True) as metrics:
        metrics.step({"step": 16, "loss": 2.0, "tokens": 1})
    assert [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 17))
    assert [line["step"] for line in files.read_lines(tmp_path / "timing.jsonl")] == [10]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 16]


def test_timing_is_of_steps_alone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: now[0])
    with Metrics(tmp_path, 0, writes=True) as metrics:
        for step in range(1, 21):
            now[0] += 0.5
            metrics.waited(0.1)
            metrics.step({"step": step, "loss": 1.0, "tokens": 100})
            if step == 10:
                now[0] += 1000  # a validation
                metrics.pause()
    lines = list(files.read_lines(tmp_path / "timing.jsonl"))
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert line["seconds_per_step"] == 0.5 and line["tokens_per_second"] == 200 and line["input_share"] == 0.2


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    with Metrics(tmp_path, 0, writes=False) as metrics:
        metrics.step({"step": 1, "loss": 1.0})
        metrics.validation(1, {"validation_loss": 1.0}, records())
    assert list(tmp_path.iterdir()) == []


def test_numbers_keep_float32_and_the_first_that_is_not_finite_is_named():
    found = numbers({"loss": np.float32(1 / 3), "norm": np.float32(np.nan)})
    assert found["loss"] == 0.3333333 and not_finite(found) == "norm"
    assert not_finite({"loss": 1.0}) is None and not_finite({"a": 1.0, "b": float("inf")}) == "b"


@pytest.mark.parametrize("last, stops", [(2, [3]), (9, [])])
def test_a_trace_begins_and_ends_with_its_steps(tmp_path, monkeypatch, last, stops):
    called = []
    monkeypatch.setattr(metrics_lib.jax.profiler, "start_trace", lambda folder: called.append(("start", folder)))
    monkeypatch.setattr(metrics_lib.jax.profiler, "stop_trace", lambda: called.append("stop"))
    ended_at = []
    with metrics_lib.Profile((2, last), tmp_path) as profile:
        for step in range(1, 6):
            profile.before(step)
            if "stop" in called and not ended_at:
                ended_at.append(step)
    assert called == [("start", str(tmp_path)), "stop"] and ended_at == stops
