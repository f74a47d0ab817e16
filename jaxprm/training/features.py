"""Cached hidden states of a frozen transformer at the read positions, for training the head alone.

Shapes: B rows and S step slots of a batch, D model, N steps of a split (by trajectory, then by step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from data_pipeline.output import staged_directory
from jaxprm.errors import UserError

Batch = dict[str, np.ndarray]
# A batch to (features where actions end, features where they begin or None), both [B, S, D].
FeaturesOf = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array | None]]
NAMES = ("read_features", "state_features")
# Fields of a batch that are not needed with features.
REPLACED_FIELDS = ("tokens", "positions", "branches", "read_positions", "state_positions")


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
    compute: FeaturesOf, batches: Iterable[Batch], step_starts: np.ndarray, path: Path, *, width: int, writes: bool
) -> Features:
    """Reads the features of a split from a cache, or computes them in one pass over `batches`.

    Args:
        path: cache directory, one NumPy file per name. Its name must depend on everything that the features depend on.
        width: D.
        writes: whether this process writes the cache. The other processes keep their arrays in memory.
    """
    cached = {name: path / f"{name}.npy" for name in NAMES if (path / f"{name}.npy").is_file()}
    if cached:
        return Features({name: _read(file, int(step_starts[-1]), width) for name, file in cached.items()}, step_starts)
    arrays: dict[str, np.ndarray] = {}
    for batch in batches:
        valid, steps = batch["valid"], _step_indices(batch, step_starts)
        for name, values in zip(NAMES, compute(batch), strict=True):
            if values is not None:
                array = arrays.setdefault(name, np.zeros((int(step_starts[-1]), width), np.float32))
                array[steps] = np.asarray(values)[valid]
    if writes:
        _write(path, arrays)
    return Features(arrays, step_starts)


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


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with staged_directory(path, overwrite=True, staging=path.with_name(path.name + ".partial")) as staging:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
