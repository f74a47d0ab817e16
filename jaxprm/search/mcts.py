"""Monte Carlo tree search with promises for values (PUCT, Silver et al. 2017), many tasks at once.

Before every step of the agent `simulations` paths are followed from where it stands, each to a node without children,
which is executed and expanded; then the most visited action is taken, and what is below it is searched on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxprm.policies.protocol import Action, Policy
from jaxprm.search.branches import BranchRunner
from jaxprm.search.tree import ActionScorer, Node, SearchLimits, Tree, commit, expand, new_trees


@dataclass
class PuctSearch:
    """A tree with what PUCT remembers of its nodes, by id: children, priors, visits and sums of backed-up values."""

    tree: Tree
    exploration: float
    root: Node
    children: dict[int, list[Node]] = field(default_factory=dict)
    priors: dict[int, float] = field(default_factory=dict)
    visits: Counter[int] = field(default_factory=Counter)
    totals: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def value(self, node: Node) -> float:
        """The mean of what was backed up through a node; its promise, 0 after an error, before anything was."""
        if self.visits[node.id]:
            return self.totals[node.id] / self.visits[node.id]
        return 0.0 if node.branch.error is not None else node.promise

    def puct(self, parent: Node, child: Node) -> float:
        """Q + c P sqrt(N of the parent) / (1 + N)."""
        wide = math.sqrt(self.visits[parent.id]) / (1 + self.visits[child.id])
        return self.value(child) + self.exploration * self.priors[child.id] * wide

    def select(self) -> list[Node]:
        """The path of best children, down to a node that has none; among equals the one drawn first."""
        path = [self.root]
        while found := self.children.get(path[-1].id):
            path.append(max(found, key=lambda child: self.puct(path[-1], child)))
        return path

    def grow(self, parent: Node, candidates: list[Node], drawn: Sequence[Action]) -> None:
        self.children[parent.id] = candidates
        of_text = {action.text: action for action in drawn}
        actions = [of_text[node.messages[-1]["content"]] for node in candidates]
        self.priors |= {node.id: prior for node, prior in zip(candidates, priors(actions, candidates), strict=True)}

    def back_up(self, path: Sequence[Node]) -> None:
        """A finished leaf is worth its promise, and 0 after an error; any other what its children are, by priors."""
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

    def commit(self, forest: BranchRunner) -> None:
        """Takes the most visited action; among equals the one of highest value."""
        self.root = max(self.children[self.root.id], key=lambda node: (self.visits[node.id], self.value(node)))
        commit([self.root], forest)
        self.tree.frontier = [self.root]
        self.tree.rounds += 1


def priors(actions: Sequence[Action], candidates: Sequence[Node]) -> list[float]:
    """In proportion to the probability of each text where the policy tells it, to how often it was drawn otherwise."""
    if any(action.log_probability is None for action in actions):
        weights = np.array([float(node.count) for node in candidates])
    else:
        logs = np.array([action.log_probability for action in actions])
        weights = np.exp(logs - logs.max())
    return (weights / weights.sum()).tolist()


def tree_search(
    tasks: Sequence[str],
    forest: BranchRunner,
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
    """Searches the tasks in lockstep, so that one call to the policy and one to the scorer serve a simulation of each.

    Args:
        simulations: paths followed before a step; actions: drawn where a node is expanded.
        exploration: c of PUCT; 0 follows values alone.

    Raises UserError for a score that is not a finite number.
    """
    searches = [PuctSearch(tree, exploration, tree.root) for tree in new_trees(tasks, forest)]
    for _ in range(max_rounds):
        searching = [search for search in searches if not search.tree.finished]
        for _ in range(simulations if searching else 0):
            paths = [search.select() for search in searching]
            commit([path[-1] for path in paths if path[-1] is not path[0]], forest)
            growing = [
                (search, path[-1]) for search, path in zip(searching, paths, strict=True) if not path[-1].branch.done
            ]
            parents = [(search.tree, leaf) for search, leaf in growing]
            drawn, candidates = expand(parents, actions, forest, policy, scorer, temperature) if parents else ([], [])
            for (search, leaf), found, nodes in zip(growing, drawn, candidates, strict=True):
                if nodes:
                    search.grow(leaf, nodes, found)
            for search, path in zip(searching, paths, strict=True):
                search.back_up(path)
            searching = [search for search in searching if not search.root.branch.done]
        for search in searching:
            search.commit(forest)
            if not search.tree.finished:
                search.tree.ended = limits.reached(search.tree, policy.count_tokens)
    return [search.tree for search in searches]
