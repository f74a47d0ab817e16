"""Collected trajectories are the same however they were batched or interrupted, and every environment is closed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.trajectory import parse_line
from jaxprm import environments, files
from jaxprm.environments import StepResult
from jaxprm.errors import UserError
from jaxprm.policies.rollouts import collect, rollouts, trajectory
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.methods import RandomScorer
from jaxprm.search.tree import tree_to_dict
from tests.search.fakes import Factory, ScriptedPolicy, SeededPolicy, TreeGame, Walk

ROOT = Path(__file__).parents[2]
TASKS = Walk().tasks("train")
COUNT = 5
WANTED = [f"{task}#{number}" for task in TASKS for number in range(COUNT)]
ABOUT = {"temperature": 1.0, "split": "train", "environment": "walk", "seed": 3}


def sample(output, make=Walk, policy=None, **changed):
    options = {"count": COUNT, "in_flight": 6} | ABOUT | changed
    return collect(make, policy or SeededPolicy(ABOUT["seed"]), options.pop("tasks", TASKS), output, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bytes of a file collected without interruption."""
    return sample(tmp_path_factory.mktemp("undisturbed") / "train.jsonl").read_bytes()


@pytest.fixture(scope="module")
def in_the_order_they_end():
    """The lines of the partial file, in the order in which episodes end."""
    jobs = [(task, number) for task in TASKS for number in range(COUNT)]
    episodes = rollouts(Walk, SeededPolicy(3), jobs, temperature=1.0, in_flight=6)
    lines = [files.line(trajectory(episode, **ABOUT)) for episode in episodes]
    assert [json.loads(line)["id"] for line in lines] != WANTED  # short episodes overtake long ones
    return "".join(lines).encode()


def test_every_task_has_its_trajectories_in_order(undisturbed):
    lines = [parse_line(line, where="train") for line in undisturbed.rstrip(b"\n").split(b"\n")]
    assert [line.id for line in lines] == WANTED
    assert [line.task for line in lines] == [task for task in TASKS for _ in range(COUNT)]
    # Numbers pick the draws: the trajectories of a task differ, and those of tasks do.
    actions = [tuple(message.content for message in line.messages[1::2]) for line in lines]
    assert len(set(actions)) > len(actions) / 2
    assert {line.success for line in lines} == {True, False}


