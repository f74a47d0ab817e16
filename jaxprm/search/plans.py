"""The guided searches of a run, by kind and size."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxprm import config as config_lib


class Plan(NamedTuple):
    """kind: "beam", "diverse", "stepwise" or "mcts"; width: paths kept, or simulations before a step of mcts; actions:
    drawn in a state."""

    kind: str
    width: int
    actions: int

    @property
    def size(self) -> str:
        """As in results.json: K of step-wise best-of-K, NxM of all others."""
        return str(self.actions) if self.kind == "stepwise" else f"{self.width}x{self.actions}"

    @property
    def at(self) -> str:
        return f"{self.kind} {self.size}"

    @property
    def cost_key(self) -> str:
        """Its name among the costs of a label: a beam's or a step-wise search's size alone."""
        return f"{self.width}x{self.actions}" if self.kind in ("beam", "stepwise") else self.at

    @property
    def forks(self) -> bool:
        """Whether it needs several branches of a task."""
        return self.width > 1

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
        if self.kind in ("diverse", "mcts"):
            found["kind"] = self.kind
        if self.kind == "mcts":
            found["exploration"] = settings.exploration
        return found


def plans(settings: config_lib.Search) -> list[Plan]:
    """All of a run's, beams first."""
    return [
        *(Plan("beam", *size) for size in settings.beams),
        *(Plan("stepwise", 1, actions) for actions in settings.stepwise),
        *(Plan("diverse", *size) for size in settings.diverse),
        *(Plan("mcts", *size) for size in settings.mcts),
    ]
