"""Handling environments that may do anything: each closed once, and what they return checked.

`reset`, `step` and `outcome` raise what the environment raises, or TypeError or ValueError for what it must not return.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from jaxprm.environments.protocol import Environment, StepResult


class Pool:
    """Environments made when needed and used again. Every one that was made is closed exactly once."""

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self._open: list[Environment] = []
        self._idle: list[Environment] = []

    def take(self) -> Environment:
        if not self._idle:
            self._open.append(self._make())
            self._idle.append(self._open[-1])
        return self._idle.pop()

    def give_back(self, environment: Environment) -> None:
        self._idle.append(environment)

    def discard(self, environment: Environment) -> None:
        """Closes an environment that has failed: what state it is in is not known, so no other episode may have it."""
        self._open = [other for other in self._open if other is not environment]
        # It has been reported as broken already; that it cannot be closed either adds nothing.
        with contextlib.suppress(Exception):
            environment.close()

    def close(self) -> None:
        """Closes what is open, all of it even where one raises."""
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
