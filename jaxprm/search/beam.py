"""Beam search over actions (AgentPRM, arXiv 2511.08325, Algorithm 2): plain, step-wise, diverse and with lookahead.

Letters: N paths kept, M actions drawn after each of them, Q promise, A progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxprm.policies.protocol import Policy
from jaxprm.search.branches import BranchRunner
from jaxprm.search.spec import SearchMethod, SearchRequest
from jaxprm.search.tree import ActionScorer, Node, SearchLimits, Tree, commit, execute, expand, new_trees


def beam_search(
    tasks: Sequence[str],
    runner: BranchRunner,
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
    """Searches all tasks in lockstep: a round is one call to the policy and one to the scorer for all of them.

    Candidates are ranked by

        score_t = Q(s_{t+k}, a_{t+k}) + progress_weight * A(s_t, a_t),   A(s_1, a_1) = 0,   0 <= k <= ahead,

    with the action a_{t+k} that looking ahead reached, k = 0 without lookahead. Where the paper is silent
    (docs/method.md, section 7):

    - The first round draws N * M actions from the prompt, each later round M after every open path.
    - Equal actions of one state are one candidate.
    - A finished path keeps its score and competes with open ones; among equals it comes first.
    - A path scores -inf if its environment raised or the policy proposed no action after it. It is kept only if no
      other path is left.

    Args:
        width: N.
        actions: M.
        diverse: N paths that compete only with candidates from their own draws.
        on_round: called with the trees after every round.

    Raises UserError for a score that is not a finite number.
    """
    trees = new_trees(tasks, runner)
    for round_number in range(1, max_rounds + 1):
        open_trees = [tree for tree in trees if not tree.finished]
        if not open_trees:
            break
        # In the first round all N paths come from the prompt.
        draws = width * actions if round_number == 1 else actions
        parents = [(tree, node) for tree in open_trees for node in tree.frontier if not node.branch.done]
        _, candidates = expand(parents, draws, runner, policy, scorer, temperature, progress_weight)
        drawn = [(tree, node) for (tree, _), nodes in zip(parents, candidates, strict=True) for node in nodes]
        if ahead:
            look_ahead(drawn, ahead, runner, policy, scorer, progress_weight)
        chosen: list[Node] = []
        for tree in open_trees:
            new = [node for owner, node in drawn if owner is tree]
            finished = [node for node in tree.frontier if node.branch.done]
            if not diverse:
                tree.frontier = keep_best(finished, new, width)
            elif round_number == 1:
                tree.frontier = _first_diverse(finished, new, width, actions)
            else:
                tree.frontier = _next_diverse(finished, new, len(tree.frontier))
            tree.rounds = round_number
            # By id: a Node compares by value, so it cannot be in a set.
            kept = {id(node) for node in tree.frontier}
            chosen += [node for node in new if id(node) in kept]
        # One call for all trees: environments of different tasks can work at the same time.
        commit(chosen, runner)
        # Limits look at outcomes, so the chosen candidates must have been executed.
        for tree in open_trees:
            tree.ended = limits.reached(tree, policy.count_tokens) if not tree.finished else None
        if on_round is not None:
            on_round(trees)
    return trees


def keep_best(finished: Sequence[Node], candidates: Sequence[Node], width: int) -> list[Node]:
    """The `width` nodes with the highest scores; among equals finished paths first, then candidates as drawn."""
    # Sorting is stable: it keeps the order of equal scores.
    return sorted([*finished, *candidates], key=lambda node: -node.score)[:width]


def keep_diverse(finished: Sequence[Node], candidates: Sequence[Node], width: int) -> list[Node]:
    """The best node of each subtree, ties as in `keep_best`, by descending score.

    Subtrees without a candidate are replaced by the best remaining nodes of the others. If all draws are equal there
    are fewer paths than `width`.
    """
    ranked = keep_best(finished, candidates, len(finished) + len(candidates))
    # Reversed, so that the best node of a subtree is the last one written and stays.
    best = {node.subtree: node for node in reversed(ranked)}
    firsts = [node for node in ranked if best[node.subtree] is node]
    others = [node for node in ranked if best[node.subtree] is not node]
    return keep_best([], [*firsts, *others[: max(0, width - len(firsts))]], width)


def _first_diverse(finished: Sequence[Node], candidates: Sequence[Node], width: int, actions: int) -> list[Node]:
    """Divides the N * M first draws into N groups of M, keeps the best of each, and numbers the paths."""
    for node in candidates:
        node.subtree = node.draw // actions
    frontier = keep_diverse(finished, candidates, width)
    # Two paths may come from one group; from here on each of them is a search of its own.
    for number, node in enumerate(frontier):
        node.subtree = number
    return frontier


def _next_diverse(finished: Sequence[Node], candidates: Sequence[Node], paths: int) -> list[Node]:
    for node in candidates:
        node.subtree = node.parent.subtree
    return keep_diverse(finished, candidates, paths)


def look_ahead(
    candidates: Sequence[tuple[Tree, Node]],
    steps: int,
    runner: BranchRunner,
    policy: Policy,
    scorer: ActionScorer,
    progress_weight: float,
) -> None:
    """Executes candidates, follows each for up to `steps` greedy actions of the policy, and scores it by the last one.

    A candidate a_t from which the action a_{t+k} was reached, 0 <= k <= steps, gets

        lookahead_value = Q(s_{t+k}, a_{t+k}),   score = lookahead_value + progress_weight * A(s_t, a_t).

    k < steps if the episode ends, the environment raises, or the policy proposes nothing. A candidate whose own action
    raises keeps the score -inf. Nodes drawn on the way have `is_lookahead`, and their tokens and steps count.
    """
    reached = {id(candidate): candidate for _, candidate in candidates}
    execute([candidate for _, candidate in candidates], runner)
    following = list(candidates)
    for _ in range(steps):
        following = [(tree, candidate) for tree, candidate in following if not reached[id(candidate)].branch.done]
        if not following:
            break
        parents = [(tree, reached[id(candidate)]) for tree, candidate in following]
        before = [(parent.branch, parent.score) for _, parent in parents]
        # Without the progress weight: these nodes are never ranked, only their promise is used.
        _, drawn = expand(parents, 1, runner, policy, scorer, temperature=0.0)
        new = [node for nodes in drawn for node in nodes]
        for node in new:
            node.is_lookahead = True
        execute(new, runner)
        still_following = []
        for (tree, candidate), (_, parent), (branch, score), nodes in zip(
            following, parents, before, drawn, strict=True
        ):
            if not nodes:
                # `expand` has ended the parent. Undo that: the search may never ask for an action after it.
                parent.branch, parent.score = branch, score
            elif nodes[0].branch.error is None:
                reached[id(candidate)] = nodes[0]
                still_following.append((tree, candidate))
        following = still_following
    for _, candidate in candidates:
        if candidate.branch.error is None:
            candidate.lookahead_value = reached[id(candidate)].promise
            candidate.score = candidate.lookahead_value + progress_weight * (candidate.progress or 0.0)


def _run(request: SearchRequest) -> list[Tree]:
    return beam_search(
        request.tasks,
        request.runner,
        request.policy,
        request.scorer,
        width=request.spec.width,
        actions=request.spec.actions,
        temperature=request.settings.temperature,
        max_rounds=request.max_rounds,
        progress_weight=request.settings.progress_weight,
        diverse=request.spec.kind == "diverse",
        ahead=request.spec.ahead,
        limits=request.limits,
    )


BEAM = SearchMethod(
    "beam",
    _run,
    label="beam {}",
    card="beam {}",
    config_field="beams",
    # A beam that keeps one path is step-wise search, and shares its file.
    file_stem=lambda spec: f"stepwise-{spec.actions}" if spec.width == 1 else f"beam-{spec.size}",
    omit_kind=True,
)
STEPWISE = SearchMethod(
    "stepwise",
    _run,
    label="step-wise best of {}",
    card="best of {} at every step",
    config_field="stepwise",
    parse_sizes=lambda actions: (1, actions),
    size=lambda spec: str(spec.actions),
    omit_kind=True,
)
DIVERSE = SearchMethod("diverse", _run, label="diverse beam {}", config_field="diverse")
LOOKAHEAD = SearchMethod("lookahead", _run, label="lookahead {}", config_field="lookahead")
