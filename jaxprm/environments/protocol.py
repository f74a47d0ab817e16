"""What an environment is, how a config names one, and checked calls to environments that may return anything."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from jaxprm import plugins
from jaxprm.errors import UserError

Split = Literal["train", "validation", "test"]
Fork = Literal["clone", "replay", "none"]

REGISTERED = {"textcraft": "jaxprm.environments.textcraft:TextCraft"}
_METHODS = ("tasks", "reset", "step", "outcome", "close")
_CLONE_METHODS = ("snapshot", "restore")


class StepResult(NamedTuple):
    observation: str
    reward: float
    done: bool


class Environment(Protocol):
    """One episode at a time: reset(task), then step(action) until done; outcome() in [0, 1] grades it.

    fork: how search returns to an earlier state: "clone" by snapshot and restore, "replay" by reset and the same
    actions, "none" not at all. Only "clone" needs snapshot and restore. What an optional `describe(task) -> dict`
    returns goes into the trajectories' meta, and so does the `answer() -> str | None` of a finished episode, where
    there is one: what votes compare.
    """

    fork: Fork
    max_rounds: int

    def tasks(self, split: str) -> Sequence[str]:
        """The ids of a split ("train", "validation" or "test"); splits share no task."""

    def reset(self, task: str) -> str:
        """Starts a task; the prompt, one user message."""

    def step(self, action: str) -> StepResult:
        """Takes one whole assistant message."""

    def outcome(self) -> float:
        """How well the episode went so far, in [0, 1]."""

    def snapshot(self) -> Any:
        """The state, unchanged by later steps."""

    def restore(self, state: Any) -> None:
        """Goes back to a snapshot."""

    def close(self) -> None:
        """Lets go of what the environment holds."""


def create(name: str, arguments: Mapping[str, Any] | None = None) -> Environment:
    """Makes the environment that a config names.

    Args:
      name: a registered name ("textcraft") or "module:attribute", any callable that returns an environment.
      arguments: its keyword arguments.

    Raises:
      UserError: the name, its module or attribute does not exist, it refuses the arguments, or what it returns lacks a
        part of the protocol.
    """
    known = f"one of {', '.join(sorted(REGISTERED))}"
    environment = plugins.make("environment", name, REGISTERED.get(name, name), arguments or {}, known=known)
    _check(name, environment)
    return environment


def _check(name: str, environment: Any) -> None:
    kind = type(environment).__name__
    fork = getattr(environment, "fork", None)
    if fork not in get_args(Fork):
        raise UserError(f"environment {name!r}: {kind}.fork is {fork!r}; set it to one of {', '.join(get_args(Fork))}")
    needed = _METHODS + (_CLONE_METHODS if fork == "clone" else ())
    if missing := plugins.missing_methods(environment, needed):
        raise UserError(
            f"environment {name!r}: {kind} has no method {', '.join(missing)} (fork is {fork!r}); define it"
        )
    rounds = getattr(environment, "max_rounds", None)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"environment {name!r}: {kind}.max_rounds is {rounds!r}; set it to an integer of at least 1")


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

    def acquire(self) -> Environment:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        environment = self._make()
        with self._lock:
            self._open.append(environment)
        return environment

    def release(self, environment: Environment) -> None:
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
