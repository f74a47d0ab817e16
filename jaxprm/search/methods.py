"""The guided searches of a run, each written to its own file, one line per task, resumed by task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.environments import Environment
from jaxprm.evaluation.statistics import bootstrap
from jaxprm.policies.protocol import Policy, prefix_hash
from jaxprm.progress import bar
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner, check_can_fork
from jaxprm.search.mcts import tree_search
from jaxprm.search.tree import ActionScorer, Prices, SearchLimits, Tree, tokens_read, tree_to_dict


class SearchSpec(NamedTuple):
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

    def inputs(self, settings: config_lib.SearchConfig) -> dict[str, Any]:
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


def search_specs(settings: config_lib.SearchConfig) -> list[SearchSpec]:
    """All of a run's, beams first."""
    return [
        *(SearchSpec("beam", *size) for size in settings.beams),
        *(SearchSpec("stepwise", 1, actions) for actions in settings.stepwise),
        *(SearchSpec("diverse", *size) for size in settings.diverse),
        *(SearchSpec("lookahead", *size) for size in settings.lookahead),
        *(SearchSpec("mcts", *size) for size in settings.mcts),
    ]


class RandomScorer:
    """Uniform scores that depend on seed, conversation and action alone: a search that it guides is search without
    judgement."""

    def __init__(self, seed: int):
        self._seed = seed
        self.usage = {"encoded": 0}

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Scores in [0, 1), one array [N] a state."""
        return [
            np.asarray([self._uniform(name, text) for text in texts], np.float32)
            for name, texts in zip(map(prefix_hash, states), candidates, strict=True)
        ]

    def forget(self) -> None:
        """Nothing is kept."""

    def _uniform(self, name: str, text: str) -> float:
        digest = hashlib.sha256(f"{self._seed}\x1f{name}\x1f{text}".encode()).digest()
        # As many bits as float32 holds, so that no score is rounded up to 1.
        return int.from_bytes(digest[:3], "big") / 2**24


# Paths searched together: enough to fill a batch, and with 64 episodes in flight half of what the scorer's cache holds.
# Tasks searched together: few enough that a kill costs little.
PATHS_AT_ONCE, TASKS_AT_ONCE = 96, 48


def guided_search(
    make_environment: Callable[[], Environment],
    policy: Policy,
    scorer: ActionScorer,
    tasks: Sequence[str],
    output: Path,
    *,
    settings: config_lib.SearchConfig,
    plan: SearchSpec,
    label: str,
    about: dict,
    prices: Prices = Prices(),
) -> Path:
    """One search of every task.

    A line: {"task", "outcome", "score", "rounds", "ended"?, "proposed", "merged", "cut", "failed", "errors",
    "policy_tokens", "reward_tokens", "reward_encoded", "environment_steps", "tree"?}; the first `settings.trees` tasks
    carry their tree. Tasks are scored together: "reward_encoded", what the scorer read, is shared among those of a
    call in proportion to their "reward_tokens", the least it could have read. `prices` are those of the settings'
    budget; "ended" says which of their limits ended a search.
    """
    resumable = files.ResumableLines(output)
    if resumable.is_finished():
        return output
    with closing(BranchRunner(make_environment)) as forest:
        if plan.forks:
            check_can_fork(forest.environment, plan.at)
        with resumable:
            before = resumable.read()
            done = {line["task"] for line in before}
            missing = [task for task in tasks if task not in done]
            with_tree = (
                set(tasks[:: max(1, len(tasks) // settings.trees)][: settings.trees]) if settings.trees else set()
            )
            about_trees = {task: about | forest.describe(task) for task in missing if task in with_tree}
            successes = [line["outcome"] for line in before]
            tokens = sum(line["policy_tokens"] + line["reward_tokens"] for line in before)
            together = min(TASKS_AT_ONCE, max(1, PATHS_AT_ONCE // plan.paths))
            with bar(label, len(tasks), initial=len(done), unit="task") as progress:
                for start in range(0, len(missing), together):
                    chunk = missing[start : start + together]
                    encoded = scorer.usage["encoded"]
                    trees = _searched(plan, chunk, forest, policy, scorer, settings, prices)
                    lines = [_line(tree, policy, forest, about_trees.get(tree.task)) for tree in trees]
                    resumable.append(_share(lines, scorer.usage["encoded"] - encoded))
                    successes += [tree.best.branch.outcome or 0.0 for tree in trees]
                    tokens += sum(line["policy_tokens"] + line["reward_tokens"] for line in lines)
                    progress.set_postfix(success=_share_of(successes), tokens=f"{tokens:,}", refresh=False)
                    progress.update(len(chunk))
            ordered = {line["task"]: line for line in resumable.read()}
            resumable.finish(ordered[task] for task in tasks)
    return output


def _share_of(outcomes: Sequence[float]) -> str:
    found = bootstrap(outcomes, samples=500)
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def _searched(
    plan: SearchSpec, tasks: Sequence[str], forest: BranchRunner, policy, scorer, settings, prices
) -> list[Tree]:
    limits = SearchLimits(settings.stop_at, settings.budget, prices)
    common = {"temperature": settings.temperature, "max_rounds": forest.environment.max_rounds, "limits": limits}
    if plan.kind == "mcts":
        common |= {"simulations": plan.width, "exploration": settings.exploration}
        return tree_search(tasks, forest, policy, scorer, actions=plan.actions, **common)
    common |= {"progress_weight": settings.progress_weight, "diverse": plan.kind == "diverse", "ahead": plan.ahead}
    return beam_search(tasks, forest, policy, scorer, width=plan.width, actions=plan.actions, **common)


def _line(tree: Tree, policy: Policy, forest: BranchRunner, about: dict | None) -> dict:
    best = tree.best
    line = {
        "task": tree.task,
        # A path cut off by the round limit of a search has no outcome of its own: it did not succeed.
        "outcome": best.branch.outcome if best.branch.outcome is not None else 0.0,
        "score": best.promise,
        "rounds": tree.rounds,
        "proposed": tree.proposed,
        "merged": tree.merged,
        "cut": tree.cut,
        "failed": tree.failed,
        "errors": sum(node.branch.error is not None for node in (tree.root, *tree.nodes) if node.executed or node.kept),
        "policy_tokens": tree.generated,
        "reward_tokens": tokens_read(tree, policy.count_tokens),
        "environment_steps": sum(forest.cost(node.branch) for node in tree.nodes if node.executed),
    }
    if tree.ended is not None:
        line["ended"] = tree.ended
    if about is not None:
        line["tree"] = tree_to_dict(tree, **about)
    return line


def _share(lines: list[dict], encoded: int) -> list[dict]:
    least = sum(line["reward_tokens"] for line in lines)
    return [line | {"reward_encoded": encoded * line["reward_tokens"] / max(1, least)} for line in lines]
