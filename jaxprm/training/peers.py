"""Noticing at once that another process of a run has died: its kernel closes the connection that it held.

JAX notices by itself after a hundred seconds without a heartbeat, and then ends with a stack trace; until that, whoever
computes with the dead one waits. Here every process holds a connection with process 0.
"""

from __future__ import annotations

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


class Peers:
    """The connections of this process. Ends the process, with one line and status 75, when one breaks off."""

    def __init__(self) -> None:
        self._connections: list[socket.socket] = []
        self._leaving = False

    def connect(self) -> None:
        """Called by every process at the same place. Where no connection can be made, the heartbeat alone is left."""
        server, address = None, np.zeros(5, np.int32)
        if jax.process_index() == 0:
            server = socket.create_server(("", 0))
            address[:] = [*socket.inet_aton(_own_address()), server.getsockname()[1]]
        address = np.asarray(multihost_utils.broadcast_one_to_all(address))
        try:
            if server is not None:
                server.settimeout(CONNECT_SECONDS)
                for _ in range(jax.process_count() - 1):
                    connection, _ = server.accept()
                    connection.settimeout(CONNECT_SECONDS)
                    self._watch(connection, int.from_bytes(connection.recv(4), "big"))
            else:
                host = socket.inet_ntoa(bytes(address[:4].astype(np.uint8)))
                connection = socket.create_connection((host, int(address[4])), timeout=CONNECT_SECONDS)
                connection.sendall(jax.process_index().to_bytes(4, "big"))
                self._watch(connection, 0)
        except OSError:
            pass
        finally:
            if server is not None:
                server.close()

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
            print(
                f"jaxprm: process {jax.process_index()} of {jax.process_count()}: process {process} is gone; "
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
