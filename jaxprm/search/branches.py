"""Environments that fork: the branches of one search tree, executed once each.

`clone` restores a snapshot; `replay` resets and repeats the actions, and a different observation ends that branch with
an error; `none` allows a single path a task.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxprm.environments import Environment, protocol
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
    prompt: str = ""


T, R = TypeVar("T"), TypeVar("R")


class BranchRunner:
    """Runs branches of many tasks on as few environments as their way of forking needs: one for each task, or as many
    as may work at the same time, each with its share of the tasks.
    """

    def __init__(self, make_environment: Callable[[], Environment]):
        self._pool = protocol.Pool(make_environment)
        self._shared: dict[int, Environment] = {0: self._pool.acquire()}
        self._places: dict[str, int] = {}
        self._own: dict[str, Environment] = {}
        self.fork = self.environment.fork
        self._lock = threading.Lock()
        self.steps = 0
        self.errors = 0

    @property
    def environment(self) -> Environment:
        """Any of them, for what all of them say."""
        return self._shared[0]

    def map(self, act: Callable[[T], R], items: Sequence[T], task_of: Callable[[T], str]) -> list[R]:
        """What `act` returns for every item, in order; items of tasks in different environments at the same time."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            task = task_of(item)
            groups[task if self.fork == "none" else self._place(task)].append(index)
        found: dict[int, R] = {}

        def run(indices: list[int]) -> None:
            for index in indices:
                found[index] = act(items[index])

        self._pool.map(run, list(groups.values()))
        return [found[index] for index in range(len(items))]

    def start(self, task: str) -> tuple[str, Branch]:
        """The prompt of a task and its first branch, which is over at once, with its error, if there is no prompt."""
        environment = self._environment(task)
        try:
            prompt = protocol.reset(environment, task)
            snapshot = environment.snapshot() if self.fork == "clone" else None
            return prompt, Branch(task, snapshot=snapshot, prompt=prompt)
        except Exception as error:
            # As in `step`: what a user's environment raises costs what was asked of it, and nothing else.
            return "", self._failed(Branch(task), (), error)

    def step(self, branch: Branch, action: str) -> Branch:
        """The branch after an action. What the environment raises becomes the new branch's error, and is counted.

        A branch is done when its environment says so, or after the environment's max_rounds.
        """
        environment = self._environment(branch.task)
        actions = (*branch.actions, action)
        try:
            self._return_to(environment, branch)
            result = protocol.step(environment, action)
            self._count(steps=1)
            done = result.done or len(actions) >= environment.max_rounds
            after = Branch(
                branch.task,
                actions,
                (*branch.observations, result.observation),
                environment.snapshot() if self.fork == "clone" and not done else None,
                done,
                protocol.outcome(environment) if done else None,
                prompt=branch.prompt,
            )
        except Exception as error:
            # A user's environment may raise anything: that branch is over, with the reason, and the search goes on.
            return self._failed(branch, actions, error)
        if done and self.fork == "none":
            self._pool.release(self._own.pop(branch.task))
        return after

    def abandon(self, branch: Branch, reason: str) -> Branch:
        """The branch, ended because nobody knows how to go on from it; its environment has done nothing wrong."""
        if self.fork == "none":
            self._pool.release(self._own.pop(branch.task))
        return replace(branch, snapshot=None, done=True, outcome=0.0, error=reason)

    def cost(self, branch: Branch) -> int:
        """Environment steps that reaching a branch from the one before it took."""
        return len(branch.actions) if self.fork == "replay" else min(1, len(branch.actions))

    def describe(self, task: str) -> dict:
        """What the environment says of a task, where it does."""
        return self.environment.describe(task) if hasattr(self.environment, "describe") else {}

    def close(self) -> None:
        self._pool.close()

    def _place(self, task: str) -> int:
        return self._places.setdefault(task, len(self._places) % self._pool.at_once)

    def _count(self, steps: int = 0, errors: int = 0) -> None:
        with self._lock:
            self.steps += steps
            self.errors += errors

    def _environment(self, task: str) -> Environment:
        if self.fork != "none":
            if (place := self._place(task)) not in self._shared:
                self._shared[place] = self._pool.acquire()
            return self._shared[place]
        if task not in self._own:
            self._own[task] = self._pool.acquire()
        return self._own[task]

    def _failed(self, branch: Branch, actions: tuple[str, ...], error: Exception) -> Branch:
        self._count(errors=1)
        if self.fork == "none":
            self._pool.discard(self._own.pop(branch.task))
        elif self.fork == "replay":
            # Clones stay where they are: their snapshots may belong to them.
            place = self._place(branch.task)
            self._pool.discard(self._shared[place])
            self._shared[place] = self._pool.acquire()
        reason = f"{type(error).__name__}: {error}"
        return Branch(branch.task, actions, branch.observations, None, True, 0.0, reason, branch.prompt)

    def _return_to(self, environment: Environment, branch: Branch) -> None:
        if self.fork == "clone":
            environment.restore(branch.snapshot)
        elif self.fork == "replay":
            _compare(protocol.reset(environment, branch.task), branch.prompt)
            for action, expected in zip(branch.actions, branch.observations, strict=True):
                observed = protocol.step(environment, action).observation
                self._count(steps=1)
                _compare(observed, expected)


def _compare(observed: str, expected: str) -> None:
    if observed != expected:
        raise RuntimeError(f"replay diverged: {observed[:80]!r} where {expected[:80]!r} was seen before")


def check_can_fork(environment: Environment, what: str) -> None:
    """Raises UserError where a search needs several branches of an environment that has one."""
    if environment.fork == "none":
        raise UserError(f'{what}: the environment says fork = "none"; use step-wise best-of-K (search.stepwise)')
