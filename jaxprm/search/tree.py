"""The search tree of one task: candidates, their scores, their execution, and the limits that stop a search early.

Letters in shapes: N candidates of one state. Step t = 1, 2, ... is the t-th action of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from jaxprm.errors import UserError
from jaxprm.policies.protocol import Action, Policy, State
from jaxprm.search.branches import Branch, BranchRunner

Ended = Literal["score", "budget"]


class ActionScorer(Protocol):
    """Scores candidate actions. `usage["encoded"]` counts the tokens that it has read since it was made.

    A scorer may have a method `refusal(state, candidate)`: why a candidate has no score, or None.
    """

    usage: dict[str, int]

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Promises of each state's candidate actions, one array [N] for each state. -inf: it cannot be scored."""


@dataclass
class Node:
    """A path from the prompt: its last action, the scores of that action, and the branch it leads to.

    Attributes:
        id: number within the tree, in the order of drawing; the root is 0.
        branch: the parent's branch until the action is executed, then the node's own.
        messages: the conversation up to the action, and the observation after it once there is one.
        promise: the scorer's value of the action; None for the root.
        score: what candidates are ranked by; -inf after an error.
        count: how many draws had this text.
        kept: whether the search continued with this node.
        draw: index of the first draw with this text.
        subtree: index of the independent path that the node belongs to, in diverse search.
        executed: whether an environment has taken the action.
        lookahead_value: promise of the last action reached by looking ahead of this node, or None.
        is_lookahead: whether the node was drawn only to look ahead of another one.
        counted: (number of messages, tokens) of the last token count, or None.
        error: why the scorer gave the action no score, or None. Such a node is neither executed nor continued.
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
    is_lookahead: bool = False
    counted: tuple[int, int] | None = None
    error: str | None = None

    @property
    def action(self) -> str:
        """Text of the last action; the root has none."""
        return self.turn["content"]

    @property
    def candidate(self) -> str | dict:
        """The last action as a scorer takes it: its text, or its message if that says more."""
        return self.turn if "reasoning_content" in self.turn else self.action

    @property
    def turn(self) -> dict:
        """The last action as a message."""
        return next(message for message in reversed(self.messages) if message["role"] == "assistant")

    @property
    def progress(self) -> float | None:
        """A_t = Q_t - Q_{t-1} (docs/method.md, section 2), or None at the first step."""
        if self.promise is None or self.parent is None or self.parent.promise is None:
            return None
        return self.promise - self.parent.promise


@dataclass
class Tree:
    """Search state of one task.

    Attributes:
        frontier: the paths that the search continues with or has finished.
        nodes: every candidate in the order of drawing, without the root.
        proposed, merged, cut, failed: draws in all, repeated texts among those of one state, draws cut at the token
            limit, and draws that the policy could not make.
        unscored: distinct candidates that the scorer could not score.
        generated: tokens that the policy generated.
        rounds: rounds of a beam, or steps that a tree search has taken.
        ended: why the search was stopped early, or None.
    """

    task: str
    root: Node
    frontier: list[Node]
    nodes: list[Node] = field(default_factory=list)
    proposed: int = 0
    merged: int = 0
    cut: int = 0
    failed: int = 0
    unscored: int = 0
    generated: int = 0
    rounds: int = 0
    ended: Ended | None = None

    @property
    def finished(self) -> bool:
        return self.ended is not None or all(node.branch.done for node in self.frontier)

    @property
    def best(self) -> Node:
        """The path with the highest score, the first one among equals.

        A search that was stopped early answers with its best finished path if it has one: an open path has no outcome.
        """
        finished = [node for node in self.frontier if node.branch.done]
        return max(finished if self.ended and finished else self.frontier, key=lambda node: node.score)


class Prices(NamedTuple):
    """Cost of a token that the policy generates, and of one that the scorer reads. (1, 1) counts tokens."""

    generated: float = 1.0
    read: float = 1.0


class SearchLimits(NamedTuple):
    """Early stopping of a search. Limits are checked after a round, so a round that has begun is paid for in full.

    score: a finished path with at least this score stops the search. budget: so does a cost of at least this much, at
    `prices`. None is no limit.
    """

    score: float | None = None
    budget: float | None = None
    prices: Prices = Prices()

    def reached(self, tree: Tree, count_tokens: Callable[[Sequence[dict]], int]) -> Ended | None:
        """The limit that the search of a task has reached, or None."""
        if self.score is not None and any(node.branch.done and node.score >= self.score for node in tree.frontier):
            return "score"
        if self.budget is not None:
            spent = self.prices.generated * tree.generated + self.prices.read * tokens_read(tree, count_tokens)
            if spent >= self.budget:
                return "budget"
        return None


def new_trees(tasks: Sequence[str], runner: BranchRunner) -> list[Tree]:
    """Starts every task and returns its tree, which holds only the prompt."""
    started = runner.map(runner.start, tasks, lambda task: task)
    roots = [Node(0, None, branch, [{"role": "user", "content": prompt}]) for prompt, branch in started]
    return [Tree(task, root, [root]) for task, root in zip(tasks, roots, strict=True)]


def expand(
    parents: Sequence[tuple[Tree, Node]],
    draws: int,
    runner: BranchRunner,
    policy: Policy,
    scorer: ActionScorer,
    temperature: float,
    progress_weight: float = 0.0,
) -> tuple[list[list[Action]], list[list[Node]]]:
    """Draws actions after every parent and scores the distinct ones, in one call to the policy and one to the scorer.

    Returns, for each parent, its `draws` actions, and its distinct candidates, which are scored and not yet executed.
    A candidate that cannot be scored is left out; its node stays in the tree, with the error. A parent for which the
    policy proposed no action, or the scorer scored none, is ended, with the first error as the reason.

    Raises UserError for a score that is NaN or infinite.
    """
    proposals = policy.propose([State(node.branch.task, node.messages) for _, node in parents], draws, temperature)
    candidates = [
        _add_candidates(tree, parent, drawn) for (tree, parent), drawn in zip(parents, proposals, strict=True)
    ]
    for (_, parent), nodes, drawn in zip(parents, candidates, proposals, strict=True):
        if not nodes:
            # All draws have failed; the first one's reason stands for the others.
            parent.branch = runner.abandon(parent.branch, f"policy: {drawn[0].error}")
            parent.score = -np.inf
    _score(parents, candidates, scorer, progress_weight)
    scored = [[node for node in nodes if node.error is None] for nodes in candidates]
    for (_, parent), nodes, remaining in zip(parents, candidates, scored, strict=True):
        if nodes and not remaining:
            parent.branch = runner.abandon(parent.branch, f"scorer: {nodes[0].error}")
            parent.score = -np.inf
    return proposals, scored


def execute(nodes: Sequence[Node], runner: BranchRunner) -> None:
    """Takes each node's action in its parent's branch, and appends the observation to the node's messages."""
    runner.map(lambda node: _execute(node, runner), nodes, lambda node: node.branch.task)


