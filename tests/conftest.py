"""What holds for every test."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session", autouse=True)
def trimmed_memory():
    """The tests' own process gives freed memory back, whatever it calls: it goes on for long, and beside others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxprm.host_memory.ctypes", SimpleNamespace(CDLL=lambda name: None))
        yield


@pytest.fixture(autouse=True)
def own_modules(request):
    """A module that a test writes and imports ends with the test: the next one's of the same name is imported anew."""
    folder = request.getfixturevalue("tmp_path").resolve() if "tmp_path" in request.fixturenames else None
    before = set(sys.modules)
    yield
    if folder is not None:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().is_relative_to(folder):
                del sys.modules[name]
