"""Lookahead on a tree whose best first action leads nowhere, worked out by hand."""

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
    """Records the temperatures of its calls."""

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


def lookahead_values(tree):
    return {path_of(node.messages): node.lookahead_value for node in tree.nodes if node.lookahead_value is not None}


@pytest.mark.parametrize("fork", ["clone", "replay"])
def test_one_step_of_lookahead_corrects_a_misled_search(fork):
    blind, _, _ = search(0, fork=fork)
    assert path_of(blind.best.messages) == ("a", "p", "x") and blind.best.branch.outcome == 0.0
    tree, _, _ = search(1, fork=fork)
    # "a" is worth what "p" is, "b" what "q" is, and "c" is over: it is worth itself.
    assert {path: score for path, score in lookahead_values(tree).items() if len(path) == 1} == {
        ("a",): 0.2,
        ("b",): 0.7,
        ("c",): 0.6,
    }
    assert path_of(tree.best.messages) == ("b", "q", "r") and tree.best.branch.outcome == 1.0


def test_lookahead_does_not_change_the_promise():
    tree, _, _ = search(2)
    assert {path_of(n.messages): n.promise for n in tree.nodes if not n.is_lookahead} == {
        path: SCORES[path] for path in [("a",), ("b",), ("c",), ("b", "q"), ("b", "q", "r")]
    }
    # Two steps ahead, or to the end of the path.
    assert (
        lookahead_values(tree)[("a",)] == 0.1
        and lookahead_values(tree)[("b",)] == 0.65
        and lookahead_values(tree)[("b", "q", "r")] == 0.65
    )


def test_lookahead_is_greedy_and_its_cost_is_counted():
    tree, policy, runner = search(1)
    # Three rounds; in the third every candidate is done, so there is nothing to look ahead to.
    assert policy.temperatures == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert tree.generated == 3 * (3 + 2 + 3 + 1 + 3)
    executed = sum(node.executed for node in tree.nodes)
    # a, b, c, p and q ahead; q, r ahead; r.
    assert executed == runner.steps == 8
    everything = tokens_read(tree, policy.count_tokens)
    alone, _, _ = search(0, scores=SCORES | {("b",): 1.0})
    assert everything > tokens_read(alone, policy.count_tokens)


def test_the_dict_of_a_tree_has_candidates_with_their_lookahead_values():
    tree, _, _ = search(1)
    nodes = tree_to_dict(tree)["nodes"]
    assert [node["action"] for node in nodes] == ["a", "b", "c", "q", "r"]
    assert [node["kept"] for node in nodes] == [False, True, False, True, True]
    assert [node["looked"] for node in nodes] == [0.2, 0.7, 0.6, 0.65, 0.65]
    assert "looked" not in tree_to_dict(search(0)[0])["nodes"][0]


def test_if_lookahead_fails_the_last_action_reached_counts():
    game = {"t": {"a": {"p": {"x": 0.0}}, "b": {"q": RuntimeError("a pit")}, "c": 0.5}}
    tree, _, _ = search(1, game=game)
    # After "b" the environment raises: "b" keeps its own promise.
    assert lookahead_values(tree) == {("a",): 0.2, ("b",): 0.5, ("c",): 0.6}
    assert path_of(tree.best.messages) == ("c",)
    tree, _, _ = search(1, fail={"q"})
    assert lookahead_values(tree)[("b",)] == 0.5


def test_a_candidate_that_raises_itself_ranks_last():
    game = {"t": {"a": RuntimeError("a pit"), "b": {"q": {"r": 1.0}}, "c": 0.5}}
    tree, _, _ = search(1, game=game, scores=SCORES | {("c",): 0.1})
    assert path_of(tree.best.messages) == ("b", "q", "r")
    assert ("a",) not in lookahead_values(tree)


def test_lookahead_does_not_change_progress():
    tree, _, _ = search(1, progress_weight=2.0)
    scores = {path_of(node.messages): node.score for node in tree.nodes if not node.is_lookahead}
    assert scores[("b",)] == pytest.approx(0.7)
    assert scores[("b", "q")] == pytest.approx(0.65 + 2 * (0.7 - 0.5))
