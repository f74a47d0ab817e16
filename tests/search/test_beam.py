"""Beam search on a tree small enough to work out by hand, and against naive implementations on random trees."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.errors import UserError
from jaxprm.policies.protocol import Action
from jaxprm.search.beam import beam_search, keep_best
from jaxprm.search.branches import Branch, BranchRunner
from jaxprm.search.tree import Node, merge_duplicates, tree_to_dict
from tests.search.fakes import Factory, ScriptedPolicy, ScriptedScorer, TreeGame, path_of

GAME = {
    "golden": {
        "a": {"x": 1.0},
        "b": {"d": 0.0, "e": {"x": 1.0}},
        "c": {"f": {"g": 1.0, "h": 0.5}},
    }
}
DRAWS = {(): ["a", "b", "a", "c"], ("b",): ["d", "e"], ("c",): ["f", "f"], ("c", "f"): ["g", "h"]}
SCORES = {
    ("a",): 0.5,
    ("b",): 0.7,
    ("c",): 0.6,
    ("b", "d"): 0.65,
    ("b", "e"): 0.4,
    ("c", "f"): 0.8,
    ("c", "f", "g"): 0.66,
    ("c", "f", "h"): 0.3,
}


def search(
    games, draws, scores, *, width, actions, tasks=None, fork="clone", max_rounds=20, cut=(), fail=(), **options
):
    """The trees, the environments and the policy of a scripted search."""
    factory = Factory(lambda: TreeGame(games, fork))
    runner = BranchRunner(factory)
    policy = ScriptedPolicy(draws if callable(draws) else lambda task, path: draws[path], cut, fail)
    trees = beam_search(
        tasks or list(games),
        runner,
        policy,
        ScriptedScorer(scores),
        width=width,
        actions=actions,
        temperature=1.0,
        max_rounds=max_rounds,
        **options,
    )
    runner.close()
    assert set(factory.closes) == {1}
    return trees, factory, policy


def paths(nodes):
    return [path_of(node.messages) for node in nodes]


def test_the_golden_tree_is_searched_as_worked_out_by_hand():
    frontiers = []
    (tree,), factory, policy = search(
        GAME,
        DRAWS,
        SCORES,
        width=2,
        actions=2,
        cut={"f"},
        on_round=lambda trees: frontiers.append(paths(trees[0].frontier)),
    )
    # Round 1: a .5, b .7, c .6. Round 2: b/d .65 (over), b/e .4, c/f .8. Round 3: c/f/g .66, c/f/h .3, and b/d kept.
    assert frontiers == [
        [("b",), ("c",)],
        [("c", "f"), ("b", "d")],
        [("c", "f", "g"), ("b", "d")],
    ]
    assert path_of(tree.best.messages) == ("c", "f", "g")
    assert tree.best.branch.outcome == 1.0
    # 2 x 2 draws from the start, then 2 from each open path: two in round 2, one in round 3.
    assert policy.calls == [(1, 4), (2, 2), (1, 2)]
    assert (tree.proposed, tree.generated, tree.rounds) == (10, 30, 3)
    assert tree.merged == 2  # a and f were drawn twice
    assert tree.cut == 2  # f, both times
    # Only what was kept was executed, once each.
    assert factory.environments[0].executed == [("b",), ("c",), ("b", "d"), ("c", "f"), ("c", "f", "g")]


def test_the_dict_of_the_golden_tree_has_every_candidate():
    (tree,), _, _ = search(GAME, DRAWS, SCORES, width=2, actions=2)
    plain = tree_to_dict(tree, method="agentprm", beam="2x2")
    nodes = plain.pop("nodes")
    assert plain == {
        "method": "agentprm",
        "beam": "2x2",
        "task": "golden",
        "outcome": 1.0,
        "prompt": "play golden",
        "best": 7,
    }
    names = ["id", "parent", "round", "action", "observation", "promise", "progress", "kept", "count"]
    names += ["done", "outcome"]
    expected = [
        (1, 0, 1, "a", None, 0.5, None, False, 2, False, None),
        (2, 0, 1, "b", "at b", 0.7, None, True, 1, False, None),
        (3, 0, 1, "c", "at c", 0.6, None, True, 1, False, None),
        (4, 2, 2, "d", "at b/d", 0.65, -0.05, True, 1, True, 0.0),
        (5, 2, 2, "e", None, 0.4, -0.3, False, 1, False, None),
        (6, 3, 2, "f", "at c/f", 0.8, 0.2, True, 2, False, None),
        (7, 6, 3, "g", "at c/f/g", 0.66, -0.14, True, 1, True, 1.0),
        (8, 6, 3, "h", None, 0.3, -0.5, False, 1, False, None),
    ]
    assert [list(node) for node in nodes] == [names] * 8
    assert [node.pop("progress") for node in nodes] == [
        progress if progress is None else pytest.approx(progress) for *_, progress, _, _, _, _ in expected
    ]
    assert [tuple(node.values()) for node in nodes] == [(*row[:6], *row[7:]) for row in expected]


def test_a_finished_path_wins_a_tie_against_a_later_one():
    scores = SCORES | {("c", "f", "g"): 0.65}
    (tree,), _, _ = search(GAME, DRAWS, scores, width=2, actions=2)
    assert paths(tree.frontier) == [("b", "d"), ("c", "f", "g")]
    assert path_of(tree.best.messages) == ("b", "d")
    assert tree.best.branch.outcome == 0.0


def test_a_finished_path_is_dropped_for_better_ones():
    scores = SCORES | {("c", "f", "g"): 0.9, ("c", "f", "h"): 0.95}
    (tree,), _, _ = search(GAME, DRAWS, scores, width=2, actions=2)
    assert paths(tree.frontier) == [("c", "f", "h"), ("c", "f", "g")]
    # It was executed, and the tree still says how it ended.
    assert tree_to_dict(tree)["nodes"][3]["outcome"] == 0.0
    assert tree.best.branch.outcome == 0.5


def test_ties_keep_the_candidates_that_were_drawn_first():
    (tree,), _, _ = search(GAME, DRAWS | {("a",): ["x"]}, lambda path: 0.5, width=2, actions=2)
    assert paths(node for node in tree.nodes if node.kept) == [("a",), ("b",), ("a", "x"), ("b", "d")]
    assert path_of(tree.best.messages) == ("a", "x")


def test_the_best_are_kept_finished_paths_first_among_equals():
    nodes = [Node(index, None, Branch("t"), [], score=score) for index, score in enumerate([0.1, 0.5, 0.5, 0.1, 0.5])]
    assert [node.id for node in keep_best(nodes[3:], nodes[:3], 3)] == [4, 1, 2]
    assert [node.id for node in keep_best([], nodes, 4)] == [1, 2, 4, 0]
    assert keep_best([], [], 2) == []


def test_duplicates_are_merged_in_order_of_appearance():
    actions = [Action(text, tokens) for tokens, text in enumerate("babcb")]
    assert merge_duplicates(actions) == [(Action("b", 0), 3), (Action("a", 1), 1), (Action("c", 3), 1)]


def test_the_same_text_after_different_parents_is_not_a_duplicate():
    game = {"t": {"a": {"x": 0.0}, "b": {"x": 1.0}}}
    draws = {(): ["a", "b"], ("a",): ["x"], ("b",): ["x"]}
    scores = {("a",): 0.1, ("b",): 0.1, ("a", "x"): 0.2, ("b", "x"): 0.3}
    (tree,), _, _ = search(game, draws, scores, width=2, actions=1)
    assert tree.merged == 0
    assert tree.best.branch.outcome == 1.0


@pytest.mark.parametrize(("weight", "best"), [(0.0, ("b", "x")), (1.0, ("c", "x"))])
def test_progress_weight_prefers_the_step_that_gained(weight, best):
    # promise .69 after .7 against .6 after .2: with weight 1 it is .68 against 1.0.
    game = {"t": {"b": {"x": 0.0}, "c": {"x": 1.0}}}
    draws = {(): ["b", "c"], ("b",): ["x"], ("c",): ["x"]}
    scores = {("b",): 0.7, ("c",): 0.2, ("b", "x"): 0.69, ("c", "x"): 0.6}
    (tree,), _, _ = search(game, draws, scores, width=2, actions=1, progress_weight=weight)
    assert path_of(tree.best.messages) == best
    # The first step has no progress: its score is its promise.
    assert [node.score for node in tree.nodes[:2]] == [0.7, 0.2]
    assert [node.score for node in tree.nodes[2:]] == pytest.approx([0.69 - 0.01 * weight, 0.6 + 0.4 * weight])


def test_a_search_that_ends_at_its_round_limit_has_no_outcome():
    (tree,), _, _ = search(GAME, DRAWS, SCORES, width=2, actions=2, max_rounds=1)
    assert path_of(tree.best.messages) == ("b",)
    assert not tree.best.branch.done
    assert tree_to_dict(tree)["outcome"] is None
    assert tree.rounds == 1


def test_a_branch_that_raises_is_counted_and_the_others_continue():
    game = {"t": {"a": ValueError("broken"), "b": {"x": 1.0}}}
    draws = {(): ["a", "b"], ("b",): ["x"]}
    scores = {("a",): 0.9, ("b",): 0.1, ("b", "x"): 0.2}
    (tree,), _, _ = search(game, draws, scores, width=2, actions=1)
    assert tree.best.branch.outcome == 1.0
    broken = tree_to_dict(tree)["nodes"][0]
    assert (broken["kept"], broken["done"], broken["outcome"], broken["observation"]) == (True, True, 0.0, None)
    assert tree.nodes[0].branch.error == "ValueError: broken"


def test_where_every_branch_raises_the_search_ends_without_success():
    game = {"t": {"a": ValueError("first"), "b": ValueError("second")}}
    (tree,), _, _ = search(game, {(): ["a", "b"]}, {("a",): 0.1, ("b",): 0.9}, width=1, actions=2)
    assert (tree.best.branch.outcome, tree.best.branch.error) == (0.0, "ValueError: second")


@pytest.mark.parametrize("fork", ["clone", "replay"])
def test_candidates_that_the_policy_failed_to_give_are_left_out_and_counted(fork):
    """The golden tree without b: a and c are kept, and c/f/g is found all the same."""
    scores = SCORES | {("a", "x"): 0.2}
    draws = DRAWS | {("a",): ["x", "x"]}
    (tree,), _, _ = search(GAME, draws, scores, width=2, actions=2, fork=fork, fail={"b"})
    assert paths(tree.nodes)[:2] == [("a",), ("c",)]
    assert (tree.proposed, tree.failed, tree.generated) == (4 + 4 + 2, 1, 27)
    assert tree.best.branch.actions == ("c", "f", "g")
    assert tree.best.branch.error is None


@pytest.mark.parametrize("fork", ["clone", "replay"])
def test_a_path_without_candidates_ranks_last(fork):
    # c has the better score, and nothing follows it; b/e/x and b/d remain.
    draws = DRAWS | {("c",): ["f", "f"], ("b", "e"): ["x"]}
    scores = SCORES | {("c",): 0.9, ("b", "e", "x"): 0.1}
    (tree,), factory, _ = search(GAME, draws, scores, width=2, actions=2, fork=fork, fail={"f"})
    assert path_of(tree.best.messages) == ("b", "d")
    (ended,) = [node for node in tree.nodes if node.branch.error is not None]
    assert (ended.branch.actions, ended.branch.done, ended.branch.outcome) == (("c",), True, 0.0)
    assert ended.branch.error == "policy: no f today"
    assert tree.failed == 2
    assert tree_to_dict(tree)["nodes"][ended.id - 1]["observation"] == "at c"
    assert len(factory.environments) == 1  # the environment did not fail and is used again


@pytest.mark.parametrize("fork", ["clone", "replay", "none"])
def test_a_task_for_which_the_policy_gives_nothing_fails_and_others_continue(fork):
    games = {"lost": {"a": 1.0}, "won": {"a": 1.0}}
    trees, factory, policy = search(
        games,
        lambda task, path: ["fails"] if task == "lost" else ["a"],
        {("a",): 0.5},
        width=1,
        actions=2,
        fork=fork,
        fail={"fails"},
    )
    lost, won = trees
    assert (lost.best.id, lost.best.branch.outcome, lost.best.branch.error) == (0, 0.0, "policy: no fails today")
    assert (lost.failed, lost.rounds, lost.nodes) == (2, 1, [])
    assert (won.best.branch.outcome, won.failed) == (1.0, 0)
    assert policy.calls == [(2, 2)]


def test_a_task_that_cannot_start_costs_that_task_only():
    games = {"bad": OSError("no server"), "good": {"a": 1.0}}
    (bad, good), _, _ = search(games, {(): ["a"]}, {("a",): 0.5}, width=1, actions=1)
    assert (bad.best.branch.error, bad.best.branch.outcome, bad.nodes) == ("OSError: no server", 0.0, [])
    assert tree_to_dict(bad) == {"task": "bad", "outcome": 0.0, "prompt": "", "best": 0, "nodes": []}
    assert good.best.branch.outcome == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_stops_the_search(bad):
    with pytest.raises(UserError, match="golden"):
        search(GAME, DRAWS, SCORES | {("c", "f"): bad}, width=2, actions=2)


# Random trees of 1 to 3 actions a state; scores on a coarse grid, so that ties are common.
LEAF = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def grown(deeper):
    return st.lists(deeper, min_size=1, max_size=3).map(lambda states: dict(zip("pqr", states, strict=False)))


TREE = grown(st.recursive(LEAF, grown, max_leaves=5))
SEED = st.integers(0, 10**6)


def children(game, path):
    for action in path:
        game = game[action]
    return list(game) if isinstance(game, dict) else []


def leaves(game):
    return [value for child in game.values() for value in leaves(child)] if isinstance(game, dict) else [game]


def depth(game):
    return 1 + max(map(depth, game.values())) if isinstance(game, dict) else 0


def coarse(seed):
    """A score in {0, .2, ..., 1} for every path, the same when asked again."""
    return lambda path: (hash((seed, *map(ord, "".join(path)))) % 6) / 5


def at(game, path):
    for action in path:
        game = game[action]
    return game


def naive_beam(game, score, width, actions):
    """The frontier after every round, recomputed from sorted paths."""
    frontier, rounds = [()], []
    while any(isinstance(at(game, path), dict) for path in frontier):
        finished = [path for path in frontier if not isinstance(at(game, path), dict)]
        new = []
        for path in frontier:
            here = children(game, path)
            draws = (width * actions if not rounds else actions) if here else 0
            for index in range(draws):
                if (candidate := (*path, here[index % len(here)])) not in new:
                    new.append(candidate)
        ranked = sorted(enumerate([*finished, *new]), key=lambda item: (-score(item[1]), item[0]))
        frontier = [path for _, path in ranked[:width]]
        rounds.append(frontier)
    return rounds


@given(game=TREE, seed=SEED, width=st.integers(1, 4), actions=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_beam_search_equals_a_naive_one(game, seed, width, actions):
    frontiers = []
    (tree,), factory, _ = search(
        {"t": game},
        lambda task, path: children(game, path),
        coarse(seed),
        width=width,
        actions=actions,
        on_round=lambda trees: frontiers.append(paths(trees[0].frontier)),
    )
    expected = naive_beam(game, coarse(seed), width, actions)
    assert frontiers == expected
    best = max(expected[-1], key=coarse(seed))
    assert path_of(tree.best.messages) == best
    assert tree.best.branch.outcome == at(game, best)
    executed = factory.environments[0].executed
    assert len(executed) == len(set(executed)) == sum(node.kept for node in tree.nodes)


@given(game=TREE, seed=SEED, fork=st.sampled_from(["clone", "replay"]))
@settings(max_examples=100, deadline=None)
def test_an_exhaustive_beam_finds_what_exhaustive_search_finds(game, seed, fork):
    def score(path):
        value = at(game, path)
        return value if isinstance(value, float) else coarse(seed)(path)

    (tree,), _, _ = search(
        {"t": game}, lambda task, path: children(game, path), score, width=len(leaves(game)), actions=3, fork=fork
    )
    assert tree.best.branch.outcome == max(leaves(game))
    assert all(node.kept for node in tree.nodes)
    assert tree.rounds == depth(game)


@given(game=TREE, fork=st.sampled_from(["clone", "replay", "none"]))
@settings(max_examples=100, deadline=None)
def test_true_values_need_no_width(game, fork):
    (tree,), _, _ = search(
        {"t": game},
        lambda task, path: children(game, path),
        lambda path: max(leaves(at(game, path))),
        width=1,
        actions=3,
        fork=fork,
    )
    assert tree.best.branch.outcome == max(leaves(game))


@given(game=TREE, seed=SEED, actions=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_width_one_is_step_wise_best_of_k(game, seed, actions):
    (tree,), factory, _ = search(
        {"t": game}, lambda task, path: children(game, path), coarse(seed), width=1, actions=actions, fork="none"
    )
    path = ()
    while isinstance(at(game, path), dict):
        drawn = [(*path, action) for action in children(game, path)[:actions]]
        path = max(drawn, key=coarse(seed))
    assert path_of(tree.best.messages) == path
    # It never needed a second branch: the environment was stepped along one path, without a reset.
    executed = [step for environment in factory.environments for step in environment.executed]
    assert executed == [path[:length] for length in range(1, len(path) + 1)]


@given(games=st.lists(TREE, min_size=2, max_size=4), seed=SEED, width=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_search_of_a_task_does_not_depend_on_other_tasks(games, seed, width):
    named = {f"t{index}": game for index, game in enumerate(games)}

    def run(tasks):
        trees, _, _ = search(
            named, lambda task, path: children(named[task], path), coarse(seed), width=width, actions=2, tasks=tasks
        )
        return {tree.task: (tree_to_dict(tree), tree.proposed, tree.merged, tree.rounds) for tree in trees}

    together = run(list(named))
    for task in named:
        assert run([task]) == {task: together[task]}


def test_one_call_to_policy_and_scorer_a_round_serves_all_tasks():
    games = {"short": {"a": 1.0}, "long": {"a": {"a": {"a": 1.0}}}}
    runner = BranchRunner(lambda: TreeGame(games))
    policy, scorer = ScriptedPolicy(lambda task, path: ["a"]), ScriptedScorer(lambda path: 0.5)
    beam_search(list(games), runner, policy, scorer, width=2, actions=2, temperature=1.0, max_rounds=9)
    assert policy.calls == [(2, 4), (1, 2), (1, 2)]
    assert scorer.calls == 3


def test_a_diverse_beam_keeps_a_path_of_every_group_of_draws():
    # Groups of two draws: a .9 and b .8, c .1 and d .2. A plain beam keeps a and b, a diverse one a and d. Then d's
    # own candidates compete only with each other: d/y .05 is kept next to a/x .7, and a/z .6 is dropped.
    game = {"t": {"a": {"x": 0.0, "z": 0.0}, "b": {"x": 0.0}, "c": {"x": 0.0}, "d": {"x": 0.0, "y": 1.0}}}
    draws = {(): ["a", "b", "c", "d"], ("a",): ["x", "z"], ("b",): ["x"], ("d",): ["x", "y"]}
    scores = {("a",): 0.9, ("b",): 0.8, ("c",): 0.1, ("d",): 0.2, ("a", "x"): 0.7, ("a", "z"): 0.6, ("b", "x"): 0.5}
    scores |= {("d", "x"): 0.01, ("d", "y"): 0.05}
    frontiers = {False: [], True: []}
    for diverse, rounds in frontiers.items():
        search(
            game,
            draws,
            scores,
            width=2,
            actions=2,
            diverse=diverse,
            on_round=lambda trees, rounds=rounds: rounds.append(paths(trees[0].frontier)),
        )
    assert frontiers[False] == [[("a",), ("b",)], [("a", "x"), ("a", "z")]]
    assert frontiers[True] == [[("a",), ("d",)], [("a", "x"), ("d", "y")]]


def test_a_group_without_own_draws_gets_the_best_remaining_candidate():
    # Draws a b a a: the second group has no distinct draw, so b is kept, and becomes a search of its own.
    game = {"t": {"a": {"x": 0.0}, "b": {"y": 1.0}}}
    draws = {(): ["a", "b", "a", "a"], ("a",): ["x"], ("b",): ["y"]}
    scores = {("a",): 0.9, ("b",): 0.1, ("a", "x"): 0.3, ("b", "y"): 0.2}
    (tree,), _, _ = search(game, draws, scores, width=2, actions=2, diverse=True)
    assert paths(tree.frontier) == [("a", "x"), ("b", "y")]
    assert path_of(tree.best.messages) == ("a", "x")
