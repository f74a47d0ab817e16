"""The C allocator, told to keep what is freed: a third of the time of sampling on a CPU would go into mapping memory.

XLA's CPU backend takes its temporaries from malloc at every call. glibc maps large ones anew each time and returns
them after it, and the kernel clears every page in between.
"""

import ctypes
import os
from pathlib import Path

# mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")


def keep_freed(devices: Path = Path("/dev")) -> bool:
    """Makes this process reuse freed memory where JAX computes on the CPU; elsewhere, and without glibc, nothing.

    To be called before JAX computes: the threads it starts then have arenas of their own, and keep them. Other programs
    get the memory back by `give_back`, or when the process ends. Returns whether it was done.
    """
    if not _on_cpu(devices) or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return False
    # One arena: those of further threads are 64 MB at most, and take larger blocks from the kernel or not at all.
    options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(option, value) == 1 for option, value in options)


def trim_malloc() -> None:
    """Returns what is free now to the system, where glibc can: between tasks whose needs differ."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _on_cpu(devices: Path) -> bool:
    """What JAX will compute on, from what it goes by: asking it would start its threads."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(next(devices.glob(pattern), None) for pattern in _ACCELERATORS)
