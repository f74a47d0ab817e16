"""The registry of searches: names, recorded inputs, running, resuming and counting, and a search from outside."""

import msgspec
import pytest

from jaxprm import config, files
from jaxprm.errors import UserError
from jaxprm.search import methods
from jaxprm.search.methods import SEARCHES, guided_search, search_specs
from jaxprm.search.tree import Prices
from tests.search import toy
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
    return list(files.complete_lines(path))


def test_files_of_searches_are_named_by_kind_and_size():
    names = [spec.file_name("agentprm", 1) for spec in search_specs(SETTINGS)]
    assert names == [
        f"{name}-agentprm-1" for name in ("beam-2x2", "stepwise-3", "diverse-2x3", "lookahead-2x2x1", "mcts-4x3")
    ]
    assert SEARCHES["beam"].spec(1, 3).file_name("orm", 0) == "stepwise-3-orm-0"
    searches = ["beam 2x2", "stepwise 3", "diverse 2x3", "lookahead 2x2x1", "mcts 4x3"]
    assert [spec.at for spec in search_specs(SETTINGS)] == searches


def test_a_search_records_only_the_settings_that_change_it():
    beam, _, diverse, lookahead, mcts = (spec.inputs(SETTINGS) for spec in search_specs(SETTINGS))
    assert beam == {"width": 2, "actions": 2, "progress_weight": 0.0, "trees": 1}
    assert diverse["kind"] == "diverse" and mcts["exploration"] == 1.0 and lookahead["ahead"] == 1
    limited = msgspec.structs.replace(SETTINGS, stop_at=0.9, budget=500.0)
    assert search_specs(limited)[0].inputs(limited) == beam | {"stop_at": 0.9, "budget": 500.0, "budget_unit": "tokens"}


@pytest.mark.parametrize("spec", search_specs(SETTINGS), ids=lambda spec: spec.at)
def test_every_search_solves_the_walk_and_is_counted(spec, tmp_path):
    lines = lines_of(run(spec, tmp_path / "out.jsonl"))
    assert [line["task"] for line in lines] == TASKS
    assert all(line["outcome"] == 1.0 for line in lines)
    assert ["tree" in line for line in lines] == [True, False, False]
    candidates = sum(line["proposed"] - line["merged"] for line in lines)
    assert sum(line["reward_encoded"] for line in lines) == pytest.approx(candidates)
    assert all(line["environment_steps"] >= 3 for line in lines)


