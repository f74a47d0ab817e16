"""Several hosts as one run: joined, checked against each other, stopped when one is lost, saved before a preemption."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxprm.errors import RESUMABLE, Interrupted, UserError
from jaxprm.quiet import tpu_chips

# A cold restart of a pod takes longer than the five minutes that JAX waits by default.
JOIN_SECONDS = 1800
# How long a process that is done, or has failed, waits for the others.
LEAVE_SECONDS = 20
CONNECT_SECONDS = 20
# Sent on connecting, so that no other program on the network is taken for a process of the run.
SECRET_BYTES = 16
FAREWELL = b"."
# Steps between two broadcasts of process 0's clock: a broadcast after every step would cost time.
CLOCK_EVERY = 10


@contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, slices: int = -1
) -> Iterator[None]:
    """Context manager that joins the processes of a run; when one of them dies or fails, the others end too.

    TPU hosts find each other. Elsewhere it does nothing unless `coordinator` (HOST:PORT of process 0), `processes` and
    the number of this `process` are given. Enter it before JAX is used.

    Args:
        slices: mesh.dcn_data; -1 is the number in the environment.

    Raises UserError if JAX would not compute on all of the machine's TPU chips.
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
        peers.leave()  # a preemption stops all processes at the same step: none is lost
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
        # A single TPU host that knows of no others, such as a notebook's.


def clear_stale(environment: MutableMapping[str, str], slices: int) -> None:
    """Removes the variables of an earlier multi-slice run if this run has one slice: it would wait for the others.

    Args:
        slices: mesh.dcn_data; -1 trusts the number in the environment.
    """
    if slices == 1 or environment.get("MEGASCALE_NUM_SLICES", "1") == "1":
        for name in [name for name in environment if name.startswith("MEGASCALE_")]:
            del environment[name]


def check_devices(chips: int, *, platform: str, local: int, total: int) -> None:
    """Raises UserError if JAX does not use all TPU chips of the machine, or the processes have unequal numbers.

    Args:
        chips: plugged in; platform: that JAX computes on; local, total: devices of this process, and of all.
    """
    if chips and platform != "tpu" and not _wants_cpu():
        raise UserError(
            f"this machine has {chips} TPU chips, but JAX computes on {platform}: install jax[tpu]=={jax.__version__}, "
            "or set JAX_PLATFORMS=cpu to mean it"
        )
    if platform == "tpu" and local < chips:
        raise UserError(
            f"this machine has {chips} TPU chips, but JAX sees {local}: another process uses the others; end it"
        )
    if total != local * jax.process_count():
        raise UserError(
            f"process {jax.process_index()} sees {local} devices of {total} in {jax.process_count()} processes: "
            "all processes need the same number; restart them together"
        )


def _wants_cpu() -> bool:
    return "cpu" in os.environ.get("JAX_PLATFORMS", "").split(",")


def is_primary() -> bool:
    """Whether this is process 0, which writes what all processes know."""
    return jax.process_index() == 0


def broadcast_from_primary(answer: bool) -> bool:
    """Process 0's answer, in every process."""
    return bool(number_from_primary(answer))


def number_from_primary(number: int) -> int:
    """Process 0's whole number, below 2^31, in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_equal(text: str, what: str) -> None:
    """Raises UserError, in every process, if the processes do not have the same `text`, a fingerprint of `what`."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    different = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(different):
        raise UserError(
            f"process {different[0]} of {len(digests)} does not see the same {what} as process 0: share one work "
            "directory between all processes; if they do share it, a read failed: run the same command again"
        )


def fetch(tree: Any) -> Any:
    """The tree as NumPy arrays on every host; arrays that are split over hosts are gathered."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)


class Peers:
    """Connections between process 0 and the others. A broken one ends this process, with one line and status 75.

    JAX's heartbeat detects a lost process too, but only after its timeout.
    """

    def __init__(self) -> None:
        self._connections: list[socket.socket] = []
        self._leaving = False

    def connect(self) -> None:
        """Connects the processes; all must call it. If no connection can be made, JAX's heartbeat remains."""
        server, contact = None, np.zeros(5 + SECRET_BYTES, np.int32)
        if jax.process_index() == 0:
            address = _own_address()
            server = socket.create_server((address, 0))
            contact[:] = [*socket.inet_aton(address), server.getsockname()[1], *os.urandom(SECRET_BYTES)]
        contact = np.asarray(multihost_utils.broadcast_one_to_all(contact))
        secret = bytes(contact[5:].astype(np.uint8))
        try:
            if server is not None:
                self._accept(server, secret)
            else:
                host = socket.inet_ntoa(bytes(contact[:4].astype(np.uint8)))
                connection = socket.create_connection((host, int(contact[4])), timeout=CONNECT_SECONDS)
                connection.sendall(secret + jax.process_index().to_bytes(4, "big"))
                self._watch(connection, 0)
        except OSError:
            pass
        finally:
            if server is not None:
                server.close()

    def leave(self) -> None:
        """Tells the other processes that this one exits normally, so that they do not end."""
        self._leaving = True
        for connection in self._connections:
            try:
                connection.sendall(FAREWELL)
                connection.close()
            except OSError:
                pass  # the other process left first

    def _accept(self, server: socket.socket, secret: bytes) -> None:
        server.settimeout(CONNECT_SECONDS)
        missing = jax.process_count() - 1
        while missing:
            connection, _ = server.accept()
            connection.settimeout(CONNECT_SECONDS)
            greeting = connection.recv(SECRET_BYTES + 4, socket.MSG_WAITALL)
            if hmac.compare_digest(greeting[:SECRET_BYTES], secret):
                self._watch(connection, int.from_bytes(greeting[SECRET_BYTES:], "big"))
                missing -= 1
            else:
                connection.close()

    def _watch(self, connection: socket.socket, process: int) -> None:
        connection.settimeout(None)
        self._connections.append(connection)
        threading.Thread(target=self._listen, args=(connection, process), daemon=True).start()

    def _listen(self, connection: socket.socket, process: int) -> None:
        try:
            received = connection.recv(1)
        except OSError:
            received = b""
        if received != FAREWELL and not self._leaving:
            print(  # on a new line: the progress bar is still on the last one
                f"\njaxprm: process {jax.process_index()} of {jax.process_count()}: process {process} is gone; "
                "run the same command again on all hosts to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            # A normal exit would wait for the lost process.
            os._exit(RESUMABLE)


def _own_address() -> str:
    """The address at which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the kernel only chooses the interface
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


class Preemption:
    """Context manager that turns SIGTERM into a flag: poll `should_stop(step)` in the loop, read `signalled` after it.

    With several processes JAX handles the signal of any of them, and agrees on a step that all of them will reach.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._previous_handler: Any = None

    def __enter__(self) -> Preemption:
        # Python allows signal handlers in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step; the same in every process. Call it after every step."""
        if jax.process_count() > 1 and jax.config.jax_enable_preemption_service:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signalled


class Timer:
    """Whether `minutes` have passed since the last save; never if None."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """The answer of process 0, the same in every process; with several processes every few steps only."""
        if self._seconds is None:
            return False
        if jax.process_count() == 1:
            return self._has_passed()
        return step % CLOCK_EVERY == 0 and broadcast_from_primary(self._has_passed())

    def _has_passed(self) -> bool:
        return time.monotonic() - self._since >= self._seconds
