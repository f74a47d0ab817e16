"""What holds for every test."""

import contextlib
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# torch's CUDA build brings triton. It and TensorFlow each have an LLVM inside: after TensorFlow, triton crashes Python.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

MAPS, MOST_MAPS = Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="session", autouse=True)
def trimmed_memory():
    """The tests' own process gives freed memory back, whatever it calls: it goes on for long, and beside others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxprm.host_memory.ctypes", SimpleNamespace(CDLL=lambda name: None))
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Programs that were compiled are let go before there are too many: each takes some of the 65,530 pieces of memory
    that Linux lets a process map, and XLA crashes where there is none left."""
    yield
    if "jax" in sys.modules and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


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
