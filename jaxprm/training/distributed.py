"""Several hosts as one run: joined by themselves on TPUs, checked before any work, left when one of them is lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxprm.errors import Interrupted, UserError
from jaxprm.training.peers import Peers

# A cold restart of a pod takes longer than JAX's five minutes.
JOIN_SECONDS = 1800
# How long the others are waited for when a process is done, or has an error to tell.
LEAVE_SECONDS = 20
_GOOGLE, _ACCELERATOR = "0x1ae0", "0x12"


@contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, slices: int = -1
) -> Iterator[None]:
    """Within it the processes of a run are one, and when one of them dies or fails the others end too.

    On a TPU, which knows its hosts, without being told of them. Anywhere else it does nothing unless `coordinator`
    (HOST:PORT of process 0), `processes` and this `process` are given. To be entered before JAX is used.

    Raises UserError when JAX would compute on something other than the machine's TPU chips, or on fewer.
    """
    chips = 0 if _wants_cpu() else tpu_chips()
    if coordinator is not None or chips:
        _initialize(coordinator, processes, process, slices=slices, on_tpu=chips > 0)
        platform = jax.default_backend()
        check_devices(chips, platform=platform, local=jax.local_device_count(), total=jax.device_count())
    if coordinator is None and (not chips or jax.process_count() == 1):
        yield
        return
    peers = Peers()
    peers.connect()
    try:
        yield
    except Interrupted:
        peers.leave()  # all of them stop at the same step
        raise
    peers.leave()


def _initialize(
    coordinator: str | None, processes: int | None, process: int | None, *, slices: int, on_tpu: bool
) -> None:
    if jax.distributed.is_initialized():
        return
    clear_stale(os.environ, slices)
    if not on_tpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except ValueError:
        if coordinator is not None:
            raise
        # A single TPU host that knows of no others, as a notebook's.


def tpu_chips(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """How many TPU chips are plugged into this machine, whatever JAX was installed for."""
    found = 0
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor == _GOOGLE and kind.startswith(_ACCELERATOR)
    return found


def clear_stale(environment: Any, slices: int) -> None:
    """Removes what a multi-slice run left in the environment, where this one has a single slice: it would wait forever.

    slices: mesh.dcn_data; -1 where the environment's own count is to be believed.
    """
    if slices == 1 or environment.get("MEGASCALE_NUM_SLICES", "1") == "1":
        for name in [name for name in environment if name.startswith("MEGASCALE_")]:
            del environment[name]


def check_devices(chips: int, *, platform: str, local: int, total: int) -> None:
    """Raises UserError when there are TPU chips and JAX has not got them all, or the processes have unequal shares."""
    if chips and platform != "tpu" and not _wants_cpu():
        raise UserError(
            f"this machine has {chips} TPU chips, but JAX computes on {platform}: install jax[tpu]=={jax.__version__}, "
            "or set JAX_PLATFORMS=cpu to mean it"
        )
    if platform == "tpu" and local < chips:
        raise UserError(
            f"this machine has {chips} TPU chips, but JAX sees {local}: another process holds the rest; end it"
        )
    if total != local * jax.process_count():
        raise UserError(
            f"process {jax.process_index()} sees {local} devices of {total} in {jax.process_count()} processes: "
            "all need as many; restart them together"
        )


def _wants_cpu() -> bool:
    return "cpu" in os.environ.get("JAX_PLATFORMS", "").split(",")


def is_primary() -> bool:
    """Whether this is the process that writes what all of them know."""
    return jax.process_index() == 0


def agreed(answer: bool) -> bool:
    """Process 0's answer, in every process."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def check_equal(text: str, what: str) -> None:
    """Raises UserError, in every process alike, where they do not have the same `text` of `what`."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(digest)
    other = np.flatnonzero((found != found[0]).any(axis=1))
    if len(other):
        raise UserError(
            f"process {other[0]} of {len(found)} does not see the same {what} as process 0: all need a work directory "
            "that they share; if they do, one of them reads it wrong, and the same command may go on"
        )


def fetch(tree: Any) -> Any:
    """The tree on every host, as NumPy arrays; parts of other hosts are gathered."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)
