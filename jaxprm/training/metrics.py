"""Training metrics: metrics.jsonl, timing.jsonl, TensorBoard event files, Weights & Biases, and profiler traces."""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import jax
import numpy as np

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation.value_metrics import StepRecords
from jaxprm.redaction import redact
from jaxprm.training.flops import chip_of_device

TIMING_EVERY = 10  # steps
BINS = 20  # of a histogram
WANDB_KEY = "WANDB_API_KEY"
# A preempted machine cannot wait for an upload. What was not sent stays in the folder, for `wandb sync`.
WANDB_FINISH_SECONDS = 20.0


class Sink(Protocol):
    """A viewer that gets the numbers besides the JSON Lines files. Names are group/number."""

    def scalars(self, numbers: Mapping[str, float | None], step: int) -> None: ...

    def histogram(self, name: str, values: np.ndarray, step: int, *, weights: np.ndarray) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Metrics:
    """Context manager that appends the metrics of a run to its files and sinks.

    A resumed run starts after step `start`: lines of later steps, which an earlier process wrote, are cut off.

    Args:
        writes: True in one process only; in the others nothing is written.
        peak_seconds: time of a step at the devices' peak, None if unknown; `mfu` is its share of the measured time.
        extra_sink: opens a sink besides TensorBoard.
    """

    def __init__(
        self,
        output: Path,
        start: int,
        *,
        writes: bool,
        peak_seconds: float | None = None,
        extra_sink: Callable[[], Sink] | None = None,
    ):
        self._writes, self._output, self._start = writes, output, start
        self._peak_seconds, self._extra_sink = peak_seconds, extra_sink
        self.pause()
        if writes:
            for name in ("metrics.jsonl", "timing.jsonl"):
                _cut(output / name, start)

    def __enter__(self) -> Metrics:
        if self._writes:
            self._sinks: list[Sink] = [] if self._extra_sink is None else [self._extra_sink()]
            self._sinks.append(TensorBoardSink(self._output / "tensorboard", self._start))
            self._files = {name: files.appending(self._output / name) for name in ("metrics.jsonl", "timing.jsonl")}
            self._append = {name: file.__enter__() for name, file in self._files.items()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writes:
            for sink in self._sinks:
                sink.close(failed=kind is not None)
            for file in self._files.values():
                file.__exit__(kind, error, trace)

    def step(self, line: dict[str, float]) -> None:
        """Writes the metrics of one step; every tenth step also its timing. Steps must come in order."""
        self._write("metrics.jsonl", line, "training")
        self._steps += 1
        self._tokens += line.get("tokens", 0)
        if self._steps % TIMING_EVERY == 0:
            self._write_timing(line["step"])

    def validation(self, step: int, numbers: dict[str, Any], records: StepRecords) -> None:
        """Writes the numbers of a validation, and histograms of its values and returns."""
        self._write("metrics.jsonl", {"step": step} | numbers, "validation")
        if self._writes:
            for name, values in (("values", records.values), ("returns", records.targets)):
                for sink in self._sinks:
                    sink.histogram(f"validation/{name}", values, step, weights=records.weights)
        self.pause()

    def add_input_wait(self, seconds: float) -> None:
        """Adds time that was spent waiting for the next batch."""
        self._waited += seconds

    def pause(self) -> None:
        """Restarts the clock, so that time since the last step (a validation, a save) does not count as step time."""
        self._since, self._steps, self._waited, self._tokens = time.monotonic(), 0, 0.0, 0.0

    def _write_timing(self, step: int) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        line = {
            "step": step,
            "seconds_per_step": _rounded(seconds / self._steps),
            "tokens_per_second": _rounded(self._tokens / seconds),
            "input_share": _rounded(self._waited / seconds),
        } | device_memory()
        if self._peak_seconds is not None:
            line["mfu"] = _rounded(self._peak_seconds * self._steps / seconds)
        self._write("timing.jsonl", line, "timing")
        self.pause()

    def _write(self, file: str, line: dict[str, Any], group: str) -> None:
        if self._writes:
            self._append[file]([line])
            numbers = {f"{group}/{name}": value for name, value in line.items() if name != "step"}
            for sink in self._sinks:
                sink.scalars(numbers, line["step"])


class TensorBoardSink:
    """A TensorBoard event file in TensorFlow's own format, written without its summary operations."""

    def __init__(self, directory: Path, start: int):
        import tensorflow as tf

        self._tf = tf.compat.v1
        directory.mkdir(parents=True, exist_ok=True)
        # Nanoseconds: a run that is killed and restarted within a second would overwrite its predecessor's file.
        name = f"events.out.tfevents.{time.time_ns()}.jaxprm"
        self._writer = tf.io.TFRecordWriter(str(directory / name))
        self._write(file_version="brain.Event:2")
        # With a START, TensorBoard drops what earlier files have at this step and after it.
        self._write(session_log=self._tf.SessionLog(status=self._tf.SessionLog.START), step=start + 1)

    def scalars(self, numbers: Mapping[str, float | None], step: int) -> None:
        values = [
            self._tf.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items() if value is not None
        ]
        self._write(summary=self._tf.Summary(value=values), step=step)

    def histogram(self, name: str, values: np.ndarray, step: int, *, weights: np.ndarray) -> None:
        counts, edges = np.histogram(values, BINS, weights=weights)
        proto = self._tf.HistogramProto(
            min=values.min(),
            max=values.max(),
            num=weights.sum(),
            sum=(weights * values).sum(),
            sum_squares=(weights * values**2).sum(),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._write(summary=self._tf.Summary(value=[self._tf.Summary.Value(tag=name, histo=proto)]), step=step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._tf.Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


class WandbSink:
    """The W&B run of one training run, in however many processes. Its id is in OUTPUT/wandb.json.

    Everything is keyed by the training step, because W&B never goes back: steps that a resumed run computes again are
    there twice, with the same numbers.

    Raises UserError as `check_wandb` does, and if W&B refuses the run or cannot be reached.
    """

    def __init__(
        self, settings: config_lib.LoggingConfig, output: Path, *, name: str, group: str, config: dict[str, Any]
    ):
        check_wandb(settings)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # tracebacks include the values of variables
        import wandb  # an optional package, and slow to import

        self._wandb, online = wandb, settings.wandb == "online"
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=name,
                group=group,
                id=_run_id(output),
                resume="allow" if online else None,  # offline files of one id are joined when they are sent
                mode=settings.wandb,
                dir=str(output),
                config=config,
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, silent=True, finish_timeout=WANDB_FINISH_SECONDS
                ),
            )
        except wandb.errors.Error as error:
            reason = redact(" ".join(str(error).split()), os.environ.get(WANDB_KEY))
            raise UserError(f"logging.wandb = {settings.wandb}: {reason}; fix it, or set it to offline") from None
        if online:
            print(f"W&B: {self._run.url}")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, numbers: Mapping[str, float | None], step: int) -> None:
        self._run.log({name: value for name, value in numbers.items() if value is not None} | {"step": step})

    def histogram(self, name: str, values: np.ndarray, step: int, *, weights: np.ndarray) -> None:
        counts_and_edges = np.histogram(values, BINS, weights=weights)
        self._run.log({name: self._wandb.Histogram(np_histogram=counts_and_edges), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def check_wandb(settings: config_lib.LoggingConfig) -> None:
    """Raises UserError if the config asks for W&B and its package or key is missing."""
    if settings.wandb == "off":
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb = {settings.wandb}: the package wandb is not installed; pip install 'jaxprm[wandb]', or "
            "set it to off"
        )
    if settings.wandb == "online" and not os.environ.get(WANDB_KEY):
        raise UserError(f"logging.wandb = online: the environment has no {WANDB_KEY}; set it, or logging.wandb=offline")


class Profile:
    """Context manager that writes a trace of the steps `first` to `last` to `folder`; a no-op if `steps` is None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._traces = steps, folder, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts or stops the trace; call it before every step."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._traces = True
        if self._steps is not None and step > self._steps[1]:
            self._stop()

    def _stop(self) -> None:
        if self._traces:
            jax.profiler.stop_trace()
            self._traces = False


def seconds_at_peak(flops: float, devices: Sequence[Any]) -> float | None:
    """Seconds that `flops` take on all devices at their bfloat16 peak; None if they are not TPUs of a known kind."""
    chip = chip_of_device(devices[0].device_kind)
    return None if chip is None else flops / (len(devices) * chip.flops)


def device_memory() -> dict[str, int]:
    """{"device_bytes", "device_peak_bytes"} of the fullest local device; empty if the platform does not count them."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    keys = {"device_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}
    counted = {name: key for name, key in keys.items() if all(key in device for device in stats)}
    return {name: max(device[key] for device in stats) for name, key in counted.items()}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scalars with the seven digits of a float32, NaN and infinity included."""
    return {name: float(f"{float(value):.7g}") for name, value in metrics.items()}


def first_not_finite(line: Mapping[str, float]) -> str | None:
    """Name of the first metric that is NaN or infinite; None if all are finite."""
    return next((name for name, value in line.items() if not math.isfinite(value)), None)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _cut(path: Path, start: int) -> None:
    lines: Iterable[dict] = (line for line in files.complete_lines(path) if line["step"] <= start)
    files.write_atomic(path, "".join(map(files.line, lines)))


def _run_id(output: Path) -> str:
    path = output / "wandb.json"
    if not path.exists():
        files.write_json(path, {"id": secrets.token_hex(8)})
    return files.read_json(path)["id"]
