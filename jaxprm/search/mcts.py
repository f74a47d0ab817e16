"""Monte Carlo tree search with promises as values: PUCT (Silver et al., Nature 550, 2017), many tasks at once.

Before every step of the agent, S simulations start at the current state. Each follows the children of largest PUCT
score down to a node without children, which is executed and expanded. Then the most visited action is taken, and the
search continues below it with the statistics it has.

Letters: S simulations, M actions drawn in a state, n(.) visits, P(.) priors, Q promise.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxprm.policies.protocol import Action, Policy, prefix_hash
from jaxprm.search.branches import BranchRunner
from jaxprm.search.spec import SearchMethod, SearchRequest
from jaxprm.search.tree import ActionScorer, Node, SearchLimits, Tree, commit, expand, new_trees


@dataclass
class PuctSearch:
    """A tree with the statistics of PUCT, by node id: children, priors, visits, and sums of backed-up values."""

    tree: Tree
    exploration: float
    root: Node
    children: dict[int, list[Node]] = field(default_factory=dict)
    priors: dict[int, float] = field(default_factory=dict)
    visits: Counter[int] = field(default_factory=Counter)
    totals: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def value(self, node: Node) -> float:
        """Mean of the values that were backed up through a node; before the first, its promise, or 0 after an error."""
        if self.visits[node.id]:
            return self.totals[node.id] / self.visits[node.id]
        return 0.0 if node.branch.error is not None else node.promise

    def puct(self, parent: Node, child: Node) -> float:
        """value(child) + c * P(child) * sqrt(n(parent)) / (1 + n(child)), with the exploration constant c."""
        bonus = math.sqrt(self.visits[parent.id]) / (1 + self.visits[child.id])
        return self.value(child) + self.exploration * self.priors[child.id] * bonus

    def select(self) -> list[Node]:
        """The path of children with the largest PUCT score, from the root down to a node that has none.

        Among equals the child that was drawn first is followed.
        """
        path = [self.root]
        while children := self.children.get(path[-1].id):
            path.append(max(children, key=lambda child: self.puct(path[-1], child)))
        return path

    def add_children(self, parent: Node, candidates: list[Node], drawn: Sequence[Action]) -> None:
        """Makes a node's candidates its children, with priors from the actions that were drawn."""
        self.children[parent.id] = candidates
        by_message = {prefix_hash([action.message]): action for action in drawn}
        shares = priors([by_message[prefix_hash([node.turn])] for node in candidates], candidates)
        self.priors |= {node.id: share for node, share in zip(candidates, shares, strict=True)}

    def back_up(self, path: Sequence[Node]) -> None:
        """Adds one visit and the value v of the path's last node to every node of the path.

        v is the node's promise if the episode ended there, 0 if it failed, else the prior-weighted mean promise of its
        children: v = sum_i P(child_i) Q(child_i).
        """
        leaf = path[-1]
        if leaf.branch.error is not None:
            value = 0.0
        elif leaf.branch.done:
            value = leaf.promise
        else:
            value = sum(self.priors[child.id] * child.promise for child in self.children[leaf.id])
        for node in path:
            self.visits[node.id] += 1
            self.totals[node.id] += value

    def best_child(self) -> Node:
        """The most visited child of the root; among equals the one of largest value."""
        return max(self.children[self.root.id], key=lambda node: (self.visits[node.id], self.value(node)))

    def step(self, runner: BranchRunner) -> None:
        """Takes the best action, which becomes the root."""
        self.root = self.best_child()
        commit([self.root], runner)
        self.tree.frontier = [self.root]
        self.tree.rounds += 1


def priors(actions: Sequence[Action], candidates: Sequence[Node]) -> list[float]:
    """Priors of N candidates, which sum to 1.

    P_i is proportional to the probability of text i if the policy gives all N of them, else to how often it was drawn.
    """
    # All or none: a probability of one text cannot be compared with a number of draws of another.
    if any(action.log_probability is None for action in actions):
        weights = np.array([float(node.count) for node in candidates])
    else:
        logs = np.array([action.log_probability for action in actions])
        # Probabilities of long texts underflow; their ratios do not.
        weights = np.exp(logs - logs.max())
    return (weights / weights.sum()).tolist()


def tree_search(
    tasks: Sequence[str],
    runner: BranchRunner,
    policy: Policy,
    scorer: ActionScorer,
    *,
    simulations: int,
    actions: int,
    temperature: float,
    max_rounds: int,
    exploration: float = 1.0,
    limits: SearchLimits = SearchLimits(),
) -> list[Tree]:
    """Searches all tasks in lockstep: simulation i of every task is one call to the policy and one to the scorer.

    Args:
        simulations: S, simulations before each step.
        actions: M, actions drawn when a node is expanded.
        exploration: c of PUCT; 0 follows values alone.

    Raises UserError for a score that is not a finite number.
    """
    searches = [PuctSearch(tree, exploration, tree.root) for tree in new_trees(tasks, runner)]
    for _ in range(max_rounds):
        searching = [search for search in searches if not search.tree.finished]
        for _ in range(simulations if searching else 0):
            _simulate(searching, actions, runner, policy, scorer, temperature)
            # A policy that proposes nothing at the root ends the task there: no step can be taken.
            searching = [search for search in searching if not search.root.branch.done]
        for search in searching:
            search.step(runner)
            if not search.tree.finished:
                search.tree.ended = limits.reached(search.tree, policy.count_tokens)
    return [search.tree for search in searches]


def _simulate(
    searches: Sequence[PuctSearch],
    actions: int,
    runner: BranchRunner,
    policy: Policy,
    scorer: ActionScorer,
    temperature: float,
) -> None:
    """One simulation of every search: select, execute, expand, back up."""
    paths = [search.select() for search in searches]
    # The root is executed already.
    commit([path[-1] for path in paths if path[-1] is not path[0]], runner)
    open_leaves = [(search, path[-1]) for search, path in zip(searches, paths, strict=True) if not path[-1].branch.done]
    if open_leaves:
        parents = [(search.tree, leaf) for search, leaf in open_leaves]
        proposals, candidates = expand(parents, actions, runner, policy, scorer, temperature)
        for (search, leaf), drawn, nodes in zip(open_leaves, proposals, candidates, strict=True):
            if nodes:
                search.add_children(leaf, nodes, drawn)
    for search, path in zip(searches, paths, strict=True):
        # Also where the path ends in an error or the policy proposed nothing: the visit counts, with the value 0.
        search.back_up(path)


def _run(request: SearchRequest) -> list[Tree]:
    return tree_search(
        request.tasks,
        request.runner,
        request.policy,
        request.scorer,
        simulations=request.spec.width,
        actions=request.spec.actions,
        temperature=request.settings.temperature,
        max_rounds=request.max_rounds,
        exploration=request.settings.exploration,
        limits=request.limits,
    )


MCTS = SearchMethod(
    "mcts",
    _run,
    label="tree search {}",
    config_field="mcts",
    # Paths are scored one after another, and a simulation returns only to a few of them.
    cached_paths=lambda spec: 4,
    inputs=lambda settings: {"exploration": settings.exploration},
)
