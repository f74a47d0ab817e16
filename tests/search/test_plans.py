"""Searches by name: their files, what they depend on, and that each is run, resumed and counted."""

import pytest

from jaxprm import config, files
from jaxprm.errors import UserError
from jaxprm.search.methods import guided_search
from jaxprm.search.plans import Plan, plans
from tests.search.fakes import ScriptedScorer, SeededPolicy, Walk

SETTINGS = config.Search(beams=((2, 2),), stepwise=(3,), diverse=((2, 3),), mcts=((4, 3),), trees=1)
TASKS = ["walk/test/0", "walk/test/1", "walk/test/2"]


class CountingScorer(ScriptedScorer):
    """Scores progress up the walk; reads one token a candidate."""

    def __init__(self):
        super().__init__(lambda path: sum({"up": 1, "down": -1}.get(step, 0) for step in path) / 3)

    def score_actions(self, states, candidates):
        self.usage["encoded"] += sum(map(len, candidates))
        return super().score_actions(states, candidates)


def run(plan, output, policy=None, settings=SETTINGS):
    options = {"settings": settings, "plan": plan, "label": "", "about": {}}
    return guided_search(Walk, policy or SeededPolicy(), CountingScorer(), TASKS, output, **options)


def lines_of(path):
    return list(files.whole_lines(path))


def test_files_of_searches_are_named_by_kind_and_size():
    names = [plan.file_name("agentprm", 1) for plan in plans(SETTINGS)]
    assert names == ["beam-2x2-agentprm-1", "stepwise-3-agentprm-1", "diverse-2x3-agentprm-1", "mcts-4x3-agentprm-1"]
    assert Plan("beam", 1, 3).file_name("orm", 0) == "stepwise-3-orm-0"
    assert [plan.at for plan in plans(SETTINGS)] == ["beam 2x2", "stepwise 3", "diverse 2x3", "mcts 4x3"]


def test_a_search_depends_on_what_changes_it_and_no_search_on_what_is_anothers():
    beam, _, diverse, mcts = (plan.inputs(SETTINGS) for plan in plans(SETTINGS))
    assert beam == {"width": 2, "actions": 2, "progress_weight": 0.0, "trees": 1}
    assert diverse["kind"] == "diverse" and mcts["exploration"] == 1.0


@pytest.mark.parametrize("plan", plans(SETTINGS), ids=lambda plan: plan.at)
def test_every_search_goes_up_and_is_counted(plan, tmp_path):
    lines = lines_of(run(plan, tmp_path / "out.jsonl"))
    assert [line["task"] for line in lines] == TASKS
    assert all(line["outcome"] == 1.0 for line in lines)
    assert ["tree" in line for line in lines] == [True, False, False]
    candidates = sum(line["proposed"] - line["merged"] for line in lines)
    assert sum(line["reward_encoded"] for line in lines) == pytest.approx(candidates)
    assert all(line["environment_steps"] >= 3 for line in lines)


def test_a_search_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxprm.search.methods.TASKS_AT_ONCE", 1)
    plan = Plan("mcts", 4, 3)
    policy = SeededPolicy()
    whole = lines_of(run(plan, tmp_path / "whole.jsonl", policy))
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out.jsonl", SeededPolicy(stop_after=len(policy.calls) // 2))
    done = lines_of(tmp_path / "out.jsonl.partial")
    assert 0 < len(done) < 3
    assert lines_of(run(plan, tmp_path / "out.jsonl")) == whole


@pytest.mark.parametrize("kind", ["beam", "diverse", "mcts"])
def test_a_search_that_needs_branches_is_refused_where_there_is_one(kind, tmp_path, monkeypatch):
    plan = Plan(kind, 2, 2)
    monkeypatch.setattr(Walk, "fork", "none")
    with pytest.raises(UserError, match=plan.at):
        run(plan, tmp_path / "out.jsonl")


def test_one_simulation_is_step_wise_best_of_k(tmp_path, monkeypatch):
    """It needs no second branch."""
    monkeypatch.setattr(Walk, "fork", "none")
    greedy = lines_of(run(Plan("stepwise", 1, 3), tmp_path / "greedy.jsonl"))
    tree = lines_of(run(Plan("mcts", 1, 3), tmp_path / "tree.jsonl"))
    assert [line["outcome"] for line in tree] == [line["outcome"] for line in greedy]
    assert [line["environment_steps"] for line in tree] == [line["environment_steps"] for line in greedy]
