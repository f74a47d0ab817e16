"""Fixtures that apply to every test."""

import contextlib
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# torch's CUDA build brings triton. triton and TensorFlow each contain an LLVM. If TensorFlow is imported first, triton
# crashes Python.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

MAPS, MAX_MAPS = Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="session", autouse=True)
def trimmed_memory():
    """The test process returns freed memory to the system, whatever it calls: it runs for long, next to others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxprm.host_memory.ctypes", SimpleNamespace(CDLL=lambda name: None))
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Drops compiled programs before there are too many. Each uses some of the 65,530 memory mappings that Linux
    allows a process, and XLA crashes if none is left."""
    yield
    if "jax" in sys.modules and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def own_modules(request):
    """Drops modules that a test wrote and imported, so that the next test can import one of the same name."""
    folder = request.getfixturevalue("tmp_path").resolve() if "tmp_path" in request.fixturenames else None
    before = set(sys.modules)
    yield
    if folder is not None:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().is_relative_to(folder):
                del sys.modules[name]
