"""The Environment protocol: what an environment must do, creation by name, checked calls, and a pool of environments.

Environments are user code: they may raise anything and return anything. The checked calls (`reset`, `step`, `outcome`,
`answer`) turn wrong return values into exceptions; those who call them turn exceptions into failed episodes.
"""

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

# Names that a config may use instead of "module:attribute".
# Paths and not classes: an environment is imported when it is created.
REGISTERED = {"textcraft": "jaxprm.environments.textcraft:TextCraft"}
# Registered environments with an `instructions` argument: runs with a served policy set it.
INSTRUCTED = frozenset({"textcraft"})
_METHODS = ("tasks", "reset", "step", "outcome", "close")
_CLONE_METHODS = ("snapshot", "restore")

T = TypeVar("T")
R = TypeVar("R")


class StepResult(NamedTuple):
    """Result of an action.

    observation: the next user message. reward: recorded, and not used in training. done: whether the episode is over.
    """

    observation: str
    reward: float
    done: bool


class Environment(Protocol):
    """A text environment. It runs one episode at a time: reset(task), then step(action) until done.

    Observations must be a function of the task and the actions; random choices are to be drawn from the task's id. Any
    exception ends the current episode or search branch with outcome 0 and is counted; other episodes continue.

    Attributes:
        fork: how a search returns to an earlier state of an episode: "clone" by snapshot and restore, "replay" by reset
            and the same actions, "none" not at all, which leaves only step-wise search.
        max_rounds: actions after which an episode is cut, at least 1.

    Three methods are optional. `describe(task) -> dict`: copied into the `meta` of trajectories. `answer() -> str |
    None`: the answer of a finished episode, which votes compare. `demonstration(rng) -> list[dict]`: messages of an
    expert's episode of a training task, to imitate.
    """

    fork: Fork
    max_rounds: int

    def tasks(self, split: Split) -> Sequence[str]:
        """Ids of the tasks of "train", "validation" or "test", the same in every process. Splits share no task."""

    def reset(self, task: str) -> str:
        """Starts an episode of a task, at any time, and returns the prompt: the first user message."""

    def step(self, action: str) -> StepResult:
        """Takes an action, the complete text of an assistant message. A plain (observation, reward, done) will do.

        An action that makes no sense should be answered in the observation, so that the agent can correct it.
        """

    def outcome(self) -> float:
        """How well the episode went, in [0, 1]. Called when it is done or was cut at max_rounds."""

    def snapshot(self) -> Any:
        """The complete state of the current episode, its task included. No later call may change it.

        Only for fork "clone".
        """

    def restore(self, state: Any) -> None:
        """Returns to a snapshot, which may be restored many times and may belong to another task.

        Only for fork "clone".
        """

    def close(self) -> None:
        """Releases what the environment holds. Called once, at the end or after a failure."""


def create(name: str, arguments: Mapping[str, Any] | None = None) -> Environment:
    """Makes the environment that a config names.

    Args:
        name: a registered name ("textcraft"), or "module:attribute" of a callable that returns an environment.
        arguments: keyword arguments of the call.

    Raises UserError if the name, its module or its attribute does not exist, if the call does not accept the arguments,
    or if the result lacks a part of the protocol.
    """
    choices = f"one of {', '.join(sorted(REGISTERED))}"
    path = REGISTERED.get(name, name)
    environment: Environment = plugins.make("environment", name, path, arguments or {}, choices=choices)
    _check_protocol(name, environment)
    return environment


def _check_protocol(name: str, environment: Any) -> None:
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
    # True is an int for isinstance.
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"environment {name!r}: {kind}.max_rounds is {rounds!r}; set it to an integer of at least 1")


def reset(environment: Environment, task: str) -> str:
    """The prompt of a task. Raises TypeError if it is not text."""
    return _text(environment.reset(task), "reset")


def step(environment: Environment, action: str) -> StepResult:
    """The result of an action. Raises TypeError or ValueError if it is not (text, number, bool)."""
    observation, reward, done = environment.step(action)
    return StepResult(_text(observation, "step"), float(reward), bool(done))


def outcome(environment: Environment) -> float:
    """The outcome of the episode. Raises ValueError if it is not in [0, 1]."""
    value = float(environment.outcome())
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"outcome() returned {value}; it must be in [0, 1]")
    return value


def answer(environment: Any) -> str | None:
    """The answer of an environment that has this method, or None. Raises TypeError if it is neither text nor None."""
    value = environment.answer()
    return None if value is None else _text(value, "answer", "answer")


def _text(value: Any, method: str, what: str = "observation") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{method}() returned a {type(value).__name__} for the {what}; it must be text")
    return value


class Pool:
    """Environments made on demand and used again. Each is closed exactly once.

    Attributes:
        at_once: how many environments may work at the same time: `make.at_once`, or 1 if `make` does not say.
    """

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self.at_once: int = getattr(make, "at_once", 1)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._open: list[Environment] = []
        self._idle: list[Environment] = []

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results of `function` for all items, in order, `at_once` of them at the same time.

        Two calls of `function` must not use the same environment.
        """
        # In this thread: an environment of this process need not be thread-safe.
        if self.at_once == 1 or len(items) < 2:
            return [function(item) for item in items]
        # Threads are enough, because each call waits for a worker process.
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.at_once, thread_name_prefix="environments")
        return list(self._threads.map(function, items))

    def acquire(self) -> Environment:
        """An idle environment, or a new one."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        # Outside the lock: making an environment may take seconds, and others can be made meanwhile.
        environment = self._make()
        with self._lock:
            self._open.append(environment)
        return environment

    def release(self, environment: Environment) -> None:
        """Returns an environment for the next episode."""
        with self._lock:
            self._idle.append(environment)

    def discard(self, environment: Environment) -> None:
        """Closes an environment that has failed: its state is unknown, so no other episode may use it."""
        with self._lock:
            # By identity: a user's class may define equality.
            self._open = [other for other in self._open if other is not environment]
        # Its failure is reported already. One more exception, from closing it, would hide the first.
        with contextlib.suppress(Exception):
            environment.close()

    def close(self) -> None:
        """Closes all open environments, even if one raises; then raises its exception."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        with contextlib.ExitStack() as stack:
            while self._open:
                stack.callback(self._open.pop().close)
        self._idle.clear()
