"""What an environment is, and how a config names one.

An environment knows neither models nor arrays. A user's own class is named "module:attribute" and needs no change here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

from jaxprm import named
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
    environment = named.make("environment", name, REGISTERED.get(name, name), arguments or {}, known=known)
    _check(name, environment)
    return environment


def _check(name: str, environment: Any) -> None:
    kind = type(environment).__name__
    fork = getattr(environment, "fork", None)
    if fork not in get_args(Fork):
        raise UserError(f"environment {name!r}: {kind}.fork is {fork!r}; set it to one of {', '.join(get_args(Fork))}")
    needed = _METHODS + (_CLONE_METHODS if fork == "clone" else ())
    if missing := named.missing_methods(environment, needed):
        raise UserError(
            f"environment {name!r}: {kind} has no method {', '.join(missing)} (fork is {fork!r}); define it"
        )
    rounds = getattr(environment, "max_rounds", None)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"environment {name!r}: {kind}.max_rounds is {rounds!r}; set it to an integer of at least 1")
