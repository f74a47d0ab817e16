"""Cached features that are not what was written are refused by name."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxprm.errors import UserError
from jaxprm.training.features import features_of_split

BATCH = {
    "valid": np.array([[True, True, True, False]]),
    "example": np.array([[0, 1, 1, -1]]),
    "step_index": np.array([[0, 0, 1, 0]]),
    "segments": np.array([[1, 2, 2, 0]]),
}


class Batches:
    """The one batch of a split of two trajectories, with one step and two."""

    identity = "of the only batch"
    split = SimpleNamespace(step_starts=np.array([0, 1, 3]))

    def __len__(self):
        return 1

    def starting_at(self, first):
        return iter([BATCH][first:])


def read(path, width=2, compute=None):
    features, _ = features_of_split(compute, Batches(), path, width=width, label="features")
    return features


@pytest.fixture
def cache(tmp_path):
    values = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    read(tmp_path / "features", compute=lambda batch: (values, None))
    return tmp_path / "features"


def test_what_was_written_is_read(cache):
    attached = read(cache).attach(BATCH)["read_features"]
    np.testing.assert_array_equal(attached, [[[0, 1], [2, 3], [4, 5], [0, 0]]])


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_file_that_was_cut_is_named(cache, size):
    file = cache / "read_features.npy"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"read_features\.npy: damaged .*; delete .*features, and it is computed again"):
        read(cache)


def test_features_of_another_width_are_named(cache):
    with pytest.raises(UserError, match=r"has float32 \(3, 2\), expected float32 \(3, 4\)"):
        read(cache, width=4)
