"""Lookahead (Snell et al. 2024): a candidate is worth what it leads to, a few steps of the policy's further on."""

from __future__ import annotations

from collections.abc import Sequence

from jaxprm.policies.protocol import Policy
from jaxprm.search.branches import Forest
from jaxprm.search.tree import ActionScorer, Node, Tree, execute, expand


def look_ahead(
    candidates: Sequence[tuple[Tree, Node]],
    steps: int,
    forest: Forest,
    policy: Policy,
    scorer: ActionScorer,
    progress_weight: float,
) -> None:
    """Executes every candidate, follows the policy's likeliest actions for up to `steps` more, and scores it anew.

    Its score is then the promise of the last action reached, plus progress_weight times its own progress. Where the way
    on is lost (an environment that raises, a policy that gives nothing), what was reached before counts; a candidate
    that raises itself ranks last. What is drawn on the way belongs to the tree, marked as `ahead`, and is paid for.
    """
    tips = {id(candidate): candidate for _, candidate in candidates}
    execute([candidate for _, candidate in candidates], forest)
    going = list(candidates)
    for _ in range(steps):
        going = [(tree, candidate) for tree, candidate in going if not tips[id(candidate)].branch.done]
        if not going:
            break
        parents = [(tree, tips[id(candidate)]) for tree, candidate in going]
        before = [(tip.branch, tip.score) for _, tip in parents]
        _, found = expand(parents, 1, forest, policy, scorer, temperature=0.0)
        further = [node for nodes in found for node in nodes]
        for node in further:
            node.ahead = True
        execute(further, forest)
        reached = []
        for (tree, candidate), (_, tip), (branch, score), nodes in zip(going, parents, before, found, strict=True):
            if not nodes:
                # Not this path's end: it is not on the way that it will be asked to go on.
                tip.branch, tip.score = branch, score
            elif nodes[0].branch.error is None:
                tips[id(candidate)] = nodes[0]
                reached.append((tree, candidate))
        going = reached
    for _, candidate in candidates:
        if candidate.branch.error is None:
            candidate.looked = tips[id(candidate)].promise
            candidate.score = candidate.looked + progress_weight * (candidate.progress or 0.0)
