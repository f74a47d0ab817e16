"""The search stage: values of trajectory files, a file for every search, and checks before any work."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxprm import config, files
from jaxprm.errors import UserError
from jaxprm.search.methods import RandomScorer
from jaxprm.workflow import search_stage
from jaxprm.workflow.context import Run
from jaxprm.workflow.workdir import WorkDirectory
from tests.model import tiny
from tests.search.fakes import SeededPolicy, Walk


class CountingScorer:
    """The value of a step is its index; conversations are counted."""

    def __init__(self):
        self.encoder, self.scored = tiny.encoder(), 0

    def score_encoded(self, encoded, names):
        self.scored += len(encoded)
        return [np.arange(len(trajectory.read_positions), dtype=np.float32) for trajectory in encoded]


def test_equal_conversations_are_scored_once_and_lines_have_token_counts(tmp_path):
    first, second = tiny.conversation(1, turns=3), tiny.conversation(2, turns=1)
    lines = [{"id": str(number), "messages": m} for number, m in enumerate((first, second, first))]
    lines.append({"id": "failed", "messages": first, "ended": "error"})
    (tmp_path / "in.jsonl").write_text("".join(map(files.line, lines)))
    scorer = CountingScorer()
    search_stage._score_file(scorer, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "")
    assert scorer.scored == 2
    rows = list(files.read_lines(tmp_path / "out.jsonl"))
    assert [(line["id"], line["values"]) for line in rows] == [("0", [0, 1, 2]), ("1", [0]), ("2", [0, 1, 2])]
    for line, messages in zip(rows, (first, second, first), strict=True):
        assert line["tokens"] == len(tiny.encoder().trajectory(messages, row="").tokens)
        assert line["prompt_tokens"] == len(tiny.encoder().prompt(messages[:1]))


def test_a_trajectory_that_cannot_be_scored_has_an_error_and_is_reported(tmp_path, capsys):
    good, bad = tiny.conversation(1, turns=1), [{"role": "user", "content": "<|end|>"}, *tiny.conversation(1)[1:]]
    lines = [{"id": "a", "messages": bad}, {"id": "b", "messages": good}]
    (tmp_path / "in.jsonl").write_text("".join(map(files.line, lines)))
    search_stage._score_file(CountingScorer(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", "")
    first, second = files.read_lines(tmp_path / "out.jsonl")
    assert first.keys() == {"id", "error"} and "a: message 0 (user) has the special token" in first["error"]
    assert second["values"] == [0]
    assert "1 of 2 trajectories cannot be scored: a: message 0" in capsys.readouterr().err


def test_conversations_are_scored_with_their_tools(tmp_path):
    messages, tools = tiny.conversation(1, turns=1), [{"type": "function", "function": {"name": "look"}}]
    lines = [{"id": "a", "messages": messages}, {"id": "b", "messages": messages, "tools": tools}]
    (tmp_path / "in.jsonl").write_text("".join(map(files.line, lines)))
    scorer, seen = CountingScorer(), []
    encode = scorer.encoder.trajectory
    trajectory = lambda messages, *, row, tools=None: seen.append((row, tools)) or encode(messages, row=row)
    scorer.encoder = SimpleNamespace(trajectory=trajectory)
    search_stage._score_file(scorer, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "")
    assert seen == [("a", None), ("b", tools)] and scorer.scored == 2


def test_every_search_of_a_run_writes_its_file(tmp_path):
    search = config.SearchConfig(
        beams=((2, 2),),
        stepwise=(2,),
        diverse=((2, 2),),
        lookahead=((2, 2, 1),),
        mcts=((3, 2),),
        custom={"tests.search.toy:FIRST": ((2,),)},
        trees=0,
    )
    models = (config.RewardModelConfig(label="mine"),)
    experiment = config.Experiment(name="small", search=search, reward_models=models)
    run = SimpleNamespace(
        experiment=experiment,
        work=WorkDirectory(tmp_path),
        make_environment=Walk,
        policy=SeededPolicy(),
        search_inputs={},
        collect_inputs={},
        trained=list,
        train_inputs=None,
    )
    search_stage._Stages(run).searches(["walk/test/0"], "random", 0, lambda: RandomScorer(0))
    names = {path.stem for path in (tmp_path / "search").glob("*.jsonl")}
    kinds = ("beam-2x2", "stepwise-2", "diverse-2x2", "lookahead-2x2x1", "mcts-3x2", "first-2")
    assert names == {f"{kind}-random-0" for kind in kinds}
    for name in names:
        (line,) = files.read_lines(tmp_path / f"search/{name}.jsonl")
        assert line["task"] == "walk/test/0" and line["reward_encoded"] == 0


def check(environment, tmp_path, policy=None, **search):
    settings = {
        "search": config.SearchConfig(**search),
        "policy": policy or config.PolicyConfig(),
        "base_model": "default",
    }
    experiment = config.Experiment(name="small", **settings)
    run = Run(experiment, WorkDirectory(tmp_path))
    run.__dict__["make_environment"] = environment
    search_stage.check(run)


def test_a_search_that_the_environment_cannot_do_is_refused_before_any_work(tmp_path, monkeypatch):
    check(Walk, tmp_path, lookahead=((1, 2, 1),))
    with pytest.raises(UserError, match=r"search\.aggregations: vote, weighted_vote compare answers.*answer\(\)"):
        check(Walk, tmp_path, aggregations=("weighted_vote", "mean", "vote"))
    monkeypatch.setattr(Walk, "answer", lambda self: "up", raising=False)
    check(Walk, tmp_path, aggregations=("weighted_vote",))
    monkeypatch.setattr(Walk, "fork", "none")
    with pytest.raises(UserError, match=r'fork = "none".*search\.stepwise'):
        check(Walk, tmp_path, lookahead=((1, 2, 1),), beams=())


def test_a_budget_in_flops_needs_a_policy_of_known_size(tmp_path):
    check(Walk, tmp_path, budget=1e9, budget_unit="flops")
    own = config.PolicyConfig(path="tests.search.fakes:SeededPolicy")
    with pytest.raises(UserError, match="give the budget in tokens"):
        check(Walk, tmp_path, own, budget=1e9, budget_unit="flops")
    check(Walk, tmp_path, own, budget=1e9)


@pytest.fixture
def two_models(tmp_path):
    return tiny.write_policy(tmp_path / "policy"), tiny.write_policy(tmp_path / "reference")


def test_progress_advantage_is_checked_before_any_work(tmp_path, two_models):
    policy, reference = map(str, two_models)
    advantage = config.ProgressAdvantageConfig(reference=reference)
    settings = config.PolicyConfig(path=policy)
    check(Walk, tmp_path, settings, progress_advantage=advantage)
    with pytest.raises(UserError, match="reference .*missing: no such directory"):
        missing = config.ProgressAdvantageConfig(reference=f"{tmp_path}/missing")
        check(Walk, tmp_path, settings, progress_advantage=missing)
    own = config.PolicyConfig(path="tests.search.fakes:SeededPolicy")
    with pytest.raises(UserError, match=r"no directory with weights; set search\.progress_advantage\.policy"):
        check(Walk, tmp_path, own, progress_advantage=advantage)
    check(Walk, tmp_path, own, progress_advantage=config.ProgressAdvantageConfig(reference=reference, policy=policy))
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        check(Walk, tmp_path, config.PolicyConfig(), progress_advantage=advantage)


def test_progress_advantage_has_the_files_of_one_seed_and_the_rest_stays(tmp_path, two_models):
    policy, reference = map(str, two_models)

    def inputs(advantage):
        search = config.SearchConfig(stepwise=(2,), beams=(), progress_advantage=advantage)
        experiment = config.Experiment(
            name="small", search=search, policy=config.PolicyConfig(path=policy), reward_seeds=(3, 4), reward_models=()
        )
        return search_stage.stage_inputs(Run(experiment, WorkDirectory(tmp_path)))

    before, after = inputs(None), inputs(config.ProgressAdvantageConfig(reference=reference))
    assert after.keys() - before.keys() == {
        "stepwise-2-progress_advantage-3",
        "values-pool-progress_advantage-3",
    }
    assert {name: after[name] for name in before} == before
    assert len(after["stepwise-2-progress_advantage-3"]["progress_advantage"]) == 2


def test_stop_at_is_a_promise_and_does_not_end_searches_by_log_ratios(tmp_path, two_models, monkeypatch):
    policy, reference = map(str, two_models)
    advantage = config.ProgressAdvantageConfig(reference=reference)
    search = config.SearchConfig(stepwise=(2,), beams=(), stop_at=-5.0, progress_advantage=advantage)
    experiment = config.Experiment(
        name="small", search=search, policy=config.PolicyConfig(path=policy), reward_models=()
    )
    run = Run(experiment, WorkDirectory(tmp_path / "work"))
    inputs = search_stage.stage_inputs(run)
    assert inputs["stepwise-2-random-0"]["stop_at"] == -5.0
    assert "stop_at" not in inputs["stepwise-2-progress_advantage-0"]
    vars(run)["policy"], used = None, {}

    def guided_search(make_environment, policy, scorer, tasks, output, *, settings, about, **options):
        used[about["method"]] = settings.stop_at
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()

    monkeypatch.setattr(search_stage, "guided_search", guided_search)
    for label in ("random", "progress_advantage"):
        search_stage._Stages(run).searches([], label, 0, lambda: RandomScorer(0))
    assert used == {"random": -5.0, "progress_advantage": None}