def test_an_interrupted_search_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxprm.search.methods.TASKS_AT_ONCE", 1)
    spec = SEARCHES["mcts"].spec(4, 3)
    policy = SeededPolicy()
    complete = lines_of(run(spec, tmp_path / "complete.jsonl", policy))
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "out.jsonl", SeededPolicy(stop_after=len(policy.calls) // 2))
    done = lines_of(tmp_path / "out.jsonl.partial")
    assert 0 < len(done) < 3
    assert lines_of(run(spec, tmp_path / "out.jsonl")) == complete


@pytest.mark.parametrize("spec", FORKING, ids=lambda spec: spec.at)
def test_a_search_that_needs_branches_is_refused_without_forks(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(Walk, "fork", "none")
    with pytest.raises(UserError, match=spec.at):
        run(spec, tmp_path / "out.jsonl")


def test_a_limit_ends_a_search_and_is_recorded(tmp_path):
    spec = SEARCHES["beam"].spec(2, 2)
    complete = lines_of(run(spec, tmp_path / "complete.jsonl"))
    assert not any("ended" in line for line in complete)
    poor = lines_of(run(spec, tmp_path / "poor.jsonl", settings=msgspec.structs.replace(SETTINGS, budget=1.0)))
    assert [(line["ended"], line["rounds"], line["outcome"]) for line in poor] == [("budget", 1, 0.0)] * 3
    # The same budget is not spent at lower prices.
    settings = msgspec.structs.replace(SETTINGS, budget=1.0, budget_unit="flops")
    options = {"settings": settings, "spec": spec, "label": "", "about": {}, "prices": Prices(1e-6, 1e-6)}
    cheap = guided_search(Walk, SeededPolicy(), CountingScorer(), TASKS, tmp_path / "cheap.jsonl", **options)
    assert lines_of(cheap) == complete


def test_one_simulation_is_step_wise_best_of_k(tmp_path, monkeypatch):
    """Neither needs a second branch."""
    monkeypatch.setattr(Walk, "fork", "none")
    greedy = lines_of(run(SEARCHES["stepwise"].spec(3), tmp_path / "greedy.jsonl"))
    tree = lines_of(run(SEARCHES["mcts"].spec(1, 3), tmp_path / "tree.jsonl"))
    assert [line["outcome"] for line in tree] == [line["outcome"] for line in greedy]
    assert [line["environment_steps"] for line in tree] == [line["environment_steps"] for line in greedy]


CUSTOM = msgspec.structs.replace(SETTINGS, custom={"tests.search.toy:FIRST": ((2,), (3,))})


def test_a_search_from_outside_the_package_runs_like_those_that_ship(tmp_path):
    first = search_specs(CUSTOM)[-2]
    assert [spec.at for spec in search_specs(CUSTOM)[len(search_specs(SETTINGS)) :]] == ["first 2", "first 3"]
    assert first.file_name("agentprm", 0) == "first-2-agentprm-0"
    assert first.inputs(CUSTOM) == {"width": 1, "actions": 2, "progress_weight": 0.0, "trees": 1, "kind": "first"}
    lines = lines_of(run(first, tmp_path / "out.jsonl", settings=CUSTOM))
    assert [line["task"] for line in lines] == TASKS
    # Two draws at every step, of which the first is taken: one environment step each.
    assert all(line["proposed"] == 2 * line["environment_steps"] == 2 * line["rounds"] for line in lines)
    assert "tree" in lines[0]


def test_a_registered_search_is_named_by_its_kind(monkeypatch):
    monkeypatch.setattr(methods, "SEARCHES", dict(SEARCHES))
    assert methods.register(toy.FIRST) is methods.register(toy.FIRST) is toy.FIRST
    settings = msgspec.structs.replace(SETTINGS, custom={"first": ((4,),), "mcts": ((5, 2),)})
    assert [spec.at for spec in search_specs(settings)[-2:]] == ["first 4", "mcts 5x2"]
    with pytest.raises(UserError, match="search 'first': this kind already has a meaning"):
        methods.register(toy.SAME_KIND)


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ({"nothing": ((2,),)}, "search 'nothing': no such name; use one of beam, stepwise, diverse, lookahead, mcts"),
        ({"tests.search.toy:NOT_A_SEARCH": ((2,),)}, "is a int; name a jaxprm.search.spec.SearchMethod"),
        ({"tests.search.toy:MISSING": ((2,),)}, "'MISSING' does not exist in"),
        (
            {"tests.search.toy:FIRST": ((2, 2),)},
            r'^search\.custom\["tests\.search\.toy:FIRST"\]: \[2, 2\] does not fit search first, which takes 1 number',
        ),
        ({"beam": ((2,),)}, r'^search\.custom\["beam"\]: \[2\] does not fit search beam, which takes 2 or 3 numbers; '),
        ({"stepwise": ((2, 3),)}, r'^search\.custom\["stepwise"\]: \[2, 3\] does not fit .* takes 1 number; '),
        ({"tests.search.toy:FIRST": ((2,),), "tests.search.toy:SAME_KIND": ((2, 2),)}, "is a second search of kind"),
    ],
)
def test_a_custom_search_that_does_not_exist_or_fit_is_refused(custom, message):
    with pytest.raises(UserError, match=message):
        search_specs(msgspec.structs.replace(SETTINGS, custom=custom))


@pytest.mark.parametrize(
    ("parse", "sizes", "message"),
    [
        (lambda width, ahead=0: (width, 1, ahead), (), r"^search\.custom\.own: \[\] .* takes 1 or 2 numbers; "),
        (lambda width, *others: (width, *others), (), "takes 1 or more numbers; "),
        (lambda width: (width,), (4,), r"parse_sizes of search own returned \(4,\); return \(width, actions\) or"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_count(parse, sizes, message):
    with pytest.raises(UserError, match=message):
        methods.SearchMethod("own", toy.take_first, parse_sizes=parse).spec(*sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trees: None, "search own: returned a NoneType; return a list with one Tree for each task"),
        (lambda trees: tuple(trees), "search own: returned a tuple; "),
        (lambda trees: [tree.best for tree in trees], "search own: returned a list of Node; "),
        (lambda trees: trees[:2], "search own: returned 2 trees for 3 tasks; "),
        (lambda trees: trees[::-1], "search own: returned the tree of 'walk/test/2' in place of 'walk/test/0'; "),
    ],
)
def test_a_search_that_does_not_return_a_tree_for_each_task_is_refused(change, message, tmp_path):
    own = methods.SearchMethod("own", lambda request: change(toy.take_first(request)))
    with pytest.raises(UserError, match=message):
        run(own.spec(1, 2), tmp_path / "out.jsonl")


@pytest.mark.parametrize(("kind", "message"), [("My-Search", "only letters"), ("pool", "already has a meaning")])
def test_kinds_that_cannot_name_a_file_are_refused(kind, message):
    with pytest.raises(UserError, match=message):
        methods.register(methods.SearchMethod(kind, toy.take_first))


def test_a_config_without_custom_searches_is_recorded_as_before():
    experiment = config.Experiment(name="small")
    assert "custom" not in config.to_dict(experiment)["search"]
    experiment = config.Experiment(name="small", search=CUSTOM)
    plain = config.to_dict(experiment)
    assert plain["search"]["custom"] == {"tests.search.toy:FIRST": [[2], [3]]}
    assert config.from_dict(plain, where="") == experiment
