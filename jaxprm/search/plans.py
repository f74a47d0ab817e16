"""The guided searches of a run, by kind and size."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxprm import config as config_lib


class Plan(NamedTuple):
    """kind: "beam", "diverse", "lookahead", "stepwise" or "mcts"; width: paths kept, or simulations before a step of
    mcts; actions: drawn in a state; ahead: steps that a candidate is followed."""

    kind: str
    width: int
    actions: int
    ahead: int = 0

    @property
    def size(self) -> str:
        """As in results.json: K of step-wise best-of-K, NxMxA with lookahead, NxM of all others."""
        if self.kind == "stepwise":
            return str(self.actions)
        return f"{self.width}x{self.actions}" + (f"x{self.ahead}" if self.ahead else "")

    @property
    def at(self) -> str:
        return f"{self.kind} {self.size}"

    @property
    def cost_key(self) -> str:
        """Its name among the costs of a label: a beam's or a step-wise search's size alone."""
        return f"{self.width}x{self.actions}" if self.kind in ("beam", "stepwise") else self.at

    @property
    def paths(self) -> int:
        """Of a task, that the scorer's cache should hold. mcts scores one at a time, and comes back to a few."""
        return 4 if self.kind == "mcts" else self.width

    @property
    def forks(self) -> bool:
        """Whether it needs several branches of a task."""
        return self.width > 1 or self.ahead > 0

    def file_name(self, label: str, seed: int) -> str:
        """The file of the search in WORKDIR/search, without its ending. A beam that keeps one path is step-wise."""
        alone = self.width == 1 and self.kind == "beam"
        return f"{f'stepwise-{self.actions}' if alone else f'{self.kind}-{self.size}'}-{label}-{seed}"

    def inputs(self, settings: config_lib.Search) -> dict[str, Any]:
        """What its result depends on, beside tasks, policy and scorer."""
        found = {
            "width": self.width,
            "actions": self.actions,
            "progress_weight": settings.progress_weight,
            "trees": settings.trees,
        }
        if self.kind in ("diverse", "lookahead", "mcts"):
            found["kind"] = self.kind
        if self.ahead:
            found["ahead"] = self.ahead
        if settings.stop_at is not None:
            found["stop_at"] = settings.stop_at
        if settings.budget is not None:
            found |= {"budget": settings.budget, "budget_unit": settings.budget_unit}
        if self.kind == "mcts":
            found["exploration"] = settings.exploration
        return found


def plans(settings: config_lib.Search) -> list[Plan]:
    """All of a run's, beams first."""
    return [
        *(Plan("beam", *size) for size in settings.beams),
        *(Plan("stepwise", 1, actions) for actions in settings.stepwise),
        *(Plan("diverse", *size) for size in settings.diverse),
        *(Plan("lookahead", *size) for size in settings.lookahead),
        *(Plan("mcts", *size) for size in settings.mcts),
    ]