def commit(nodes: Sequence[Node], runner: BranchRunner) -> None:
    """Marks candidates as kept, and executes those that were not executed yet."""
    for node in nodes:
        node.kept = True
    execute([node for node in nodes if not node.executed], runner)


def merge_duplicates(actions: Sequence[Action]) -> list[tuple[Action, int]]:
    """Distinct actions in order of first appearance, with how often each was drawn.

    Actions of the same text and reasoning are one action, whatever their tokens.
    """
    counts: dict[tuple[str, str | None], list] = {}
    for action in actions:
        counts.setdefault(shown(action), [action, 0])[1] += 1
    return [(action, count) for action, count in counts.values()]


def shown(action: Action) -> tuple[str, str | None]:
    """Everything that the conversation after an action shows of it."""
    return action.text, action.reasoning


def tokens_read(tree: Tree, count_tokens: Callable[[Sequence[dict]], int]) -> int:
    """Tokens of a search tree with shared prefixes counted once: the least that a scorer has to read."""
    lengths = {0: _length(tree.root, count_tokens)}
    read = [node for node in tree.nodes if node.error is None]
    for node in read:
        lengths[node.id] = _length(node, count_tokens)
    # A node adds what it is longer than its parent: its action, and the observation after it.
    return lengths[0] + sum(lengths[node.id] - lengths[node.parent.id] for node in read)


