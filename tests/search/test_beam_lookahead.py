"""Lookahead on a tree where what looks best leads nowhere, worked out by hand."""

import pytest

from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.tree import tokens_read, tree_to_dict
from tests.search.fakes import Factory, ScriptedPolicy, ScriptedScorer, TreeGame, path_of

# After "a", which looks best, there is only "p", which does not; "b" leads to "q" and on to "r".
GAME = {"t": {"a": {"p": {"x": 0.0}}, "b": {"q": {"r": 1.0}}, "c": 0.5}}
DRAWS = {(): ["a", "b", "c"], ("a",): ["p"], ("a", "p"): ["x"], ("b",): ["q"], ("b", "q"): ["r"]}
SCORES = {
    ("a",): 0.9,
    ("b",): 0.5,
    ("c",): 0.6,
    ("a", "p"): 0.2,
    ("a", "p", "x"): 0.1,
    ("b", "q"): 0.7,
    ("b", "q", "r"): 0.65,
}


class Tempered(ScriptedPolicy):
    """Remembers the temperatures it was asked at."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.temperatures = []

    def propose(self, states, n, temperature):
        self.temperatures.append(temperature)
        return super().propose(states, n, temperature)


def search(ahead, *, game=GAME, fork="clone", fail=(), scores=SCORES, width=1, **options):
    runner = BranchRunner(Factory(lambda: TreeGame(game, fork)))
    policy = Tempered(lambda task, path: DRAWS[path], fail=fail)
    (tree,) = beam_search(
        ["t"],
        runner,
        policy,
        ScriptedScorer(scores),
        width=width,
        actions=3,
        temperature=1.0,
        max_rounds=5,
        ahead=ahead,
        **options,
    )
    runner.close()
    return tree, policy, runner


def looked(tree):
    return {path_of(node.messages): node.lookahead_value for node in tree.nodes if node.lookahead_value is not None}


@pytest.mark.parametrize("fork", ["clone", "replay"])
def test_without_it_the_search_is_led_astray_and_one_step_ahead_mends_it(fork):
    blind, _, _ = search(0, fork=fork)
    assert path_of(blind.best.messages) == ("a", "p", "x") and blind.best.branch.outcome == 0.0
    tree, _, _ = search(1, fork=fork)
    # "a" is worth what "p" is, "b" what "q" is, and "c" is over: it is worth itself.
    assert {path: score for path, score in looked(tree).items() if len(path) == 1} == {
        ("a",): 0.2,
        ("b",): 0.7,
        ("c",): 0.6,
    }
    assert path_of(tree.best.messages) == ("b", "q", "r") and tree.best.branch.outcome == 1.0


def test_promise_stays_the_actions_own():
    tree, _, _ = search(2)
    assert {path_of(n.messages): n.promise for n in tree.nodes if not n.is_lookahead} == {
        path: SCORES[path] for path in [("a",), ("b",), ("c",), ("b", "q"), ("b", "q", "r")]
    }
    # Two steps ahead, or as far as there is a way.
    assert looked(tree)[("a",)] == 0.1 and looked(tree)[("b",)] == 0.65 and looked(tree)[("b", "q", "r")] == 0.65


def test_the_way_ahead_is_the_likeliest_and_is_paid_for():
    tree, policy, runner = search(1)
    # Three rounds; in the third nothing is left to look at: every candidate of it is over.
    assert policy.temperatures == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert tree.generated == 3 * (3 + 2 + 3 + 1 + 3)
    executed = sum(node.executed for node in tree.nodes)
    # a, b, c, p and q ahead; q, r ahead; r.
    assert executed == runner.steps == 8
    everything = tokens_read(tree, policy.count_tokens)
    alone, _, _ = search(0, scores=SCORES | {("b",): 1.0})
    assert everything > tokens_read(alone, policy.count_tokens)


def test_the_page_shows_candidates_and_what_was_found_ahead_of_them():
    tree, _, _ = search(1)
    nodes = tree_to_dict(tree)["nodes"]
    assert [node["action"] for node in nodes] == ["a", "b", "c", "q", "r"]
    assert [node["kept"] for node in nodes] == [False, True, False, True, True]
    assert [node["looked"] for node in nodes] == [0.2, 0.7, 0.6, 0.65, 0.65]
    assert "looked" not in tree_to_dict(search(0)[0])["nodes"][0]


def test_where_the_way_on_is_lost_what_was_reached_counts():
    game = {"t": {"a": {"p": {"x": 0.0}}, "b": {"q": RuntimeError("a pit")}, "c": 0.5}}
    tree, _, _ = search(1, game=game)
    # Behind "b" is a pit: it is worth what it was.
    assert looked(tree) == {("a",): 0.2, ("b",): 0.5, ("c",): 0.6}
    assert path_of(tree.best.messages) == ("c",)
    tree, _, _ = search(1, fail={"q"})
    assert looked(tree)[("b",)] == 0.5


def test_a_candidate_that_raises_itself_ranks_last():
    game = {"t": {"a": RuntimeError("a pit"), "b": {"q": {"r": 1.0}}, "c": 0.5}}
    tree, _, _ = search(1, game=game, scores=SCORES | {("c",): 0.1})
    assert path_of(tree.best.messages) == ("b", "q", "r")
    assert ("a",) not in looked(tree)


def test_progress_is_the_candidates_own():
    tree, _, _ = search(1, progress_weight=2.0)
    scores = {path_of(node.messages): node.score for node in tree.nodes if not node.is_lookahead}
    assert scores[("b",)] == pytest.approx(0.7)
    assert scores[("b", "q")] == pytest.approx(0.65 + 2 * (0.7 - 0.5))
