"""The toy dataset and policy, written once for all tests of training."""

from __future__ import annotations

import pytest

from benchmarks.toy import Toy, make_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))
