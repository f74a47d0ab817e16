"""Beam search over actions (AgentPRM, Algorithm 2), many tasks at once.

@NxM keeps N nodes and draws M actions from each; the first expansion draws N * M from the start. Every candidate is
scored before it is executed; the best N of the new candidates and the finished paths are kept, and only those are
executed. Step-wise best-of-K is @1xK: it never needs two branches of a task. Diverse, N searches run side by side that
keep one path each (DVTS, Beeching et al. 2024): what looks best early cannot crowd out the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxprm.errors import UserError
from jaxprm.policies.protocol import Action, Policy, State
from jaxprm.search.branches import Branch, Forest


class ActionScorer(Protocol):
    """Promise of candidate actions, one array of scores a state. `usage["encoded"]` counts the tokens it read."""

    usage: dict[str, int]

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]: ...


@dataclass
class Node:
    """A path: its last action, what that action was worth, and where it led.

    draw: the number of its first draw; subtree: of a diverse search, the one of the N that it belongs to.
    """

    id: int
    parent: Node | None
    branch: Branch
    messages: list[dict]
    promise: float | None = None
    score: float = -np.inf
    count: int = 1
    kept: bool = True
    draw: int = 0
    subtree: int = 0

    @property
    def progress(self) -> float | None:
        """Gain in promise over the step before (METHOD.md, section 2); not defined at the first step."""
        if self.promise is None or self.parent is None or self.parent.promise is None:
            return None
        return self.promise - self.parent.promise


@dataclass
class Tree:
    """The search of one task."""

    task: str
    root: Node
    frontier: list[Node]
    nodes: list[Node] = field(default_factory=list)
    proposed: int = 0
    merged: int = 0
    cut: int = 0
    failed: int = 0
    generated: int = 0
    rounds: int = 0

    @property
    def finished(self) -> bool:
        return all(node.branch.done for node in self.frontier)

    @property
    def best(self) -> Node:
        """The best-scoring path; among equals the one found first."""
        return max(self.frontier, key=lambda node: node.score)


def keep_best(finished: Sequence[Node], candidates: Sequence[Node], width: int) -> list[Node]:
    """The `width` best of all; among equals finished paths come first, then candidates in the order they were drawn."""
    return sorted([*finished, *candidates], key=lambda node: -node.score)[:width]


def keep_diverse(finished: Sequence[Node], candidates: Sequence[Node], width: int) -> list[Node]:
    """The best of each subtree, ties as in `keep_best`; where some have none, the best of the rest fill up to `width`.

    All of a start's draws may be equal; then there are fewer paths than `width`.
    """
    ranked = keep_best(finished, candidates, len(finished) + len(candidates))
    first = {node.subtree: node for node in reversed(ranked)}
    kept = [node for node in ranked if first[node.subtree] is node]
    rest = [node for node in ranked if first[node.subtree] is not node]
    return keep_best([], [*kept, *rest[: max(0, width - len(kept))]], width)


def merge_duplicates(actions: Sequence[Action]) -> list[tuple[Action, int]]:
    """Equal texts once, in order of first appearance, with how often each was drawn."""
    counts: dict[str, list] = {}
    for action in actions:
        counts.setdefault(action.text, [action, 0])[1] += 1
    return [(action, count) for action, count in counts.values()]


def beam_search(
    tasks: Sequence[str],
    forest: Forest,
    policy: Policy,
    scorer: ActionScorer,
    *,
    width: int,
    actions: int,
    temperature: float,
    max_rounds: int,
    progress_weight: float = 0.0,
    diverse: bool = False,
    on_round: Callable[[Sequence[Tree]], None] | None = None,
) -> list[Tree]:
    """Searches the tasks in lockstep, so that one call to the policy and one to the scorer serve all of them.

    score = promise + progress_weight * progress, progress taken as 0 at the first step. A branch whose environment
    raised ranks behind all others: it is chosen where nothing else is left. So does a path for which the policy had no
    candidate; where it had some, those that failed are left out and counted. Raises UserError for a score that is not a
    finite number.
    """
    trees = []
    for task in tasks:
        prompt, branch = forest.start(task)
        root = Node(0, None, branch, [{"role": "user", "content": prompt}])
        trees.append(Tree(task, root, [root]))
    for round_number in range(1, max_rounds + 1):
        open_trees = [tree for tree in trees if not tree.finished]
        if not open_trees:
            break
        draws = width * actions if round_number == 1 else actions
        parents = [(tree, node) for tree in open_trees for node in tree.frontier if not node.branch.done]
        _, candidates = expand(parents, draws, forest, policy, scorer, temperature, progress_weight)
        grown = list(zip(parents, candidates, strict=True))
        for tree in open_trees:
            new = [node for (owner, _), nodes in grown if owner is tree for node in nodes]
            done = [node for node in tree.frontier if node.branch.done]
            if diverse:
                for node in new:
                    node.subtree = node.draw // actions if round_number == 1 else node.parent.subtree
                # From the start, N groups of draws; from then on every path is a search of its own.
                tree.frontier = keep_diverse(done, new, width if round_number == 1 else len(tree.frontier))
                if round_number == 1:
                    for number, node in enumerate(tree.frontier):
                        node.subtree = number
            else:
                tree.frontier = keep_best(done, new, width)
            tree.rounds = round_number
            kept = {id(node) for node in tree.frontier}
            for node in new:
                if id(node) in kept:
                    execute(node, forest)
        if on_round is not None:
            on_round(trees)
    return trees


def expand(
    parents: Sequence[tuple[Tree, Node]],
    draws: int,
    forest: Forest,
    policy: Policy,
    scorer: ActionScorer,
    temperature: float,
    progress_weight: float = 0.0,
) -> tuple[list[list[Action]], list[list[Node]]]:
    """What was drawn after every parent, and its distinct candidates, scored and not executed.

    A parent without any is over, with the reason.
    """
    proposals = policy.propose([State(node.branch.task, node.messages) for _, node in parents], draws, temperature)
    candidates = _candidates(parents, proposals)
    for (_, parent), nodes, drawn in zip(parents, candidates, proposals, strict=True):
        if not nodes:
            parent.branch = forest.abandon(parent.branch, f"policy: {drawn[0].error}")
            parent.score = -np.inf
    _score(parents, candidates, scorer, progress_weight)
    return proposals, candidates


def _candidates(parents: Iterable[tuple[Tree, Node]], proposals: Sequence[list[Action]]) -> list[list[Node]]:
    """Distinct candidates of every parent, not yet scored or executed; without those that the policy failed to give."""
    found = []
    for (tree, parent), drawn in zip(parents, proposals, strict=True):
        nodes = []
        tree.proposed += len(drawn)
        tree.generated += sum(action.tokens for action in drawn)
        had = [action for action in drawn if action.stop != "error"]
        tree.failed += len(drawn) - len(had)
        texts = [action.text for action in drawn]
        for action, count in merge_duplicates(had):
            tree.merged += count - 1
            tree.cut += count * (action.stop == "length")
            messages = [*parent.messages, {"role": "assistant", "content": action.text}]
            draw = texts.index(action.text)
            node = Node(len(tree.nodes) + 1, parent, parent.branch, messages, count=count, kept=False, draw=draw)
            tree.nodes.append(node)
            nodes.append(node)
        found.append(nodes)
    return found


def _score(parents, candidates: Sequence[list[Node]], scorer: ActionScorer, progress_weight: float) -> None:
    texts = [[node.messages[-1]["content"] for node in nodes] for nodes in candidates]
    scores = scorer.score_actions([node.messages for _, node in parents], texts)
    for (tree, _), nodes, values in zip(parents, candidates, scores, strict=True):
        if not np.isfinite(values).all():
            raise UserError(f"search of {tree.task}: the scorer gave {values}; a model that diverged ranks nothing")
        for node, value in zip(nodes, values, strict=True):
            node.promise = float(value)
            node.score = node.promise + progress_weight * (node.progress or 0.0)


def execute(node: Node, forest: Forest) -> None:
    """Takes a candidate's action in its parent's environment branch; the observation joins its messages."""
    node.kept = True
    node.branch = forest.step(node.branch, node.messages[-1]["content"])
    if node.branch.error is not None:
        node.score = -np.inf
    if not node.branch.done:
        node.messages = [*node.messages, {"role": "user", "content": node.branch.observations[-1]}]


def tree_to_dict(tree: Tree, **about) -> dict:
    """A tree for the report: every candidate with its promise and progress, kept or not, and how it ended."""
    return about | {
        "task": tree.task,
        "outcome": tree.best.branch.outcome,
        "prompt": tree.root.messages[0]["content"],
        "best": tree.best.id,
        "nodes": [_node_to_dict(node) for node in tree.nodes],
    }


def _node_to_dict(node: Node) -> dict:
    depth, parent = 0, node.parent
    while parent is not None:
        depth, parent = depth + 1, parent.parent
    # A dropped candidate's branch is its parent's, which is open and one observation shorter.
    observations = node.branch.observations
    return {
        "id": node.id,
        "parent": node.parent.id if node.parent else 0,
        "round": depth,
        # The action's place in the conversation, whatever was observed after it.
        "action": node.messages[2 * depth - 1]["content"],
        "observation": observations[depth - 1] if len(observations) >= depth else None,
        "promise": node.promise,
        "progress": node.progress,
        "kept": node.kept,
        "count": node.count,
        "done": node.branch.done,
        "outcome": node.branch.outcome,
    }
