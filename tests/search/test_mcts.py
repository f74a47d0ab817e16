"""Tree search on small trees: every selection, backup and step worked out by hand."""

import math

import pytest

from jaxprm.policies.protocol import Action
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.mcts import PuctSearch, tree_search
from jaxprm.search.tree import tree_to_dict
from tests.search.fakes import Factory, ScriptedPolicy, ScriptedScorer, TreeGame, path_of

GAME = {"t": {"a": {"x": 0.0, "y": 0.25}, "b": 0.5}}
DRAWS = {(): ["a", "b"], ("a",): ["x", "y"]}
SCORES = {("a",): 0.6, ("b",): 0.5, ("a", "x"): 0.2, ("a", "y"): 0.4}


class PolicyWithProbabilities(ScriptedPolicy):
    """A policy that returns the probability of each text."""

    def __init__(self, script, chances):
        super().__init__(script)
        self._chances = chances

    def _draw(self, state, index):
        action = super()._draw(state, index)
        return action._replace(log_probability=math.log(self._chances[action.text]))


def search(games=GAME, draws=DRAWS, scores=SCORES, *, policy=None, tasks=("t",), fork="clone", **options):
    factory = Factory(lambda: TreeGame(games, fork=fork))
    policy = policy or ScriptedPolicy(lambda task, path: draws[path])
    options = {"simulations": 3, "actions": 2, "temperature": 1.0, "max_rounds": 9} | options
    runner = BranchRunner(factory)
    return tree_search(list(tasks), runner, policy, ScriptedScorer(scores), **options), factory, policy


def test_the_golden_tree_is_searched_as_worked_out_by_hand(monkeypatch):
    seen = []
    back_up = PuctSearch.back_up

    def spy(search, path):
        back_up(search, path)
        leaf = path[-1]
        seen.append((path_of(leaf.messages), search.visits[leaf.id], search.value(leaf)))

    monkeypatch.setattr(PuctSearch, "back_up", spy)
    (tree,), factory, policy = search()
    # 1: the start is expanded, worth (.6 + .5) / 2. 2: a, as .6 + .5 > .5 + .5; worth (.2 + .4) / 2. 3: b, as
    # .5 + .5 sqrt 2 > .3 + .5 sqrt 2 / 2; it ends, worth its promise. Each was visited once, and .5 > .3: b is taken.
    assert [(path, visits, pytest.approx(value)) for path, visits, value in seen] == [
        ((), 1, 0.55),
        (("a",), 1, 0.3),
        (("b",), 1, 0.5),
    ]
    assert path_of(tree.best.messages) == ("b",)
    assert (tree.best.branch.outcome, tree.rounds, tree.proposed) == (0.5, 1, 4)
    assert factory.environments[0].executed == [("a",), ("b",)]
    assert policy.calls == [(1, 2), (1, 2)]


def test_a_greedy_search_of_the_same_tree_is_led_astray():
    (tree,) = beam_search(
        ["t"],
        BranchRunner(lambda: TreeGame(GAME)),
        ScriptedPolicy(lambda task, path: DRAWS[path]),
        ScriptedScorer(SCORES),
        width=1,
        actions=2,
        temperature=1.0,
        max_rounds=9,
    )
    assert path_of(tree.best.messages) == ("a", "y")


def test_what_was_searched_below_the_step_taken_is_used_again():
    """One simulation a step: the start is expanded, a taken by its promise, expanded in turn, and y taken."""
    (tree,), factory, policy = search(simulations=1)
    assert path_of(tree.best.messages) == ("a", "y")
    assert factory.environments[0].executed == [("a",), ("a", "y")]
    assert policy.calls == [(1, 2), (1, 2)]


@pytest.mark.parametrize(("chance", "second"), [(0.9, ("a",)), (0.2, ("b",))])
def test_probabilities_of_the_policy_are_priors(chance, second):
    # Second simulation: .6 + p against .5 + (1 - p): 1.5 against .6, and .8 against 1.3.
    policy = PolicyWithProbabilities(lambda task, path: DRAWS[path], {"a": chance, "b": 1 - chance, "x": 0.5, "y": 0.5})
    _, factory, _ = search(policy=policy, simulations=2)
    assert factory.environments[0].executed[0] == second


def test_priors_are_shares_of_the_draws_otherwise():
    """b was drawn twice of three times: .6 + 1/3 against .5 + 2/3."""
    _, factory, _ = search(draws=DRAWS | {(): ["a", "b", "b"]}, actions=3, simulations=2)
    assert factory.environments[0].executed[0] == ("b",)


def test_a_branch_that_raises_is_worth_nothing_and_counted():
    games = {"t": {"a": ValueError("broken"), "b": {"x": 1.0}}}
    draws, scores = {(): ["a", "b"], ("b",): ["x"]}, {("a",): 0.9, ("b",): 0.2, ("b", "x"): 0.2}
    (tree,), _, _ = search(games, draws, scores, simulations=8)
    assert tree.best.branch.outcome == 1.0
    broken = tree_to_dict(tree)["nodes"][0]
    assert (broken["kept"], broken["done"], broken["outcome"]) == (True, True, 0.0)


def test_a_policy_without_candidates_ends_the_path():
    policy = ScriptedPolicy(lambda task, path: DRAWS[path])
    policy._draw = lambda state, index: Action("", 0, None, "error", error="no server")
    (tree,), _, _ = search(policy=policy)
    assert (tree.best.branch.done, tree.best.branch.outcome) == (True, 0.0)
    assert "no server" in tree.best.branch.error


@pytest.mark.parametrize("fork", ["clone", "replay"])
def test_tasks_side_by_side_are_searched_as_alone(fork):
    games = GAME | {"u": {"a": {"y": 1.0, "x": {"p": 0.0}}, "b": {"x": 0.0}}}
    draws = DRAWS | {("b",): ["x"], ("a", "x"): ["p"]}
    scores = SCORES | {("b", "x"): 0.1, ("a", "x", "p"): 0.9}
    together, _, policy = search(games, draws, scores, tasks=("t", "u"), fork=fork, simulations=4)
    assert policy.calls[0] == (2, 2)
    for tree in together:
        (alone,), _, _ = search(games, draws, scores, tasks=(tree.task,), fork=fork, simulations=4)
        assert tree_to_dict(alone) == tree_to_dict(tree)
