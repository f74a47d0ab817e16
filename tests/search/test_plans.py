"""Searches by name: their files, what they depend on, and that each is run, resumed and counted."""

import msgspec
import pytest

from jaxprm import config, files
from jaxprm.errors import UserError
from jaxprm.search.methods import SEARCHES, guided_search, search_specs
from jaxprm.search.tree import Prices
from tests.search.fakes import ScriptedScorer, SeededPolicy, Walk

SETTINGS = config.SearchConfig(
    beams=((2, 2),), stepwise=(3,), diverse=((2, 3),), lookahead=((2, 2, 1),), mcts=((4, 3),), trees=1
)
FORKING = [*(SEARCHES[kind].spec(2, 2) for kind in ("beam", "diverse", "mcts")), SEARCHES["lookahead"].spec(1, 2, 1)]
TASKS = ["walk/test/0", "walk/test/1", "walk/test/2"]


class CountingScorer(ScriptedScorer):
    """Scores progress up the walk; reads one token a candidate."""

    def __init__(self):
        super().__init__(lambda path: sum({"up": 1, "down": -1}.get(step, 0) for step in path) / 3)

    def score_actions(self, states, candidates):
        self.usage["encoded"] += sum(map(len, candidates))
        return super().score_actions(states, candidates)


def run(spec, output, policy=None, settings=SETTINGS):
    options = {"settings": settings, "spec": spec, "label": "", "about": {}}
    return guided_search(Walk, policy or SeededPolicy(), CountingScorer(), TASKS, output, **options)


def lines_of(path):
    return list(files.whole_lines(path))


def test_files_of_searches_are_named_by_kind_and_size():
    names = [spec.file_name("agentprm", 1) for spec in search_specs(SETTINGS)]
    assert names == [
        f"{name}-agentprm-1" for name in ("beam-2x2", "stepwise-3", "diverse-2x3", "lookahead-2x2x1", "mcts-4x3")
    ]
    assert SEARCHES["beam"].spec(1, 3).file_name("orm", 0) == "stepwise-3-orm-0"
    searches = ["beam 2x2", "stepwise 3", "diverse 2x3", "lookahead 2x2x1", "mcts 4x3"]
    assert [spec.at for spec in search_specs(SETTINGS)] == searches


def test_a_search_depends_on_what_changes_it_and_no_search_on_what_is_anothers():
    beam, _, diverse, lookahead, mcts = (spec.inputs(SETTINGS) for spec in search_specs(SETTINGS))
    assert beam == {"width": 2, "actions": 2, "progress_weight": 0.0, "trees": 1}
    assert diverse["kind"] == "diverse" and mcts["exploration"] == 1.0 and lookahead["ahead"] == 1
    limited = msgspec.structs.replace(SETTINGS, stop_at=0.9, budget=500.0)
    assert search_specs(limited)[0].inputs(limited) == beam | {"stop_at": 0.9, "budget": 500.0, "budget_unit": "tokens"}


@pytest.mark.parametrize("spec", search_specs(SETTINGS), ids=lambda spec: spec.at)
def test_every_search_goes_up_and_is_counted(spec, tmp_path):
    lines = lines_of(run(spec, tmp_path / "out.jsonl"))
    assert [line["task"] for line in lines] == TASKS
    assert all(line["outcome"] == 1.0 for line in lines)
    assert ["tree" in line for line in lines] == [True, False, False]
    candidates = sum(line["proposed"] - line["merged"] for line in lines)
    assert sum(line["reward_encoded"] for line in lines) == pytest.approx(candidates)
    assert all(line["environment_steps"] >= 3 for line in lines)


def test_a_search_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxprm.search.methods.TASKS_AT_ONCE", 1)
    spec = SEARCHES["mcts"].spec(4, 3)
    policy = SeededPolicy()
    whole = lines_of(run(spec, tmp_path / "whole.jsonl", policy))
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "out.jsonl", SeededPolicy(stop_after=len(policy.calls) // 2))
    done = lines_of(tmp_path / "out.jsonl.partial")
    assert 0 < len(done) < 3
    assert lines_of(run(spec, tmp_path / "out.jsonl")) == whole


@pytest.mark.parametrize("spec", FORKING, ids=lambda spec: spec.at)
def test_a_search_that_needs_branches_is_refused_where_there_is_one(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(Walk, "fork", "none")
    with pytest.raises(UserError, match=spec.at):
        run(spec, tmp_path / "out.jsonl")


def test_limits_end_a_search_and_the_line_says_so(tmp_path):
    spec = SEARCHES["beam"].spec(2, 2)
    whole = lines_of(run(spec, tmp_path / "whole.jsonl"))
    assert not any("ended" in line for line in whole)
    poor = lines_of(run(spec, tmp_path / "poor.jsonl", settings=msgspec.structs.replace(SETTINGS, budget=1.0)))
    assert [(line["ended"], line["rounds"], line["outcome"]) for line in poor] == [("budget", 1, 0.0)] * 3
    # Budgets in another unit have other prices.
    settings = msgspec.structs.replace(SETTINGS, budget=1.0, budget_unit="flops")
    options = {"settings": settings, "spec": spec, "label": "", "about": {}, "prices": Prices(1e-6, 1e-6)}
    cheap = guided_search(Walk, SeededPolicy(), CountingScorer(), TASKS, tmp_path / "cheap.jsonl", **options)
    assert lines_of(cheap) == whole


def test_one_simulation_is_step_wise_best_of_k(tmp_path, monkeypatch):
    """It needs no second branch."""
    monkeypatch.setattr(Walk, "fork", "none")
    greedy = lines_of(run(SEARCHES["stepwise"].spec(3), tmp_path / "greedy.jsonl"))
    tree = lines_of(run(SEARCHES["mcts"].spec(1, 3), tmp_path / "tree.jsonl"))
    assert [line["outcome"] for line in tree] == [line["outcome"] for line in greedy]
    assert [line["environment_steps"] for line in tree] == [line["environment_steps"] for line in greedy]
