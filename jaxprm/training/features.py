"""Cached hidden states of a frozen transformer at the read positions, for training the head alone.

Shapes: B rows and S step slots of a batch, D model, N steps of a split (by trajectory, then by step).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.progress import bar
from jaxprm.training import distributed

if TYPE_CHECKING:
    from data_pipeline.batches import EvaluationBatches

Batch = dict[str, np.ndarray]
# A batch to (features where actions end, features where they begin or None), both [B, S, D].
FeaturesOf = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array | None]]
NAMES = ("read_features", "state_features")
# Fields of a batch that are not needed with features.
REPLACED_FIELDS = ("tokens", "positions", "branches", "read_positions", "state_positions")
SAVE_SECONDS = 10.0
_PROGRESS = "progress.json"


class Pass(NamedTuple):
    """A pass of the frozen transformer over a split, or over what an earlier process left of it."""

    tokens: int
    seconds: float


class Features:
    """Hidden states of all steps of a split: arrays [N, D] float32 by name."""

    def __init__(self, arrays: dict[str, np.ndarray], step_starts: np.ndarray):
        """step_starts: index of each trajectory's first step in the arrays."""
        self._arrays, self._starts = arrays, step_starts

    def attach(self, batch: Batch) -> Batch:
        """Adds `read_features`, and `state_features` if cached, [B, S, D], to a batch; 0 in empty slots."""
        valid, steps = batch["valid"], _step_indices(batch, self._starts)
        features = {}
        for name, array in self._arrays.items():
            features[name] = np.zeros((*valid.shape, array.shape[1]), np.float32)
            features[name][valid] = array[steps]
        return batch | features


def features_of_split(
    compute: FeaturesOf, batches: EvaluationBatches, path: Path, *, width: int, label: str
) -> tuple[Features, Pass | None]:
    """(the features of a split, from a cache or from one pass over `batches`; that pass, None with a complete cache).

    Every SAVE_SECONDS the features so far are saved, so that a killed pass resumes after them. With several processes
    all call it; process 0 writes, and all read the files, which must be on a file system that they share.

    Args:
        path: cache directory, one NumPy file per name. Its name must depend on everything that the features depend on.
        width: D.
        label: of the progress bar.
    """
    starts, done = batches.split.step_starts, None
    # Decided by process 0: a process that computes while another one reads would wait for it forever.
    if not distributed.broadcast_from_primary(any((path / f"{name}.npy").is_file() for name in NAMES)):
        done = _compute(compute, batches, _Cache(path, (int(starts[-1]), width), batches.identity), label)
    cached = {name: path / f"{name}.npy" for name in NAMES if (path / f"{name}.npy").is_file()}
    return Features({name: _read(file, int(starts[-1]), width) for name, file in cached.items()}, starts), done


def _compute(compute: FeaturesOf, batches: EvaluationBatches, cache: _Cache, label: str) -> Pass:
    first, tokens, since = distributed.number_from_primary(cache.open()), 0, time.monotonic()
    with bar(label, len(batches), initial=first, unit="batch") as progress:
        for number, batch in enumerate(batches.starting_at(first), start=first):
            valid, steps = batch["valid"], _step_indices(batch, batches.split.step_starts)
            for name, values in zip(NAMES, compute(batch), strict=True):
                if values is not None:
                    cache.put(name, steps, np.asarray(values)[valid])
            cache.save(number + 1)
            tokens += int(np.count_nonzero(batch["segments"]))
            progress.update()
    seconds = time.monotonic() - since
    cache.close()
    distributed.broadcast_from_primary(True)  # a barrier: the other processes read what process 0 has written
    return Pass(tokens, seconds)


class _Cache:
    """The features of a split as they are computed: [N, D] float32 by name, and how many batches are in them.

    Only process 0 writes; in the others the methods do nothing.
    """

    def __init__(self, path: Path, shape: tuple[int, int], identity: str):
        """identity: of the batches, in whose order the features are computed."""
        self._path, self._shape, self._identity = path, shape, identity
        self._staging, self._writes = path.with_name(path.name + ".partial"), distributed.is_primary()
        self._arrays: dict[str, np.ndarray] = {}
        self._saved = time.monotonic()

    def open(self) -> int:
        """Number of batches that an earlier process has saved; what it left of other batches is removed."""
        if not self._writes:
            return 0
        with contextlib.suppress(OSError, ValueError, KeyError):
            progress = files.read_json(self._staging / _PROGRESS)
            if progress["batches_of"] == self._identity:
                return int(progress["batches"])
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        return 0

    def put(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        """Stores `values` [n, D] as the features of these steps."""
        if self._writes:
            if name not in self._arrays:
                self._arrays[name] = self._map(self._staging / f"{name}.npy")
            self._arrays[name][steps] = values

    def _map(self, file: Path) -> np.ndarray:
        mode = "r+" if file.exists() else "w+"
        array = np.lib.format.open_memmap(file, mode=mode, dtype=np.float32, shape=self._shape)
        # A full disk is an error here. Later it would be a crash: the file is written through memory.
        if mode == "w+" and hasattr(os, "posix_fallocate"):
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        return array

    def save(self, count: int) -> None:
        """Records that the first `count` batches are stored, if SAVE_SECONDS have passed."""
        if self._writes and time.monotonic() - self._saved > SAVE_SECONDS:
            for array in self._arrays.values():
                array.flush()
            files.write_json(self._staging / _PROGRESS, {"batches": count, "batches_of": self._identity})
            self._saved = time.monotonic()

    def close(self) -> None:
        """Gives the complete cache its final name."""
        if self._writes:
            for array in self._arrays.values():
                array.flush()
            self._arrays.clear()
            shutil.rmtree(self._path, ignore_errors=True)
            self._staging.rename(self._path)
            (self._path / _PROGRESS).unlink(missing_ok=True)


def _read(file: Path, steps: int, width: int) -> np.ndarray:
    """Cached features, [steps, width] float32. Raises UserError for a file that was cut or is of something else."""
    try:
        # Memory-mapped: the features of a large split need not fit in memory.
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}); delete {file.parent}, and it is computed again") from None
    if array.shape != (steps, width) or array.dtype != np.float32:
        raise UserError(
            f"{file}: has {array.dtype} {array.shape}, expected float32 {(steps, width)}; delete {file.parent}, and it "
            "is computed again"
        )
    return array


def _step_indices(batch: Batch, step_starts: np.ndarray) -> np.ndarray:
    """Index in the split of each valid step of a batch."""
    valid = batch["valid"]
    return step_starts[batch["example"][valid]] + batch["step_index"][valid]
