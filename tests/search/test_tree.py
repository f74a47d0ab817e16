"""Limits that stop a search early, its answer then, and token counts of a tree."""

import numpy as np
import pytest

from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.mcts import tree_search
from jaxprm.search.tree import Prices, SearchLimits, tokens_read, tree_to_dict
from tests.search.fakes import Factory, ScriptedPolicy, ScriptedScorer, TreeGame, path_of

GAME = {"t": {"a": {"b": {"c": 1.0}}, "x": 0.5}}
DRAWS = {(): ["a", "x"], ("a",): ["b"], ("a", "b"): ["c"]}
SCORES = {("a",): 0.8, ("x",): 0.6, ("a", "b"): 0.9, ("a", "b", "c"): 0.95}


def run(limits, how=beam_search, draws=DRAWS, scorer=None, **options):
    runner = BranchRunner(Factory(lambda: TreeGame(GAME)))
    policy = ScriptedPolicy(lambda task, path: draws[path])
    options = {"width": 2} | options if how is beam_search else options
    options = {"actions": 1, "temperature": 1.0, "max_rounds": 9, "limits": limits} | options
    (tree,) = how(["t"], runner, policy, scorer or ScriptedScorer(SCORES), **options)
    runner.close()
    return tree, policy


@pytest.mark.parametrize("how", [beam_search, tree_search])
def test_a_candidate_that_cannot_be_scored_costs_only_itself(how):
    class Scorer(ScriptedScorer):
        def score_actions(self, states, candidates):
            scores = super().score_actions(states, candidates)
            return [
                np.where([text == "bad" for text in texts], -np.inf, values)
                for values, texts in zip(scores, candidates, strict=True)
            ]

        def refusal(self, state, candidate):
            return "candidate 0: a byte" if candidate == "bad" else None

    draws = DRAWS | {(): ["bad", "a", "x"], ("a", "b"): ["bad", "bad", "c"]}
    scorer = Scorer(SCORES | {("bad",): 0.0, ("a", "b", "bad"): 0.0})
    sizes = {"width": 1} if how is beam_search else {"simulations": 4}
    tree, _ = run(SearchLimits(), how, draws=draws, scorer=scorer, actions=3, **sizes)
    assert tree.best.branch.outcome == 1.0 and tree.unscored == 2
    failed = [node for node in tree.nodes if node.error is not None]
    assert [node.action for node in failed] == ["bad", "bad"] and not any(node.kept for node in failed)
    written = [node for node in tree_to_dict(tree)["nodes"] if "error" in node]
    assert [node["error"] for node in written] == ["candidate 0: a byte"] * 2
    # What was not read costs nothing.
    read = []
    for node in tree.nodes:
        node.counted = None
    tokens_read(tree, lambda messages: read.append(messages[-1]["content"]) or 0)
    assert read and "bad" not in read


def test_a_path_of_which_no_action_can_be_scored_ends_with_the_reason():
    class Scorer(ScriptedScorer):
        def score_actions(self, states, candidates):
            return [np.full(len(texts), -np.inf) for texts in candidates]

        def refusal(self, state, candidate):
            return "candidate 0: a byte"

    tree, _ = run(SearchLimits(), scorer=Scorer({}))
    assert tree.best.branch.error == "scorer: candidate 0: a byte" and tree.best.score == -np.inf


def spent(tree, policy, prices=Prices()):
    return prices.generated * tree.generated + prices.read * tokens_read(tree, policy.count_tokens)


def test_without_limits_every_path_is_finished():
    tree, _ = run(SearchLimits())
    assert (tree.rounds, tree.ended, tree.best.branch.outcome) == (3, None, 1.0)


@pytest.mark.parametrize(("score", "rounds", "ended", "outcome"), [(0.6, 1, "score", 0.5), (0.61, 3, None, 1.0)])
def test_a_finished_path_that_is_good_enough_ends_the_search(score, rounds, ended, outcome):
    """Even if an open path has a higher score."""
    tree, _ = run(SearchLimits(score=score))
    assert (tree.rounds, tree.ended, tree.best.branch.outcome) == (rounds, ended, outcome)
    assert max(node.score for node in tree.frontier) == (0.8 if ended else 0.95)


def test_a_budget_is_checked_after_every_round():
    unlimited, policy = run(SearchLimits())
    costs = []
    for rounds in (1, 2, 3):
        tree, policy = run(SearchLimits(budget=1.0 if not costs else costs[-1] + 0.5))
        assert tree.rounds == rounds and tree.ended == ("budget" if rounds < 3 else None)
        costs.append(spent(tree, policy))
    assert costs == sorted(set(costs)) and costs[-1] == spent(unlimited, policy)
    # A budget that is spent exactly is reached.
    assert run(SearchLimits(budget=costs[0]))[0].rounds == 1


def test_a_search_without_budget_left_answers_with_its_best_finished_path():
    tree, _ = run(SearchLimits(budget=1.0))
    assert path_of(tree.best.messages) == ("x",)
    alone, _ = run(SearchLimits(budget=1.0), width=1)
    assert path_of(alone.best.messages) == ("a",) and alone.best.branch.outcome is None


def test_prices_are_the_costs_of_tokens():
    unlimited, policy = run(SearchLimits())
    dear = Prices(generated=1000.0, read=0.0)
    assert spent(unlimited, policy, dear) == 1000.0 * unlimited.generated
    # Two draws of three tokens in the first round, then one.
    assert run(SearchLimits(budget=6000.0, prices=dear))[0].rounds == 1
    assert run(SearchLimits(budget=6001.0, prices=dear))[0].rounds == 2
    assert run(SearchLimits(budget=1e9, prices=dear))[0].ended is None


def test_tokens_of_a_tree_are_counted_once():
    tree, policy = run(SearchLimits())
    texts = {(): "play t", ("a",): "a" + "at a", ("x",): "x", ("a", "b"): "b" + "at a/b", ("a", "b", "c"): "c"}
    messages = {(): 1, ("a",): 2, ("x",): 1, ("a", "b"): 2, ("a", "b", "c"): 1}
    expected = sum(map(len, texts.values())) + sum(messages.values())
    assert tokens_read(tree, policy.count_tokens) == expected


def test_tree_search_ends_after_the_step_in_which_the_budget_was_spent():
    unlimited, policy = run(SearchLimits(), tree_search, simulations=2)
    assert unlimited.ended is None and unlimited.rounds == 3
    tree, _ = run(SearchLimits(budget=1.0), tree_search, simulations=2)
    assert tree.ended == "budget" and tree.rounds == 1 and tree.best.branch.outcome is None
