"""Freed memory is kept where JAX computes on the CPU, and only there."""

import subprocess
import sys

import pytest

from jaxprm import host_memory

FREED_AND_TAKEN_AGAIN = """
import resource, sys
from pathlib import Path
from jaxprm import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed(Path(sys.argv[2]))
for _ in range(50):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

GIVEN_BACK = """
from pathlib import Path
from jaxprm import host_memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
assert host_memory.keep_freed(Path("/nowhere"))
blocks = [b"x" * (64 << 20) for _ in range(4)]
above = b"y" * (1 << 20)  # what is below it is no end of the heap
most = held()
del blocks
kept = held()
host_memory.trim_malloc()
print(most, kept, held())
"""

ASKED = """
import sys
from pathlib import Path
from jaxprm import host_memory
print(host_memory.keep_freed(Path(sys.argv[1])))
"""


def answer(code: str, *arguments: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code, *arguments], text=True).strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is told is glibc's allocator")
def test_the_kernel_clears_no_page_twice(tmp_path):
    def faults(way: str) -> int:
        return int(answer(FREED_AND_TAKEN_AGAIN, way, str(tmp_path)))

    # Every page of a new mapping is written to: once, or fifty times.
    assert faults("keep") < faults("leave") / 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is told is glibc's allocator")
def test_what_is_free_is_kept_until_it_is_given_back():
    most, kept, left = map(int, answer(GIVEN_BACK).split())
    assert kept > most - (32 << 20)
    assert left < most - (200 << 20)


@pytest.mark.parametrize("file", ["accel0", "vfio/0", "nvidia0"])
def test_beside_an_accelerator_nothing_is_changed(tmp_path, monkeypatch, file):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert not host_memory._on_cpu(tmp_path)
    (tmp_path / file).unlink()
    assert host_memory._on_cpu(tmp_path)


@pytest.mark.parametrize(("platforms", "cpu"), [("cpu", True), ("tpu,cpu", False), ("cuda", False), ("", True)])
def test_what_jax_is_told_decides(tmp_path, monkeypatch, platforms, cpu):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    # Asked of a process of its own if it would do it: this one is to stay as it is.
    assert answer(ASKED, str(tmp_path)) == str(cpu)
