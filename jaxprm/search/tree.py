"""The search tree of one task: candidates, their scores, their execution, and when the search stops early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    pass


from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxprm.errors import UserError
from jaxprm.policies.protocol import Action, Policy, State
from jaxprm.search.branches import Branch, BranchRunner

Ended = Literal["score", "budget"]


class Prices(NamedTuple):
    """What a token costs: one that the policy generates, and one that the scorer reads. (1, 1) counts tokens."""

    generated: float = 1.0
    read: float = 1.0


class SearchLimits(NamedTuple):
    """Looked at after every round, so the last one is paid for in full.

    score: a finished path of at least this score ends the search; budget: so does having spent this much, at `prices`.
    """

    score: float | None = None
    budget: float | None = None
    prices: Prices = Prices()

    def reached(self, tree: Tree, count_tokens: Callable[[Sequence[dict]], int]) -> Ended | None:
        """Why a search that goes on in some path is to end here, or None."""
        if self.score is not None and any(node.branch.done and node.score >= self.score for node in tree.frontier):
            return "score"
        if self.budget is not None:
            spent = self.prices.generated * tree.generated + self.prices.read * tokens_read(tree, count_tokens)
            if spent >= self.budget:
                return "budget"
        return None


def tokens_read(tree: Tree, count_tokens: Callable[[Sequence[dict]], int]) -> int:
    """Tokens of a search tree, every one counted once: what a scorer has to read at the least."""
    lengths = {0: _length(tree.root, count_tokens)}
    for node in tree.nodes:
        lengths[node.id] = _length(node, count_tokens)
    return lengths[0] + sum(lengths[node.id] - lengths[node.parent.id] for node in tree.nodes)


def _length(node: Node, count_tokens: Callable[[Sequence[dict]], int]) -> int:
    """A conversation only ever grows by the observation: what was counted is counted again after that alone."""
    if node.counted is None or node.counted[0] != len(node.messages):
        node.counted = len(node.messages), count_tokens(node.messages)
    return node.counted[1]


class ActionScorer(Protocol):
    """Promise of candidate actions, one array of scores a state. `usage["encoded"]` counts the tokens it read."""

    usage: dict[str, int]

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]: ...


@dataclass
class Node:
    """A path: its last action, what that action was worth, and where it led.

    draw: the number of its first draw; subtree: of a diverse search, the one of the N that it belongs to; kept: taken
    by the search; executed: by an environment; looked: the promise that looking ahead found; ahead: drawn on that way;
    counted: (messages, tokens), once they were.
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
    executed: bool = False
    lookahead_value: float | None = None
    ahead: bool = False
    counted: tuple[int, int] | None = None

    @property
    def progress(self) -> float | None:
        """Gain in promise over the step before (docs/method.md, section 2); not defined at the first step."""
        if self.promise is None or self.parent is None or self.parent.promise is None:
            return None
        return self.promise - self.parent.promise


@dataclass
class Tree:
    """The search of one task. ended: why it did before its paths had."""

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
    ended: Ended | None = None

    @property
    def finished(self) -> bool:
        return self.ended is not None or all(node.branch.done for node in self.frontier)

    @property
    def best(self) -> Node:
        """The best-scoring path, of a search that was ended the best finished one if there is any; among equals the one
        found first."""
        over = [node for node in self.frontier if node.branch.done]
        return max(over if self.ended and over else self.frontier, key=lambda node: node.score)


def new_trees(tasks: Sequence[str], forest: BranchRunner) -> list[Tree]:
    """A tree for each task, with its prompt."""
    started = forest.map(forest.start, tasks, lambda task: task)
    roots = [Node(0, None, branch, [{"role": "user", "content": prompt}]) for prompt, branch in started]
    return [Tree(task, root, [root]) for task, root in zip(tasks, roots, strict=True)]


def merge_duplicates(actions: Sequence[Action]) -> list[tuple[Action, int]]:
    """Equal texts once, in order of first appearance, with how often each was drawn."""
    counts: dict[str, list] = {}
    for action in actions:
        counts.setdefault(action.text, [action, 0])[1] += 1
    return [(action, count) for action, count in counts.values()]


def expand(
    parents: Sequence[tuple[Tree, Node]],
    draws: int,
    forest: BranchRunner,
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


def commit(nodes: Sequence[Node], forest: BranchRunner) -> None:
    """Keeps candidates, executed where they were not."""
    for node in nodes:
        node.kept = True
    execute([node for node in nodes if not node.executed], forest)


def execute(nodes: Sequence[Node], forest: BranchRunner) -> None:
    """Takes candidates' actions in their parents' environment branches; the observations join their messages."""
    forest.map(lambda node: _execute(node, forest), nodes, lambda node: node.branch.task)


def _execute(node: Node, forest: BranchRunner) -> None:
    node.executed = True
    node.branch = forest.step(node.branch, node.messages[-1]["content"])
    if node.branch.error is not None:
        node.score = -np.inf
    if not node.branch.done:
        node.messages = [*node.messages, {"role": "user", "content": node.branch.observations[-1]}]


def tree_to_dict(tree: Tree, **about) -> dict:
    """A tree for the report: every candidate with its promise and progress, kept or not, and how it ended. What was
    drawn on the way ahead of one is left out; what was found there is its "looked"."""
    return about | {
        "task": tree.task,
        "outcome": tree.best.branch.outcome,
        "prompt": tree.root.messages[0]["content"],
        "best": tree.best.id,
        "nodes": [_node_to_dict(node) for node in tree.nodes if not node.ahead],
    }


def _node_to_dict(node: Node) -> dict:
    depth, parent = 0, node.parent
    while parent is not None:
        depth, parent = depth + 1, parent.parent
    # A candidate that was not executed has its parent's branch, which is open and one observation shorter.
    observations = node.branch.observations
    looked = {} if node.lookahead_value is None else {"looked": node.lookahead_value}
    return looked | {
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
