"""The toy environment, made once for all tests of training."""

from __future__ import annotations

import pytest

from tests.training.toy import Run, make_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_toy(tmp_path_factory.mktemp("toy"))
