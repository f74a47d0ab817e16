"""Several hosts as one run: joined, checked, stopped when one is lost, and saved before a preemption."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxprm.errors import RESUMABLE, Interrupted, UserError

FAREWELL = b"."
CONNECT_SECONDS = 20
# Shown on connecting, so that nobody else on the network is taken for a process of the run.
SECRET_BYTES = 16


class Peers:
    """The connections of this process. Ends the process, with one line and status 75, when one breaks off."""

    def __init__(self) -> None:
        self._connections: list[socket.socket] = []
        self._leaving = False

    def connect(self) -> None:
        """Called by every process at the same place. Where no connection can be made, the heartbeat alone is left."""
        server, here = None, np.zeros(5 + SECRET_BYTES, np.int32)
        if jax.process_index() == 0:
            own = _own_address()
            server = socket.create_server((own, 0))
            here[:] = [*socket.inet_aton(own), server.getsockname()[1], *os.urandom(SECRET_BYTES)]
        here = np.asarray(multihost_utils.broadcast_one_to_all(here))
        secret = bytes(here[5:].astype(np.uint8))
        try:
            if server is not None:
                self._accept(server, secret)
            else:
                host = socket.inet_ntoa(bytes(here[:4].astype(np.uint8)))
                connection = socket.create_connection((host, int(here[4])), timeout=CONNECT_SECONDS)
                connection.sendall(secret + jax.process_index().to_bytes(4, "big"))
                self._watch(connection, 0)
        except OSError:
            pass
        finally:
            if server is not None:
                server.close()

    def _accept(self, server: socket.socket, secret: bytes) -> None:
        server.settimeout(CONNECT_SECONDS)
        waiting = jax.process_count() - 1
        while waiting:
            connection, _ = server.accept()
            connection.settimeout(CONNECT_SECONDS)
            said = connection.recv(SECRET_BYTES + 4, socket.MSG_WAITALL)
            if hmac.compare_digest(said[:SECRET_BYTES], secret):
                self._watch(connection, int.from_bytes(said[SECRET_BYTES:], "big"))
                waiting -= 1
            else:
                connection.close()

    def leave(self) -> None:
        """Says farewell: this process ends, and nobody has to."""
        self._leaving = True
        for connection in self._connections:
            try:
                connection.sendall(FAREWELL)
                connection.close()
            except OSError:
                pass  # it went first

    def _watch(self, connection: socket.socket, process: int) -> None:
        connection.settimeout(None)
        self._connections.append(connection)
        threading.Thread(target=self._listen, args=(connection, process), daemon=True).start()

    def _listen(self, connection: socket.socket, process: int) -> None:
        try:
            heard = connection.recv(1)
        except OSError:
            heard = b""
        if heard != FAREWELL and not self._leaving:
            print(  # below the progress bar, which nobody ends
                f"\njaxprm: process {jax.process_index()} of {jax.process_count()}: process {process} is gone; "
                "run the same command again on all hosts, it goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            # A regular end would wait for the one that is gone.
            os._exit(RESUMABLE)


def _own_address() -> str:
    """The address under which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the kernel only chooses the interface
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


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


def broadcast_from_primary(answer: bool) -> bool:
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


# Steps between two looks at the clock of process 0, where there are several.
CLOCK_EVERY = 10


class Preemption:
    """Within its `with`, SIGTERM is a notice that `noticed` tells of, and `signalled` afterwards, and no death.

    With several processes JAX takes the notice of any of them and agrees on a step that all of them will reach.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process. To be asked after every step."""
        if jax.process_count() > 1 and jax.config.jax_enable_preemption_service:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signalled


class Timer:
    """Whether `minutes` have passed since the last save; None never."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """The same answer in every process: that of process 0, asked every few steps."""
        if self._seconds is None:
            return False
        if jax.process_count() == 1:
            return self._passed()
        return step % CLOCK_EVERY == 0 and broadcast_from_primary(self._passed())

    def _passed(self) -> bool:
        return time.monotonic() - self._since >= self._seconds
