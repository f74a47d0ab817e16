"""Handling environments that may do anything: each closed once, and what they return checked.

`reset`, `step` and `outcome` raise what the environment raises, or TypeError or ValueError for what it must not return.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jaxprm.environments.protocol import Environment, StepResult

T, R = TypeVar("T"), TypeVar("R")


class Pool:
    """Environments made when needed and used again. Every one that was made is closed exactly once.

    Those that `make` makes may work at the same time, `make.at_once` of them; one where it says nothing.
    """

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self.at_once: int = getattr(make, "at_once", 1)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._open: list[Environment] = []
        self._idle: list[Environment] = []

    def map(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """What `act` returns for every item, each with environments of its own, in order."""
        if self.at_once == 1 or len(items) < 2:
            return [act(item) for item in items]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.at_once, thread_name_prefix="environments")
        return list(self._threads.map(act, items))

    def take(self) -> Environment:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        environment = self._make()
        with self._lock:
            self._open.append(environment)
        return environment

    def give_back(self, environment: Environment) -> None:
        with self._lock:
            self._idle.append(environment)

    def discard(self, environment: Environment) -> None:
        """Closes an environment that has failed: what state it is in is not known, so no other episode may have it."""
        with self._lock:
            self._open = [other for other in self._open if other is not environment]
        # It has been reported as broken already; that it cannot be closed either adds nothing.
        with contextlib.suppress(Exception):
            environment.close()

    def close(self) -> None:
        """Closes what is open, all of it even where one raises."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        with contextlib.ExitStack() as stack:
            while self._open:
                stack.callback(self._open.pop().close)
        self._idle.clear()


def reset(environment: Environment, task: str) -> str:
    """The prompt of a task."""
    return _text(environment.reset(task), "reset")


def step(environment: Environment, action: str) -> StepResult:
    """The result of an action; a plain (observation, reward, done) will do."""
    observation, reward, done = environment.step(action)
    return StepResult(_text(observation, "step"), float(reward), bool(done))


def outcome(environment: Environment) -> float:
    """The grade of the episode, in [0, 1]."""
    value = float(environment.outcome())
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"outcome() returned {value}; it must be in [0, 1]")
    return value


def answer(environment: Environment) -> str | None:
    """What the episode came to, where there is something to compare with other episodes'."""
    value = environment.answer()
    return None if value is None else _text(value, "answer", "answer")


def _text(value: Any, method: str, what: str = "observation") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{method}() returned a {type(value).__name__} for the {what}; it must be text")
    return value
