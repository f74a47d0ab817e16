"""Hidden states of a frozen transformer where steps are read: computed once, kept in a file, given to every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from data_pipeline.output import staged_directory

Batch = dict[str, np.ndarray]
# (features where actions end, features where they begin or None), [B, S, D], of a batch.
FeaturesOf = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array | None]]
NAMES = ("read_features", "state_features")


class Features:
    """Hidden states of all steps of a split, [S, D] float32: by trajectory, then by step.

    With them a batch needs none of the fields that they take the place of.
    """

    replaces = ("tokens", "positions", "read_positions", "state_positions")

    def __init__(self, arrays: dict[str, np.ndarray], step_starts: np.ndarray):
        self._arrays, self._starts = arrays, step_starts

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def attach(self, batch: Batch) -> Batch:
        """The batch with `read_features`, and `state_features` where there are any, [B, S, D]; 0 in empty slots."""
        valid = batch["valid"]
        steps = self._starts[batch["example"][valid]] + batch["step_index"][valid]
        found = {}
        for name, array in self._arrays.items():
            found[name] = np.zeros((*valid.shape, array.shape[1]), np.float32)
            found[name][valid] = array[steps]
        return batch | found


def features_of_split(
    compute: FeaturesOf, batches: Iterable[Batch], step_starts: np.ndarray, path: Path, *, width: int, writes: bool
) -> Features:
    """Reads `path`, a folder of NumPy files, or computes every step's features from one pass over `batches`.

    The file is written whole or not at all, by the process that `writes`; it must be named for everything that the
    features depend on. Without it the arrays stay in memory.
    """
    stored = {name: path / f"{name}.npy" for name in NAMES if (path / f"{name}.npy").is_file()}
    if stored:
        return Features({name: np.load(file, mmap_mode="r") for name, file in stored.items()}, step_starts)
    arrays: dict[str, np.ndarray] = {}
    for batch in batches:
        valid = batch["valid"]
        steps = step_starts[batch["example"][valid]] + batch["step_index"][valid]
        for name, values in zip(NAMES, compute(batch), strict=True):
            if values is not None:
                whole = arrays.setdefault(name, np.zeros((int(step_starts[-1]), width), np.float32))
                whole[steps] = np.asarray(values)[valid]
    if writes:
        _write(path, arrays)
    return Features(arrays, step_starts)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with staged_directory(path, overwrite=True, staging=path.with_name(path.name + ".partial")) as staging:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
