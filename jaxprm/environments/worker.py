"""Environments in processes of their own: one that crashes, hangs or leaks costs its episode and nothing else.

A `Remote` is an Environment whose calls go, as lines of JSON, to a process that was started for it. A call that takes
too long or never returns ends that process; the next call starts another. Snapshots stay where they were made, and
those of a process that is gone are made again by repeating what led to them, which must look the same.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from jaxprm.environments.protocol import StepResult, create
from jaxprm.errors import UserError

OPTIONAL = ("describe", "answer")
# What a process is given to leave by itself before it is killed.
GRACE_SECONDS = 2.0
# And to start, where a call may take less.
START_SECONDS = 60.0


class Snapshot:
    """A state of an environment: its number in the process that made it, and how it was reached."""

    def __init__(self, process: _Process, number: int, task: str, steps: tuple[tuple[str, str], ...], prompt: str):
        self.process, self.number, self.task, self.steps, self.prompt = process, number, task, steps, prompt
        weakref.finalize(self, process.dropped.append, number)


class Workers:
    """Makes environments that a config names, each in a process of its own, and counts what became of those processes.

    at_once: how many may work at a time; timeout: seconds that a call may take; memory: bytes that a process may hold
    between episodes, None for any. `ended` counts processes that were ended before their time, by
    reason: "crashed", "timed out", "too large".
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

    def __call__(self) -> Remote:
        return Remote(self)