def test_a_line_says_how_the_episode_went(tmp_path):
    policy = ScriptedPolicy(lambda task, path: ["up"] if task == "walk/train/0" else ["wait", "down"], cut={"up"})
    path = sample(tmp_path / "x.jsonl", lambda: Walk(max_rounds=4), policy, tasks=TASKS[:2], count=2)
    won, _, waited, lost = (json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    prompt = {"role": "user", "content": "walk: walk/train/0"}
    up = {"role": "assistant", "content": "up"}
    assert won == {
        "id": "walk/train/0#0",
        "environment": "walk",
        "task": "walk/train/0",
        "split": "train",
        "messages": [
            prompt,
            up,
            {"role": "user", "content": "you are at 1"},
            up,
            {"role": "user", "content": "you are at 2"},
            up,
        ],
        "policy": {"name": "policy", "temperature": 1.0, "seed": 3},
        "meta": {
            "goal": "go up \u2028 walk/train/0",
            "depth": 3,
            "final_observation": "you are at 3",
            "tokens": 9,
            "actions_cut": 3,
        },
        "outcome": 1.0,
        "success": True,
        "ended": "done",
    }
    assert (waited["ended"], waited["outcome"], waited["success"]) == ("max_rounds", 0.0, False)
    assert (lost["ended"], lost["outcome"], len(lost["messages"])) == ("done", 0.0, 6)
    assert lost["meta"]["actions_cut"] == 0


@given(in_flight=st.integers(1, 30))
@settings(max_examples=10, deadline=None)
def test_the_file_does_not_depend_on_how_many_are_in_flight(in_flight, undisturbed, tmp_path_factory):
    path = sample(tmp_path_factory.mktemp("in_flight") / "train.jsonl", in_flight=in_flight)
    assert path.read_bytes() == undisturbed


def test_the_seed_changes_the_trajectories(undisturbed, tmp_path):
    assert sample(tmp_path / "x.jsonl", policy=SeededPolicy(4)).read_bytes() != undisturbed


def test_no_more_episodes_than_asked_for_are_in_flight(tmp_path):
    policy, factory = SeededPolicy(3), Factory(Walk)
    sample(tmp_path / "x.jsonl", factory, policy, in_flight=4)
    assert max(states for states, _ in policy.calls) == 4
    assert {n for _, n in policy.calls} == {1}
    assert len(factory.environments) == 4
    assert factory.closes == [1] * 4


def test_a_finished_file_is_not_sampled_again(undisturbed, tmp_path):
    output = tmp_path / "train.jsonl"
    output.write_bytes(undisturbed)
    # A run that was killed between writing the file and removing this one.
    (tmp_path / "train.jsonl.partial").write_bytes(undisturbed)
    factory = Factory(Walk)
    assert sample(output, factory) == output
    assert factory.environments == []
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert output.read_bytes() == undisturbed


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_killed_at_any_byte_it_ends_with_the_same_file(data, undisturbed, in_the_order_they_end, tmp_path_factory):
    output = tmp_path_factory.mktemp("torn") / "train.jsonl"
    cut = data.draw(st.integers(0, len(in_the_order_they_end)))
    torn = in_the_order_they_end[:cut]
    output.with_name("train.jsonl.partial").write_bytes(torn)
    policy = SeededPolicy(3)
    assert sample(output, policy=policy, in_flight=data.draw(st.integers(1, 9))).read_bytes() == undisturbed
    # Complete lines are not sampled again: every missing episode starts once.
    assert policy.started == len(WANTED) - torn.count(b"\n")
    assert not output.with_name("train.jsonl.partial").exists()


@pytest.mark.parametrize("calls", [0, 1, 5, 9, 14])
def test_interrupted_by_the_user_it_keeps_finished_episodes_and_resumes(calls, undisturbed, tmp_path):
    output, factory = tmp_path / "train.jsonl", Factory(Walk)
    with pytest.raises(KeyboardInterrupt):
        sample(output, factory, SeededPolicy(3, stop_after=calls))
    assert factory.closes == [1] * 6
    assert not output.exists()
    kept = files.complete_lines(tmp_path / "train.jsonl.partial")
    again = SeededPolicy(3)
    assert sample(output, policy=again).read_bytes() == undisturbed
    assert again.started == len(WANTED) - len(kept)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.policies.test_rollouts import SeededPolicy, sample
sample(Path(sys.argv[1]), policy=SeededPolicy(3, delay=0.03), in_flight=3)
"""


def test_killed_by_the_system_it_ends_with_the_same_file(undisturbed, tmp_path):
    output, partial = tmp_path / "train.jsonl", tmp_path / "train.jsonl.partial"
    for wanted in (3, 8):
        process = subprocess.Popen([sys.executable, "-c", KILLED.format(root=str(ROOT)), str(output)], cwd=ROOT)
        try:
            deadline = time.monotonic() + 120
            while not partial.exists() or partial.read_bytes().count(b"\n") < wanted:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert not output.exists()
        assert partial.read_bytes().count(b"\n") >= wanted
    assert sample(output).read_bytes() == undisturbed


class Faulty(Walk):
    """Raises in the method and task of `fail`, and is broken from then on."""

    fail, broken = ("", ""), False

    def _maybe(self, method, task):
        if self.fail == (method, task):
            self.broken = True
            raise OSError(f"no {method} today")

    def reset(self, task):
        if self.broken:
            raise RuntimeError("used again")
        self._maybe("reset", task)
        return super().reset(task)

    def describe(self, task):
        self._maybe("describe", task)
        return super().describe(task)

    def step(self, action):
        if len(self._history) == 2:
            self._maybe("step", self._task)
        return super().step(action)

    def outcome(self):
        self._maybe("outcome", self._task)
        return super().outcome()


@pytest.mark.parametrize("method", ["reset", "describe", "step", "outcome"])
def test_what_the_environment_raises_ends_that_episode_with_an_error(method, undisturbed, tmp_path, monkeypatch):
    bad = TASKS[1]
    monkeypatch.setattr(Faulty, "fail", (method, bad))
    factory = Factory(Faulty)
    path = sample(tmp_path / "x.jsonl", factory)
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    parsed = [parse_line(line, where=method) for line in lines]
    assert [line.id for line in parsed] == WANTED
    expected = undisturbed.rstrip(b"\n").split(b"\n")
    for line, text, same in zip(parsed, lines, expected, strict=True):
        if line.task == bad:
            assert (line.ended, line.outcome, line.success) == ("error", None, None)
            assert line.meta["error"] == f"OSError: no {method} today"
        else:
            assert text == same
    assert {len(line.messages) for line in parsed if line.task == bad and method != "outcome"} <= {1, 6}
    # One that has failed is closed, and never used again.
    assert set(factory.closes) == {1}
    assert sum(environment.broken for environment in factory.environments) == COUNT


def test_an_action_that_the_policy_cannot_give_ends_that_episode_and_breaks_no_environment(tmp_path):
    script = {"walk/train/1": ["up", "down", "fails"], "walk/train/2": ["fails"]}
    policy = ScriptedPolicy(lambda task, path: script.get(task, ["up"]), fail={"fails"})
    factory = Factory(Walk)
    path = sample(tmp_path / "x.jsonl", factory, policy, count=3, in_flight=2)
    lines = [parse_line(line, where="x") for line in path.read_bytes().splitlines()]
    assert [line.ended for line in lines] == ["done"] * 3 + ["done", "done", "error"] + ["error"] * 3 + ["done"] * 3
    for line in lines[5:9]:
        assert (line.outcome, line.success, line.meta["error"]) == (None, None, "policy: no fails today")
        assert [message.role for message in line.messages] == ["user"]  # without the action that failed
        assert line.meta["tokens"] == 0
    # The environments did not fail: two served all twelve episodes.
    assert factory.closes == [1, 1]


def test_a_policy_that_gives_nothing_is_named_as_the_cause(tmp_path):
    policy = ScriptedPolicy(lambda task, path: ["up"] if not path else ["fails"], fail={"fails"})
    with pytest.raises(UserError, match=r"all 20 .* the first: policy: no fails today; fix the policy$"):
        sample(tmp_path / "x.jsonl", policy=policy)


def test_errors_do_not_depend_on_how_many_are_in_flight(tmp_path):
    texts = ("up", "down", "wait", "crash")
    written = [
        sample(tmp_path / f"{in_flight}.jsonl", policy=SeededPolicy(3, texts), in_flight=in_flight).read_bytes()
        for in_flight in (1, 5, 20)
    ]
    assert written[0] == written[1] == written[2]
    assert b"OSError: the path is broken" in written[0]
    assert b'"ended": "done"' in written[0]


def test_a_collection_of_nothing_but_errors_is_refused_and_can_be_repeated(tmp_path, undisturbed):
    output, factory = tmp_path / "train.jsonl", Factory(Walk)
    with pytest.raises(UserError) as error:
        sample(output, factory, SeededPolicy(3, ("crash",)), label="collect train")
    assert str(error.value) == (
        "collect train: all 20 episodes ended in an error, the first: OSError: the path is broken; "
        "fix the environment walk"
    )
    assert set(factory.closes) == {1}
    # The same command samples everything once the cause is fixed.
    assert sample(output).read_bytes() == undisturbed


class Odd(Walk):
    """Returns values that the protocol forbids."""

    observation, grade, about = "fine", 1.0, {}

    def step(self, action):
        return StepResult(self.observation, 0.0, True)

    def outcome(self):
        return self.grade

    def describe(self, task):
        return self.about if task == TASKS[0] else {}


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("observation", None, "TypeError: step() returned a NoneType for the observation; it must be text"),
        ("grade", 1.5, "ValueError: outcome() returned 1.5; it must be in [0, 1]"),
        ("grade", float("nan"), "ValueError: outcome() returned nan; it must be in [0, 1]"),
        ("about", {"a": {1, 2}}, "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_what_cannot_be_written_is_the_episodes_error(attribute, value, error, tmp_path, monkeypatch):
    class Both(Odd):
        def reset(self, task):
            self.good = task == TASKS[1]
            return super().reset(task)

        def step(self, action):
            return StepResult("fine", 0.0, True) if self.good else super().step(action)

        def outcome(self):
            return 1.0 if self.good else super().outcome()

    monkeypatch.setattr(Odd, attribute, value)
    path = sample(tmp_path / "x.jsonl", Both, tasks=TASKS[:2], count=1)
    bad, good = (parse_line(line, where=attribute) for line in path.read_bytes().rstrip(b"\n").split(b"\n"))
    assert (bad.ended, bad.meta["error"]) == ("error", error)
    assert (good.ended, good.outcome) == ("done", 1.0)


def test_an_environment_that_never_ends_is_cut_at_its_round_limit_and_graded(tmp_path):
    endless: dict = {}
    endless["on"] = endless
    policy = ScriptedPolicy(lambda task, path: ["on"])
    path = sample(tmp_path / "x.jsonl", lambda: TreeGame({"t": endless}, max_rounds=4), policy, tasks=["t"], count=1)
    line = parse_line(path.read_bytes(), where="x")
    assert [message.role for message in line.messages] == ["user", "assistant"] * 4
    assert (line.outcome, line.success, line.meta["final_observation"]) == (0.25, False, "at on/on/on/on")


def test_what_an_environment_says_of_a_task_does_not_hide_the_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(Odd, "about", {"tokens": "many", "colour": "red"})
    line = parse_line(sample(tmp_path / "x.jsonl", Odd, tasks=TASKS[:1], count=1).read_bytes(), where="x")
    assert line.meta["colour"] == "red"
    assert isinstance(line.meta["tokens"], int)


def test_a_task_that_is_given_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="task walk/train/2 is given twice"):
        sample(tmp_path / "x.jsonl", tasks=[*TASKS, TASKS[2]])


def test_an_environment_that_cannot_be_closed_keeps_no_other_open(tmp_path):
    class Stuck(Walk):
        def close(self):
            super().close()
            raise RuntimeError("cannot close")

    factory = Factory(Stuck)
    with pytest.raises(RuntimeError, match="cannot close"):
        sample(tmp_path / "x.jsonl", factory)
    assert factory.closes == [1] * 6
    # All episodes were sampled, and none is lost.
    assert len(files.complete_lines(tmp_path / "x.jsonl.partial")) == len(WANTED)


def test_no_tasks_give_an_empty_file(tmp_path):
    assert sample(tmp_path / "x.jsonl", tasks=[]).read_bytes() == b""


GUESS = '''
from jaxprm.environments import StepResult


class Guess:
    """A user's own environment: guess a number from a hint."""

    fork = "replay"

    def __init__(self, highest, max_rounds=4):
        self.highest, self.max_rounds = highest, max_rounds

    def tasks(self, split):
        return [f"guess/{split}/{number}" for number in range(1, self.highest + 1)]

    def reset(self, task):
        self.number, self.rounds, self.found = int(task.split("/")[-1]), 0, False
        return f"Guess a number from 1 to {self.highest}."

    def step(self, action):
        self.rounds += 1
        guess = int(action)
        self.found = guess == self.number
        hint = "right" if self.found else "higher" if guess < self.number else "lower"
        return StepResult(hint, float(self.found), self.found or self.rounds == self.max_rounds)

    def outcome(self):
        return float(self.found)

    def close(self):
        pass
'''


def test_a_users_own_environment_is_collected_and_searched(tmp_path, monkeypatch):
    (tmp_path / "my_guess.py").write_text(GUESS)
    monkeypatch.syspath_prepend(tmp_path)

    def make():
        return environments.create("my_guess:Guess", {"highest": 3})

    tasks, policy = make().tasks("train"), SeededPolicy(0, ("1", "2", "3"))
    path = sample(tmp_path / "x.jsonl", make, policy, tasks=tasks, environment="my_guess:Guess")
    lines = [parse_line(line, where="x") for line in path.read_bytes().rstrip(b"\n").split(b"\n")]
    assert [line.id for line in lines] == [f"{task}#{number}" for task in tasks for number in range(COUNT)]
    for line in lines:
        last = line.messages[-1].content
        assert line.outcome == float(last == line.task[-1])
        assert (line.meta["final_observation"] == "right") == line.success

    class Knows:
        """Reads the answer off the task's name, to see that the search goes where the scorer says."""

        def score_actions(self, states, candidates):
            return [[-abs(int(text) - 2) for text in texts] for texts in candidates]

    runner = BranchRunner(make)
    for scorer in (Knows(), RandomScorer(0)):
        trees = beam_search(
            tasks, runner, policy, scorer, width=2, actions=4, temperature=0.7, max_rounds=runner.environment.max_rounds
        )
        assert all(tree.best.branch.done and tree.best.branch.error is None for tree in trees)
        assert [tree_to_dict(tree)["prompt"] for tree in trees] == ["Guess a number from 1 to 3."] * 3
        if isinstance(scorer, Knows):
            assert trees[1].best.branch.outcome == 1.0
            assert trees[1].best.branch.actions == ("2",)
    assert runner.errors == 0
    runner.close()
