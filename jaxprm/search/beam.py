"""Beam search over actions (AgentPRM, Algorithm 2), plain, diverse or with lookahead, many tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxprm.policies.protocol import Policy
from jaxprm.search.branches import BranchRunner
from jaxprm.search.tree import ActionScorer, Node, SearchLimits, Tree, commit, execute, expand, new_trees


def look_ahead(
    candidates: Sequence[tuple[Tree, Node]],
    steps: int,
    forest: BranchRunner,
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
            candidate.lookahead_value = tips[id(candidate)].promise
            candidate.score = candidate.lookahead_value + progress_weight * (candidate.progress or 0.0)


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


def beam_search(
    tasks: Sequence[str],
    forest: BranchRunner,
    policy: Policy,
    scorer: ActionScorer,
    *,
    width: int,
    actions: int,
    temperature: float,
    max_rounds: int,
    progress_weight: float = 0.0,
    diverse: bool = False,
    ahead: int = 0,
    limits: SearchLimits = SearchLimits(),
    on_round: Callable[[Sequence[Tree]], None] | None = None,
) -> list[Tree]:
    """Searches the tasks in lockstep, so that one call to the policy and one to the scorer serve all of them.

    score = promise + progress_weight * progress, progress taken as 0 at the first step; the promise is that of an
    action up to `ahead` steps further on. A branch whose environment raised ranks behind all others: it is chosen where
    nothing else is left. So does a path for which the policy had no candidate; where it had some, those that failed are
    left out and counted. Raises UserError for a score that is not a finite number.
    """
    trees = new_trees(tasks, forest)
    for round_number in range(1, max_rounds + 1):
        open_trees = [tree for tree in trees if not tree.finished]
        if not open_trees:
            break
        draws = width * actions if round_number == 1 else actions
        parents = [(tree, node) for tree in open_trees for node in tree.frontier if not node.branch.done]
        _, candidates = expand(parents, draws, forest, policy, scorer, temperature, progress_weight)
        grown = list(zip(parents, candidates, strict=True))
        if ahead:
            found = [(tree, node) for (tree, _), nodes in grown for node in nodes]
            look_ahead(found, ahead, forest, policy, scorer, progress_weight)
        taken: list[Node] = []
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
            taken += [node for node in new if id(node) in kept]
        commit(taken, forest)
        for tree in open_trees:
            tree.ended = limits.reached(tree, policy.count_tokens) if not tree.finished else None
        if on_round is not None:
            on_round(trees)
    return trees
