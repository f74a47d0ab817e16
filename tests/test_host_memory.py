"""Freed memory is kept where JAX computes on the CPU, and only there."""

import subprocess
import sys

import pytest

from jaxprm import host_memory

ALLOCATE_AGAIN = """
import resource, sys
from pathlib import Path
from jaxprm import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed(Path(sys.argv[2]))
for _ in range(50):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

TRIM = """
from pathlib import Path
from jaxprm import host_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
assert host_memory.keep_freed(Path("/nowhere"))
blocks = [b"x" * (64 << 20) for _ in range(4)]
above = b"y" * (1 << 20)  # so the memory below it is not at the end of the heap
peak = resident()
del blocks
kept = resident()
host_memory.trim_malloc()
print(peak, kept, resident())
"""

ASK = """
import sys
from pathlib import Path
from jaxprm import host_memory
print(host_memory.keep_freed(Path(sys.argv[1])))
"""


def answer(code: str, *arguments: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code, *arguments], text=True).strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc's allocator")
def test_the_kernel_clears_no_page_twice(tmp_path):
    def faults(way: str) -> int:
        return int(answer(ALLOCATE_AGAIN, way, str(tmp_path)))

    # Every page of a new mapping is written to: once, or fifty times.
    assert faults("keep") < faults("leave") / 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc's allocator")
def test_freed_memory_is_kept_until_it_is_trimmed():
    peak, kept, left = map(int, answer(TRIM).split())
    assert kept > peak - (32 << 20)
    assert left < peak - (200 << 20)


@pytest.mark.parametrize("file", ["accel0", "vfio/0", "nvidia0"])
def test_with_an_accelerator_nothing_is_changed(tmp_path, monkeypatch, file):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert not host_memory._on_cpu(tmp_path)
    (tmp_path / file).unlink()
    assert host_memory._on_cpu(tmp_path)


@pytest.mark.parametrize(("platforms", "cpu"), [("cpu", True), ("tpu,cpu", False), ("cuda", False), ("", True)])
def test_the_platforms_of_jax_decide(tmp_path, monkeypatch, platforms, cpu):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    # In another process, because it would change this one.
    assert answer(ASK, str(tmp_path)) == str(cpu)
