"""Settings of the C allocator. Without them, a third of the time of sampling on a CPU goes into mapping memory.

XLA's CPU backend allocates its temporaries with malloc at every call. glibc maps large ones from the kernel and unmaps
them after the call, and the kernel clears every page in between.
"""

import ctypes
import os
from pathlib import Path

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")


def keep_freed(devices: Path = Path("/dev")) -> bool:
    """Makes this process keep and reuse freed memory, if JAX computes on the CPU and the C library is glibc.

    To be called before JAX computes: threads started earlier have arenas of their own already. `trim_malloc` returns
    the memory to the system. Returns whether the settings were made.
    """
    if not _on_cpu(devices) or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return False
    # A single arena: those of further threads hold at most 64 MB, so larger blocks would be mapped after all.
    options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(option, value) == 1 for option, value in options)


def trim_malloc() -> None:
    """Returns freed memory to the system, if the C library is glibc. For use between tasks whose needs differ."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _on_cpu(devices: Path) -> bool:
    """Whether JAX will compute on the CPU, from its environment. Asking JAX would start its threads."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(next(devices.glob(pattern), None) for pattern in _ACCELERATORS)
