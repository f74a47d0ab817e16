"""Branches of a search tree, executed in environments that can fork.

How a branch is continued depends on the environment's `fork`:
- "clone": restore the branch's snapshot.
- "replay": reset and repeat the branch's actions; a different observation ends the branch with an error.
- "none": not at all; every task is a single path in an environment of its own.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxprm.environments import Environment, protocol
from jaxprm.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Branch:
    """The state of one task after `actions`.

    Attributes:
        observations: one for each action.
        snapshot: the environment's, for fork "clone" and an open branch.
        outcome: in [0, 1] once the branch is done, else None.
        error: why the branch cannot continue, or None.
    """

    task: str
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    snapshot: Any = None
    done: bool = False
    outcome: float | None = None
    error: str | None = None
    prompt: str = ""


class BranchRunner:
    """Executes branches of many tasks on as few environments as their way of forking needs.

    With fork "none" every open task has an environment. Otherwise tasks are dealt out to slots, as many as environments
    may work at the same time, and the tasks of a slot share one environment.

    Attributes:
        steps: environment steps taken, those of replays included.
        errors: branches that ended because their environment raised.
    """

    def __init__(self, make_environment: Callable[[], Environment]):
        self._pool = protocol.Pool(make_environment)
        # One environment at once: its `fork` decides how all others are used.
        self._by_slot: dict[int, Environment] = {0: self._pool.acquire()}
        self._by_task: dict[str, Environment] = {}
        self._slots: dict[str, int] = {}
        self.fork = self.environment.fork
        self._lock = threading.Lock()
        self.steps = 0
        self.errors = 0

    @property
    def environment(self) -> Environment:
        """An environment to ask for `max_rounds`, `describe` and the like."""
        return self._by_slot[0]

    def map(self, function: Callable[[T], R], items: Sequence[T], task_of: Callable[[T], str]) -> list[R]:
        """Results of `function` for all items, in order. Items whose tasks share an environment run one after another,
        the others at the same time.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            task = task_of(item)
            groups[task if self.fork == "none" else self._slot(task)].append(index)
        # Filled by several threads without a lock: every index is written once, by the thread of its group.
        results: dict[int, R] = {}

        def run(indices: list[int]) -> None:
            for index in indices:
                results[index] = function(items[index])

        self._pool.map(run, list(groups.values()))
        return [results[index] for index in range(len(items))]

    def start(self, task: str) -> tuple[str, Branch]:
        """The prompt of a task and its first branch. If the environment raises, the prompt is empty and the branch is
        done, with the error.
        """
        environment = self._environment(task)
        try:
            prompt = protocol.reset(environment, task)
            snapshot = environment.snapshot() if self.fork == "clone" else None
            return prompt, Branch(task, snapshot=snapshot, prompt=prompt)
        except Exception as error:
            # As in `step`: a user's environment may raise anything, and the other tasks must not be lost with it.
            return "", self._failed(Branch(task), (), error)

    def step(self, branch: Branch, action: str) -> Branch:
        """The branch after an action. An exception of the environment becomes the error of the new branch.

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
                # A finished branch is never continued, so its snapshot would only take memory.
                environment.snapshot() if self.fork == "clone" and not done else None,
                done,
                protocol.outcome(environment) if done else None,
                prompt=branch.prompt,
            )
        except Exception as error:
            # A user's environment may raise anything: this branch is over, and the search continues with the others.
            return self._failed(branch, actions, error)
        if done and self.fork == "none":
            self._pool.release(self._by_task.pop(branch.task))
        return after

    def abandon(self, branch: Branch, reason: str) -> Branch:
        """Ends a branch for which the policy proposed no action, with `reason` as its error.

        The environment did not fail, so it returns to the pool.
        """
        if self.fork == "none":
            self._pool.release(self._by_task.pop(branch.task))
        return replace(branch, snapshot=None, done=True, outcome=0.0, error=reason)

    def cost(self, branch: Branch) -> int:
        """Environment steps that were taken to reach a branch from its parent."""
        return len(branch.actions) if self.fork == "replay" else min(1, len(branch.actions))

    def describe(self, task: str) -> dict:
        """The environment's description of a task; empty if it has none."""
        return self.environment.describe(task) if hasattr(self.environment, "describe") else {}

    def close(self) -> None:
        self._pool.close()

    def _slot(self, task: str) -> int:
        # In turn, in the order in which tasks are first seen. A task keeps its slot, where its snapshots are.
        return self._slots.setdefault(task, len(self._slots) % self._pool.at_once)

    def _count(self, steps: int = 0, errors: int = 0) -> None:
        with self._lock:
            self.steps += steps
            self.errors += errors

    def _environment(self, task: str) -> Environment:
        # No lock: `map` gives the tasks of an environment to one thread at a time.
        if self.fork != "none":
            if (slot := self._slot(task)) not in self._by_slot:
                self._by_slot[slot] = self._pool.acquire()
            return self._by_slot[slot]
        if task not in self._by_task:
            self._by_task[task] = self._pool.acquire()
        return self._by_task[task]

    def _failed(self, branch: Branch, actions: tuple[str, ...], error: Exception) -> Branch:
        self._count(errors=1)
        if self.fork == "none":
            self._pool.discard(self._by_task.pop(branch.task))
        elif self.fork == "replay":
            # Only replayed environments are replaced: snapshots of other branches may belong to a cloned one.
            slot = self._slot(branch.task)
            self._pool.discard(self._by_slot[slot])
            self._by_slot[slot] = self._pool.acquire()
        reason = f"{type(error).__name__}: {error}"
        return Branch(branch.task, actions, branch.observations, None, True, 0.0, reason, branch.prompt)

    def _return_to(self, environment: Environment, branch: Branch) -> None:
        if self.fork == "clone":
            environment.restore(branch.snapshot)
        elif self.fork == "replay":
            _check_replayed(protocol.reset(environment, branch.task), branch.prompt)
            for action, expected in zip(branch.actions, branch.observations, strict=True):
                observed = protocol.step(environment, action).observation
                self._count(steps=1)
                _check_replayed(observed, expected)


def check_can_fork(environment: Environment, what: str) -> None:
    """Raises UserError if the environment cannot fork; `what` names the search that needs several branches."""
    if environment.fork == "none":
        raise UserError(
            f'{what}: needs several branches of a task, and the environment has fork = "none"; '
            "use step-wise best-of-K (search.stepwise)"
        )


def _check_replayed(observed: str, expected: str) -> None:
    if observed != expected:
        raise RuntimeError(f"replay diverged: {observed[:80]!r} where {expected[:80]!r} was seen before")
