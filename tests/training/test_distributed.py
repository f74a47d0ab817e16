"""Checks of the machine before processes are joined, and what a process does when another one is lost."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading

import jax
import numpy as np
import pytest

from jaxprm.errors import RESUMABLE, UserError
from jaxprm.training import distributed
from jaxprm.training.distributed import FAREWELL, SECRET_BYTES, Peers, Preemption, Timer


@pytest.mark.parametrize(
    "slices, environment, cleared",
    [
        (-1, {"MEGASCALE_COORDINATOR_ADDRESS": "old"}, True),
        (-1, {"MEGASCALE_COORDINATOR_ADDRESS": "a", "MEGASCALE_NUM_SLICES": "2"}, False),
        (1, {"MEGASCALE_COORDINATOR_ADDRESS": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_variables_of_an_earlier_multi_slice_run_are_removed(slices, environment, cleared):
    variables = environment | {"HOME": "/root"}
    distributed.clear_stale(variables, slices)
    assert variables == ({"HOME": "/root"} if cleared else environment | {"HOME": "/root"})


@pytest.mark.parametrize(
    "chips, devices, message",
    [
        (4, ("cpu", 1, 1), r"has 4 TPU chips, but JAX computes on cpu: install jax\[tpu\]"),
        (4, ("tpu", 1, 1), r"4 TPU chips, but JAX sees 1: another process uses the others"),
        (0, ("cpu", 4, 7), r"sees 4 devices of 7 in 1 processes"),
    ],
)
def test_a_wrong_platform_or_count_is_refused(chips, devices, message, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match=message) as raised:
        distributed.check_devices(chips, **dict(zip(("platform", "local", "total"), devices, strict=True)))
    assert "\n" not in str(raised.value)


def test_the_right_devices_are_not_refused(monkeypatch):
    distributed.check_devices(4, platform="tpu", local=4, total=4)
    distributed.check_devices(4, platform="tpu", local=8, total=8)  # two cores a chip
    distributed.check_devices(0, platform="cpu", local=1, total=1)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    distributed.check_devices(4, platform="cpu", local=1, total=1)


@pytest.mark.parametrize("farewell", [True, False])
def test_a_connection_that_breaks_ends_the_process_and_a_farewell_does_not(farewell, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ours, theirs = socket.socketpair()
    listening = Peers()
    if farewell:
        theirs.sendall(FAREWELL)
    theirs.close()
    listening._listen(ours, 3)
    assert ended == ([] if farewell else [RESUMABLE])
    printed = capsys.readouterr().err
    assert (
        printed.strip().count("\n") == 0
        and printed.startswith("\njaxprm: process 0 of 1: process 3 is gone") != farewell
    )


def test_sigterm_is_a_flag_inside_the_context_and_has_its_handler_back_after_it():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop(2)
    assert signal.getsignal(signal.SIGTERM) is before
    assert jax.process_count() == 1


def test_minutes_since_the_last_save(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    timer = Timer(2.0)
    now[0] += 119
    assert not timer.due(1)
    now[0] += 1
    assert timer.due(2)
    timer.restart()
    assert not timer.due(3) and not Timer(None).due(10**9)


def test_a_connection_without_the_secret_is_refused(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    secret = b"s" * SECRET_BYTES
    watched = []
    group = Peers()
    monkeypatch.setattr(group, "_watch", lambda connection, process: watched.append((connection, process)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        waiting = threading.Thread(target=group._accept, args=(server, secret))
        waiting.start()
        address = server.getsockname()
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"x" * SECRET_BYTES + (1).to_bytes(4, "big"))
            stranger.settimeout(10)
            assert stranger.recv(1) == b"" and not watched
        with socket.create_connection(address) as process:
            process.sendall(secret + (1).to_bytes(4, "big"))
            waiting.join(10)
            assert [number for _, number in watched] == [1]
            watched[0][0].close()


def test_processes_that_read_different_shards_all_raise(monkeypatch):
    distributed.check_equal("alone", "shards")
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
    others = {"same": ("same", "same"), "mine": ("mine", "broken")}
    for text, (first, third) in others.items():
        digests = [np.frombuffer(hashlib.sha256(other.encode()).digest(), np.uint8) for other in (first, third)]
        gathered = lambda mine, digests=digests: np.stack([digests[0], mine, digests[1]])
        monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gathered)
        if third == text:
            distributed.check_equal(text, "shards")
        else:
            with pytest.raises(UserError, match="process 2 of 3 does not see the same shards as process 0"):
                distributed.check_equal(text, "shards")
