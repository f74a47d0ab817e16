"""Environments in worker processes: one that crashes, hangs or leaks memory costs its own episode and no other.

A `RemoteEnvironment` is an Environment whose calls go to a worker, a process with one environment, as lines of JSON
over a socket. A worker that crashes or exceeds the time limit is ended, and the next call starts another. Snapshots
stay in the worker that made them. If that worker has ended, a snapshot is restored by repeating the actions that led to
it, and the observations must be the same.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from jaxprm.environments.protocol import StepResult, create
from jaxprm.errors import UserError

OPTIONAL_METHODS = ("describe", "answer")
# How long a worker may take to exit by itself before it is killed.
GRACE_SECONDS = 2.0
# The least time for start-up, which imports the environment's libraries: calls may have a shorter limit.
START_SECONDS = 60.0


class Workers:
    """A factory of environments that a config names, each in a worker of its own.

    Attributes:
        at_once: how many environments may work at the same time.
        timeout: seconds that a call may take.
        memory: bytes that a worker may hold between episodes, or None for no limit.
        ended: number of workers that were replaced, by reason: "crashed", "timed out", "too large".
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        at_once: int = 1,
        timeout: float = 120.0,
        memory: int | None = None,
    ):
        self.name, self.arguments = name, dict(arguments)
        self.at_once, self.timeout, self.memory = at_once, timeout, memory
        self.ended: Counter[str] = Counter()

    def __call__(self) -> RemoteEnvironment:
        return RemoteEnvironment(self)


class Snapshot:
    """A state in a worker: its number there, and the prompt and (action, observation) pairs that led to it."""

    def __init__(self, worker: _Worker, number: int, task: str, steps: tuple[tuple[str, str], ...], prompt: str):
        self.worker, self.number, self.task, self.steps, self.prompt = worker, number, task, steps, prompt
        # The worker drops its copy once this object is gone; a search makes one snapshot for every step it executes.
        weakref.finalize(self, worker.unused_snapshots.append, number)


