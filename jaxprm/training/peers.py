"""Noticing at once that another process of a run has died: its kernel closes the connection that it held.

JAX notices by itself after a hundred seconds without a heartbeat, and then ends with a stack trace; until that, whoever
computes with the dead one waits. Here every process holds a connection with process 0.
"""

from __future__ import annotations

import hmac
import os
import socket
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxprm.errors import RESUMABLE

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