class Remote:
    """An environment in another process; an Environment of the fork that the one there has.

    Calls raise RuntimeError with what was raised there, TimeoutError for what took too long, and ConnectionError for a
    process that ended. Raises UserError where it cannot be made at all.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        self._process: _Process | None = None
        self._task, self._prompt = "", ""
        self._steps: tuple[tuple[str, str], ...] = ()
        try:
            about = self._running().about
        except (RuntimeError, TimeoutError, ConnectionError) as error:
            raise UserError(f"environment {workers.name!r}: {error}; mend it, or try it with workers=0") from error
        self.fork, self.max_rounds = about["fork"], about["max_rounds"]

    def __getattr__(self, name: str) -> Any:
        # What an environment may have or not, is here exactly where it is there.
        if name in OPTIONAL and name in self._running().about["optional"]:
            return lambda *arguments: self._call(name, *arguments)
        raise AttributeError(name)

    def tasks(self, split: str) -> list[str]:
        return self._call("tasks", split)

    def reset(self, task: str) -> str:
        self._end_if_large()
        self._task, self._steps = task, ()
        self._prompt = self._call("reset", task)
        return self._prompt

    def step(self, action: str) -> StepResult:
        result = self._call("step", action)
        with contextlib.suppress(TypeError, ValueError):  # whoever asked will say what is wrong with it
            self._steps = (*self._steps, (action, result[0]))
            return StepResult(*result)
        return result

    def outcome(self) -> float:
        return self._call("outcome")

    def snapshot(self) -> Snapshot:
        return Snapshot(self._running(), self._call("snapshot"), self._task, self._steps, self._prompt)

    def restore(self, state: Snapshot) -> None:
        self._end_if_large()
        if state.process is self._process:
            self._call("restore", state.number)
        else:
            _same("the prompt", self._call("reset", state.task), state.prompt)
            for action, observed in state.steps:
                _same("an observation", self._call("step", action)[0], observed)
        self._task, self._steps, self._prompt = state.task, state.steps, state.prompt

    def close(self) -> None:
        """Ends the process; it is asked to first."""
        if self._process is not None:
            with contextlib.suppress(Exception):
                self._process.call("close", ())
            self._process.end(GRACE_SECONDS)
            self._process = None

    def _running(self) -> _Process:
        if self._process is None:
            self._process = self._watched(lambda: _Process(self._workers))
        return self._process

    def _call(self, method: str, *arguments: Any) -> Any:
        process = self._running()
        return self._watched(lambda: process.call(method, arguments))

    def _watched(self, call) -> Any:
        """A call after which there is no process if it ended, or had to be ended."""
        try:
            return call()
        except (TimeoutError, ConnectionError) as error:
            self._workers.ended["timed out" if isinstance(error, TimeoutError) else "crashed"] += 1
            if self._process is not None:
                self._process.end()
                self._process = None
            raise

    def _end_if_large(self) -> None:
        limit = self._workers.memory
        if limit is not None and self._process is not None and self._process.memory() > limit:
            self._workers.ended["too large"] += 1
            self._process.end(GRACE_SECONDS)
            self._process = None


class _Process:
    """A process with one environment, and the line to it. `dropped`: snapshots that nobody holds any more."""

    def __init__(self, workers: Workers):
        self.dropped: list[int] = []
        self._timeout = workers.timeout
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxprm.environments.worker", str(theirs.fileno())]
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._line = _Line(ours)
        try:
            about = (sys.path, workers.name, workers.arguments)
            self.about = self.call("", about, timeout=max(START_SECONDS, self._timeout))
        except BaseException:
            self.end()
            raise

    def call(self, method: str, arguments: tuple, timeout: float | None = None) -> Any:
        timeout = timeout or self._timeout
        freed = [self.dropped.pop() for _ in range(len(self.dropped))]
        try:
            self._line.send([method, arguments, freed], timeout)
            kind, value = self._line.receive(timeout)
        except TimeoutError:
            what = f"{method}()" if method else "its start"
            raise TimeoutError(f"{what} took more than {timeout:g} s; its process was ended") from None
        except (OSError, EOFError):
            raise ConnectionError(f"its process ended{self._status()} in {method or 'its start'}") from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(value)
        return value

    def memory(self) -> int:
        """Bytes that it holds; 0 where the system does not tell."""
        try:
            return int(Path(f"/proc/{self._child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def end(self, grace: float = 0.0) -> None:
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(grace) if grace else None
        self._child.kill()
        self._child.wait()

    def _status(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" with status {self._child.wait(GRACE_SECONDS)}"
        return ""


class _Line:
    """Values as lines of JSON over a socket."""

    def __init__(self, connection: socket.socket):
        self._connection, self._rest = connection, b""

    def send(self, value: Any, timeout: float | None = None) -> None:
        self._connection.settimeout(timeout)
        self._connection.sendall(msgspec.json.encode(value) + b"\n")

    def receive(self, timeout: float | None = None) -> Any:
        """Raises TimeoutError, and EOFError where the other side is gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._rest:
            if deadline is not None and (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._connection.settimeout(None if deadline is None else left)
            if not (part := self._connection.recv(1 << 16)):
                raise EOFError
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return msgspec.json.decode(line)

    def close(self) -> None:
        self._connection.close()


def _same(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise RuntimeError(f"its process was lost, and {what} differs now: {found[:80]!r} after {expected[:80]!r}")


def serve(line: _Line) -> None:
    """The other side: makes the environment it is told and answers calls until the line is closed."""
    environment, snapshots, made = None, {}, 0

    def answer(method: str, arguments: list) -> Any:
        nonlocal environment, made
        if not method:
            path, name, given = arguments
            sys.path += [entry for entry in path if entry not in sys.path]
            environment = create(name, given)
            optional = [name for name in OPTIONAL if hasattr(environment, name)]
            return {"fork": environment.fork, "max_rounds": environment.max_rounds, "optional": optional}
        if method == "snapshot":
            made += 1
            snapshots[made] = environment.snapshot()
            return made
        if method == "restore":
            return environment.restore(snapshots[arguments[0]])
        if method == "tasks":
            return list(environment.tasks(*arguments))
        return getattr(environment, method)(*arguments)

    while True:
        try:
            method, arguments, freed = line.receive()
        except (EOFError, OSError):
            return
        for number in freed:
            snapshots.pop(number, None)
        try:
            reply = ["value", answer(method, arguments)]
            msgspec.json.encode(reply)
        except UserError as error:
            reply = ["user error", str(error)]
        except Exception as error:
            # An environment may raise anything, or return what no JSON can say: either is told.
            reply = ["error", f"{type(error).__name__}: {error}"]
        line.send(reply)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    # What the environment prints is for people: the line of answers is not standard output.
    os.dup2(2, 1)
    serve(_Line(socket.socket(fileno=descriptor)))