class RemoteEnvironment:
    """An environment in a worker, with the fork and max_rounds that it has there.

    A call raises RuntimeError with the text of what the environment raised, TimeoutError if it took too long, and
    ConnectionError if the worker ended. Raises UserError if the environment cannot be made.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        self._worker: _Worker | None = None
        self._task, self._prompt = "", ""
        self._steps: tuple[tuple[str, str], ...] = ()
        try:
            about = self._running().about
        except (RuntimeError, TimeoutError, ConnectionError) as error:
            raise UserError(
                f"environment {workers.name!r}: {error}; fix the environment, or try it with workers=0"
            ) from error
        self.fork, self.max_rounds = about["fork"], about["max_rounds"]

    def __getattr__(self, name: str) -> Any:
        # Callers test for optional methods with hasattr, so these exist here only if the environment has them.
        if name in OPTIONAL_METHODS and name in self._running().about["optional"]:
            return lambda *arguments: self._call(name, *arguments)
        raise AttributeError(name)

    def tasks(self, split: str) -> list[str]:
        return self._call("tasks", split)

    def reset(self, task: str) -> str:
        self._end_if_too_large()
        self._task, self._steps = task, ()
        self._prompt = self._call("reset", task)
        return self._prompt

    def step(self, action: str) -> StepResult:
        result = self._call("step", action)
        # A malformed result is passed on as it is: protocol.step says what is wrong with it.
        with contextlib.suppress(TypeError, ValueError):
            self._steps = (*self._steps, (action, result[0]))
            return StepResult(*result)
        return result

    def outcome(self) -> float:
        return self._call("outcome")

    def snapshot(self) -> Snapshot:
        return Snapshot(self._running(), self._call("snapshot"), self._task, self._steps, self._prompt)

    def restore(self, state: Snapshot) -> None:
        self._end_if_too_large()
        # Snapshot numbers have a meaning only in the worker that counted them.
        if state.worker is self._worker:
            self._call("restore", state.number)
        else:
            _check_same("the prompt", self._call("reset", state.task), state.prompt)
            for action, observation in state.steps:
                _check_same("an observation", self._call("step", action)[0], observation)
        self._task, self._steps, self._prompt = state.task, state.steps, state.prompt

    def close(self) -> None:
        """Closes the environment, if its worker still answers, and ends the worker."""
        if self._worker is not None:
            with contextlib.suppress(Exception):
                self._worker.call("close", ())
            self._worker.end(GRACE_SECONDS)
            self._worker = None

    def _running(self) -> _Worker:
        if self._worker is None:
            self._worker = self._watch(lambda: _Worker(self._workers))
        return self._worker

    def _call(self, method: str, *arguments: Any) -> Any:
        worker = self._running()
        return self._watch(lambda: worker.call(method, arguments))

    def _watch(self, call: Callable[[], Any]) -> Any:
        """The result of a call. A worker that crashed or took too long is ended, and the next call starts another."""
        try:
            return call()
        except (TimeoutError, ConnectionError) as error:
            self._workers.ended["timed out" if isinstance(error, TimeoutError) else "crashed"] += 1
            # A worker that fails in start-up ends itself, and is not yet here.
            if self._worker is not None:
                self._worker.end()
                self._worker = None
            raise

    def _end_if_too_large(self) -> None:
        # Called only before a reset or a restore: what is restored can be repeated in another worker.
        limit = self._workers.memory
        if limit is not None and self._worker is not None and self._worker.memory() > limit:
            self._workers.ended["too large"] += 1
            self._worker.end(GRACE_SECONDS)
            self._worker = None


class _Worker:
    """A process with one environment, as seen from here.

    about: what it answered to "create": fork, max_rounds, optional methods. unused_snapshots: numbers of snapshots that
    it can drop, sent with the next call.
    """

    def __init__(self, workers: Workers):
        self.unused_snapshots: list[int] = []
        self._timeout = workers.timeout
        # A socket, because stdin and stdout may be used by the environment's own code.
        ours, theirs = socket.socketpair()
        # Our copy of its end is closed: otherwise we would not see that the worker closed it by ending.
        with theirs:
            command = [sys.executable, "-m", "jaxprm.environments.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._connection = _Connection(ours)
        try:
            # With our sys.path, so that the worker finds a user's modules where we do.
            arguments = (sys.path, workers.name, workers.arguments)
            self.about = self.call("create", arguments, timeout=max(START_SECONDS, self._timeout))
        # Also for Ctrl-C, or the process would be left.
        except BaseException:
            self.end()
            raise

    def call(self, method: str, arguments: tuple, timeout: float | None = None) -> Any:
        timeout = timeout or self._timeout
        # One by one: finalizers append to the list at any time.
        dropped = [self.unused_snapshots.pop() for _ in range(len(self.unused_snapshots))]
        what = "start-up" if method == "create" else f"{method}()"
        try:
            self._connection.send([method, arguments, dropped], timeout)
            kind, value = self._connection.receive(timeout)
        except TimeoutError:
            raise TimeoutError(f"{what} took more than {timeout:g} s; its worker was ended") from None
        except (OSError, EOFError):
            raise ConnectionError(f"its worker ended{self._exit_status()} in {what}") from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(value)
        return value

    def memory(self) -> int:
        """Resident bytes; 0 on systems without /proc."""
        try:
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def end(self, grace: float = 0.0) -> None:
        """Ends the process: closing the connection asks it to exit, and after `grace` seconds it is killed."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # No grace after a failure: the worker is not expected to exit by itself.
            self._process.wait(grace) if grace else None
        self._process.kill()
        self._process.wait()

    def _exit_status(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" with status {self._process.wait(GRACE_SECONDS)}"
        return ""


class _Connection:
    """Sends and receives values as lines of JSON over a socket."""

    def __init__(self, connection: socket.socket):
        self._socket, self._received = connection, b""

    def send(self, value: Any, timeout: float | None = None) -> None:
        self._socket.settimeout(timeout)
        self._socket.sendall(msgspec.json.encode(value) + b"\n")

    def receive(self, timeout: float | None = None) -> Any:
        """The next value. Raises TimeoutError, and EOFError if the other side has closed the connection."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # The limit is for the whole line: a worker that sends a byte now and then must not escape it.
        while b"\n" not in self._received:
            if deadline is not None and (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(None if deadline is None else left)
            if not (part := self._socket.recv(1 << 16)):
                raise EOFError
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return msgspec.json.decode(line)

    def close(self) -> None:
        self._socket.close()


def _check_same(what: str, observed: str, expected: str) -> None:
    if observed != expected:
        raise RuntimeError(f"its worker was lost, and {what} differs now: {observed[:80]!r} after {expected[:80]!r}")


def serve(connection: _Connection) -> None:
    """The worker's side: answers calls until the connection is closed. The first call makes the environment."""
    environment, snapshots, last_number = None, {}, 0

    def answer(method: str, arguments: list) -> Any:
        nonlocal environment, last_number
        if method == "create":
            path, name, keywords = arguments
            sys.path += [entry for entry in path if entry not in sys.path]
            environment = create(name, keywords)
            optional = [method for method in OPTIONAL_METHODS if hasattr(environment, method)]
            return {"fork": environment.fork, "max_rounds": environment.max_rounds, "optional": optional}
        if method == "snapshot":
            last_number += 1
            snapshots[last_number] = environment.snapshot()
            return last_number
        if method == "restore":
            return environment.restore(snapshots[arguments[0]])
        if method == "tasks":
            return list(environment.tasks(*arguments))
        return getattr(environment, method)(*arguments)

    while True:
        try:
            method, arguments, dropped = connection.receive()
        # The program that started this worker has ended, or closes it.
        except (EOFError, OSError):
            return
        for number in dropped:
            snapshots.pop(number, None)
        try:
            reply = ["value", answer(method, arguments)]
            # Tried here, while an error can still be the reply.
            msgspec.json.encode(reply)
        except UserError as error:
            reply = ["user error", str(error)]
        except Exception as error:
            # An environment may raise anything, and return what JSON cannot hold; the worker reports it and lives on.
            reply = ["error", f"{type(error).__name__}: {error}"]
        connection.send(reply)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    # What the environment prints goes to stderr: stdout may be the run's own output.
    os.dup2(2, 1)
    serve(_Connection(socket.socket(fileno=descriptor)))
