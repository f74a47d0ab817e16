"""When the search of a task ends before all of its paths have: it has found enough, or spent enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from jaxprm.search.tree import Node, Tree

Ended = Literal["score", "budget"]


class Prices(NamedTuple):
    """What a token costs: one that the policy generates, and one that the scorer reads. (1, 1) counts tokens."""

    generated: float = 1.0
    read: float = 1.0


class Limits(NamedTuple):
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
