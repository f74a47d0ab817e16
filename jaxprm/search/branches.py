"""Environments that fork: the branches of one search tree, executed once each.

`clone` restores a snapshot; `replay` resets and repeats the actions, and a different observation ends that branch with
an error; `none` allows a single path a task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxprm.environments import Environment
from jaxprm.errors import UserError


@dataclass(frozen=True)
class Branch:
    """A state of one task reached by `actions`. `error` says why it cannot go on."""

    task: str
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    snapshot: Any = None
    done: bool = False
    outcome: float | None = None
    error: str | None = None


class Forest:
    """Runs branches of many tasks on as few environments as their way of forking needs."""

    def __init__(self, make_environment: Callable[[], Environment]):
        self._make = make_environment
        self.environment = make_environment()
        self._own: dict[str, Environment] = {}
        self.fork = self.environment.fork
        self.steps = 0
        self.errors = 0

    def start(self, task: str) -> tuple[str, Branch]:
        """The prompt of a task and its first branch."""
        environment = self._environment(task)
        prompt = environment.reset(task)
        return prompt, Branch(task, snapshot=environment.snapshot() if self.fork == "clone" else None)

    def step(self, branch: Branch, action: str) -> Branch:
        """The branch after an action. What the environment raises becomes the new branch's error, and is counted."""
        environment = self._environment(branch.task)
        actions = (*branch.actions, action)
        try:
            self._return_to(environment, branch)
            result = environment.step(action)
            self.steps += 1
            return Branch(
                branch.task,
                actions,
                (*branch.observations, result.observation),
                environment.snapshot() if self.fork == "clone" and not result.done else None,
                result.done,
                float(environment.outcome()) if result.done else None,
            )
        except Exception as error:
            # A user's environment may raise anything: that branch is over, with the reason, and the search goes on.
            self.errors += 1
            reason = f"{type(error).__name__}: {error}"
            return Branch(branch.task, actions, branch.observations, None, True, 0.0, reason)

    def describe(self, task: str) -> dict:
        """What the environment says of a task, where it does."""
        return self.environment.describe(task) if hasattr(self.environment, "describe") else {}

    def close(self) -> None:
        for environment in [self.environment, *self._own.values()]:
            environment.close()

    def _environment(self, task: str) -> Environment:
        if self.fork != "none":
            return self.environment
        if task not in self._own:
            self._own[task] = self._make()
        return self._own[task]

    def _return_to(self, environment: Environment, branch: Branch) -> None:
        if self.fork == "clone":
            environment.restore(branch.snapshot)
        elif self.fork == "replay":
            environment.reset(branch.task)
            for action, expected in zip(branch.actions, branch.observations, strict=True):
                observed = environment.step(action).observation
                self.steps += 1
                if observed != expected:
                    raise RuntimeError(f"replay diverged: {observed[:80]!r} where {expected[:80]!r} was seen before")


def check_can_fork(environment: Environment, what: str) -> None:
    """Raises UserError where a search needs several branches of an environment that has one."""
    if environment.fork == "none":
        raise UserError(f'{what}: the environment says fork = "none"; use step-wise best-of-K (search.stepwise)')