def tree_to_dict(tree: Tree, **about) -> dict:
    """A tree for the report, after the entries of `about`: every candidate with its promise, progress and outcome.

    Nodes drawn only to look ahead are left out; "looked" of the candidate they follow is the value they led to.
    """
    return about | {
        "task": tree.task,
        "outcome": tree.best.branch.outcome,
        "prompt": tree.root.messages[0]["content"],
        "best": tree.best.id,
        "nodes": [_node_to_dict(node) for node in tree.nodes if not node.is_lookahead],
    }


def _add_candidates(tree: Tree, parent: Node, drawn: Sequence[Action]) -> list[Node]:
    """Appends a parent's distinct candidates to its tree, without draws that the policy failed to make."""
    valid = [action for action in drawn if action.stop != "error"]
    tree.proposed += len(drawn)
    # Draws that the policy had in memory count too: the cost of a search does not depend on what ran before it.
    tree.generated += sum(action.tokens for action in drawn)
    tree.failed += len(drawn) - len(valid)
    # Failed draws keep their index: diverse search groups candidates by it.
    draws = [shown(action) for action in drawn]
    nodes = []
    for action, count in merge_duplicates(valid):
        tree.merged += count - 1
        tree.cut += count * (action.stop == "length")
        messages = [*parent.messages, action.message]
        draw = draws.index(shown(action))
        nodes.append(Node(len(tree.nodes) + 1, parent, parent.branch, messages, count=count, kept=False, draw=draw))
        tree.nodes.append(nodes[-1])
    return nodes


def _score(parents, candidates: Sequence[list[Node]], scorer: ActionScorer, progress_weight: float) -> None:
    actions = [[node.candidate for node in nodes] for nodes in candidates]
    scores = scorer.score_actions([node.messages for _, node in parents], actions)
    refusal = getattr(scorer, "refusal", lambda state, candidate: None)
    for (tree, parent), nodes, values in zip(parents, candidates, scores, strict=True):
        values = np.asarray(values)
        for node in (node for node, value in zip(nodes, values, strict=True) if value == -np.inf):
            node.error = refusal(parent.messages, node.candidate)
            tree.unscored += node.error is not None
        # Without a reason, -inf is no score either, and an error below.
        has_score = [node.error is None for node in nodes]
        nodes, values = [node for node in nodes if node.error is None], values[has_score]
        # A NaN is neither larger nor smaller than anything, so ranking with one would silently give any order.
        if not np.isfinite(values).all():
            raise UserError(
                f"search of {tree.task}: the scorer returned {values}, and scores must be finite numbers; "
                "check whether the training run of this model diverged"
            )
        for node, value in zip(nodes, values, strict=True):
            node.promise = float(value)
            node.score = node.promise + progress_weight * (node.progress or 0.0)


def _execute(node: Node, runner: BranchRunner) -> None:
    node.executed = True
    node.branch = runner.step(node.branch, node.action)
    if node.branch.error is not None:
        node.score = -np.inf
    # Nothing is proposed or scored after the end, so the last observation is not part of a conversation.
    if not node.branch.done:
        node.messages = [*node.messages, {"role": "user", "content": node.branch.observations[-1]}]


def _length(node: Node, count_tokens: Callable[[Sequence[dict]], int]) -> int:
    # A budget asks for the same counts after every round, and a conversation only changes when its observation arrives.
    if node.counted is None or node.counted[0] != len(node.messages):
        node.counted = len(node.messages), count_tokens(node.messages)
    return node.counted[1]


def _node_to_dict(node: Node) -> dict:
    depth, parent = 0, node.parent
    while parent is not None:
        depth, parent = depth + 1, parent.parent
    # A candidate that was not executed has its parent's branch, which is open and one observation shorter.
    observations = node.branch.observations
    looked = {} if node.lookahead_value is None else {"looked": node.lookahead_value}
    if node.error is not None:
        looked["error"] = node.error
    return looked | {
        "id": node.id,
        "parent": node.parent.id if node.parent else 0,
        "round": depth,
        "action": node.action,
        "observation": observations[depth - 1] if len(observations) >= depth else None,
        "promise": node.promise,
        "progress": node.progress,
        "kept": node.kept,
        "count": node.count,
        "done": node.branch.done,
        "outcome": node.branch.outcome,
    }
