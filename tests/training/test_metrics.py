"""Metrics read back with TensorFlow's own reader, cut at a checkpoint, and timed by a fake clock."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from jaxprm import files
from jaxprm.evaluation.value_metrics import StepRecords
from jaxprm.training import metrics as metrics_lib
from jaxprm.training.metrics import Metrics, first_not_finite, numbers, seconds_at_peak


def events(directory) -> list:
    all_events = []
    for path in sorted((directory / "tensorboard").iterdir()):
        all_events += list(tf.compat.v1.train.summary_iterator(str(path)))
    return all_events


def records() -> StepRecords:
    values = np.array([0.0, 0.25, 0.5, 1.0], np.float32)
    blank = np.ones(4)
    return StepRecords(
        values=values,
        targets=np.ones(4, np.float32),
        depths=blank,
        tasks=blank,
        weights=np.array([1.0, 2, 1, 1]),
        success=blank,
    )


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


def test_lines_past_the_checkpoint_are_cut_off(tmp_path):
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
            metrics.add_input_wait(0.1)
            metrics.step({"step": step, "loss": 1.0, "tokens": 100})
            if step == 10:
                now[0] += 1000  # a validation
                metrics.pause()
    lines = list(files.read_lines(tmp_path / "timing.jsonl"))
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert line["seconds_per_step"] == 0.5 and line["tokens_per_second"] == 200 and line["input_share"] == 0.2


def test_timing_leaves_out_pauses_wherever_they_are(tmp_path, monkeypatch):
    """A compilation in the first step, and a validation every third step: no ten steps follow each other."""
    now = [0.0]
    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: now[0])
    with Metrics(tmp_path, 0, writes=True) as metrics:
        metrics.add_input_wait(30)
        now[0] += 60
        metrics.pause()
        for step in range(1, 11):
            now[0] += 0.5
            metrics.add_input_wait(0.1)
            metrics.step({"step": step, "loss": 1.0, "tokens": 100})
            if step % 3 == 0:
                now[0] += 1000
                metrics.pause()
    (line,) = files.read_lines(tmp_path / "timing.jsonl")
    assert (line["step"], line["seconds_per_step"], line["tokens_per_second"]) == (10, 0.5, 200)
    assert line["input_share"] == 0.2


def test_steps_on_features_have_no_rate_of_tokens_and_the_pass_before_them_has(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: now[0])
    with Metrics(tmp_path, 0, writes=True, reads_tokens=False) as metrics:
        metrics.features_pass("train", 3000, 60.0)
        for step in range(1, 11):
            now[0] += 0.5
            metrics.step({"step": step, "loss": 1.0, "tokens": 100})
    first, second = files.read_lines(tmp_path / "timing.jsonl")
    assert first == {"step": 0, "features": "train", "seconds": 60.0, "tokens_per_second": 50.0}
    assert second["seconds_per_step"] == 0.5 and "tokens_per_second" not in second and "mfu" not in second


class Device(NamedTuple):
    device_kind: str


@pytest.mark.parametrize("kind, peak", [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12)])
def test_mfu_is_the_share_of_all_devices_peak(tmp_path, monkeypatch, kind, peak):
    now = [0.0]
    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: now[0])
    # Four devices at their peak would need half a second for a step that takes two.
    seconds = seconds_at_peak(0.5 * 4 * peak, [Device(kind)] * 4)
    with Metrics(tmp_path, 0, writes=True, peak_seconds=seconds) as metrics:
        for step in range(1, 11):
            now[0] += 2.0
            metrics.step({"step": step, "loss": 1.0, "tokens": 1})
    (line,) = files.read_lines(tmp_path / "timing.jsonl")
    assert line["mfu"] == 0.25
    values = {value.tag: value.simple_value for event in events(tmp_path) for value in event.summary.value}
    assert values["timing/mfu"] == 0.25 and "training/mfu" not in values


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100", "TPU v2", "TPU v4 lite", "v4"])
def test_without_a_known_peak_there_is_no_mfu(tmp_path, kind):
    seconds = seconds_at_peak(1e12, [Device(kind)])
    with Metrics(tmp_path, 0, writes=True, peak_seconds=seconds) as metrics:
        for step in range(1, 11):
            metrics.step({"step": step, "loss": 1.0, "tokens": 1})
    (line,) = files.read_lines(tmp_path / "timing.jsonl")
    assert seconds is None and "mfu" not in line


def test_an_extra_sink_gets_what_tensorboard_gets(tmp_path):
    calls = []

    class Other:
        def scalars(self, numbers, step):
            calls.append((step, dict(numbers)))

        def histogram(self, name, values, step, *, weights):
            calls.append((step, name, float(values.sum()), float(weights.sum())))

        def close(self, *, failed):
            calls.append(failed)

    with Metrics(tmp_path / "whole", 0, writes=True, extra_sink=Other) as metrics:
        metrics.step({"step": 1, "loss": 0.5})
        metrics.validation(1, {"auroc": None}, records())
    assert calls == [
        (1, {"training/loss": 0.5}),
        (1, {"validation/auroc": None}),
        (1, "validation/values", 1.75, 5.0),
        (1, "validation/returns", 4.0, 5.0),
        False,
    ]
    with pytest.raises(RuntimeError), Metrics(tmp_path / "failed", 0, writes=True, extra_sink=Other):
        raise RuntimeError
    assert calls[-1] is True
    with Metrics(
        tmp_path / "other", 0, writes=False, extra_sink=lambda: pytest.fail("opened in a process that does not write")
    ):
        pass


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    with Metrics(tmp_path, 0, writes=False) as metrics:
        metrics.step({"step": 1, "loss": 1.0})
        metrics.validation(1, {"validation_loss": 1.0}, records())
    assert list(tmp_path.iterdir()) == []


def test_numbers_keep_float32_and_the_first_that_is_not_finite_is_named():
    rounded = numbers({"loss": np.float32(1 / 3), "norm": np.float32(np.nan)})
    assert rounded["loss"] == 0.3333333 and first_not_finite(rounded) == "norm"
    assert first_not_finite({"loss": 1.0}) is None and first_not_finite({"a": 1.0, "b": float("inf")}) == "b"


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
