"""Environments in processes of their own: the same as here, and what happens when one crashes, hangs or leaks."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxprm.environments.worker import Workers
from jaxprm.errors import UserError
from jaxprm.policies.rollouts import rollouts
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from tests.environments.misbehaving import Misbehaving
from tests.search.fakes import ScriptedPolicy, ScriptedScorer, SeededPolicy, path_of

NAME = "tests.environments.misbehaving:Misbehaving"


@pytest.fixture
def made(tmp_path):
    return tmp_path / "made"


def workers(made, *, timeout=20.0, memory=None, at_once=1, **arguments):
    return Workers(NAME, {"made": str(made), **arguments}, at_once=at_once, timeout=timeout, memory=memory)


def processes(made) -> list[int]:
    return [int(line) for line in made.read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_is_the_environment_that_it_stands_for(made):
    here, there = Misbehaving(), workers(made)()
    assert (there.fork, there.max_rounds) == (here.fork, here.max_rounds)
    assert there.tasks("test") == list(here.tasks("test"))
    assert there.describe("a")["goal"] == here.describe("a")["goal"]
    assert not hasattr(there, "answer") and not hasattr(there, "anything")
    assert there.reset("a") == here.reset("a")
    for action in ("x", "\u2028 \n ü"):
        assert there.step(action) == here.step(action)
    ours, theirs = here.snapshot(), there.snapshot()
    assert there.step("y") == here.step("y") and there.outcome() == here.outcome()
    here.restore(ours), there.restore(theirs)
    assert there.step("z") == here.step("z")
    (pid,) = processes(made)
    assert pid != os.getpid() and alive(pid)
    there.close()
    assert not alive(pid)
    there.close()


def test_what_it_raises_is_told_and_its_process_goes_on(made):
    factory = workers(made)
    environment = factory()
    environment.reset("a")
    with pytest.raises(RuntimeError, match="OSError: the path is broken"):
        environment.step("raise")
    with pytest.raises(RuntimeError, match="TypeError: Encoding objects of type object"):
        environment.step("odd")
    assert len(processes(made)) == 1 and not factory.ended
    environment.close()


@pytest.mark.parametrize(
    ("action", "error", "message", "reason"),
    [
        ("crash", ConnectionError, "its process ended with status 3 in step", "crashed"),
        ("hang", TimeoutError, r"step\(\) took more than 1.5 s; its process was ended", "timed out"),
    ],
)
def test_one_that_crashes_or_hangs_is_replaced_and_states_are_made_again(made, action, error, message, reason):
    factory = workers(made, timeout=1.5)
    environment = factory()
    environment.reset("a")
    environment.step("x")
    state = environment.snapshot()
    with pytest.raises(error, match=message):
        environment.step(action)
    environment.restore(state)  # in another process, by the same steps
    assert environment.step("y").observation == "2 after y"
    first, second = processes(made)
    assert not alive(first) and alive(second)
    assert factory.ended == {reason: 1}
    environment.close()


def test_a_state_that_cannot_be_made_again_is_an_error(made, tmp_path):
    weather = tmp_path / "weather"
    weather.write_text("rain")
    environment = workers(made, drift=str(weather))()
    environment.reset("a")
    environment.step("x")
    state = environment.snapshot()
    with pytest.raises(ConnectionError):
        environment.step("crash")
    weather.write_text("sun")
    with pytest.raises(RuntimeError, match="its process was lost, and an observation differs now: '1 after x in sun'"):
        environment.restore(state)
    environment.close()


def test_one_that_leaks_is_replaced_between_episodes(made):
    factory = workers(made, memory=150 << 20)
    environment = factory()
    environment.reset("a")
    environment.step("leak")
    assert environment.step("x").observation == "2 after x"  # not in the middle of one
    environment.reset("b")
    assert environment.step("x").observation == "1 after x"
    assert len(processes(made)) == 2 and factory.ended == {"too large": 1}
    environment.close()


def test_snapshots_that_nobody_holds_are_dropped(made):
    environment = workers(made)()
    environment.reset("a")
    state = environment.snapshot()
    for _ in range(50):
        environment.snapshot()
    gc.collect()
    environment.restore(state)
    # What it still has is what is asked for: one number of fifty-one.
    assert [number for number in range(1, 52) if _holds(environment, number)] == [state.number]
    environment.close()


def _holds(environment, number):
    try:
        environment._call("restore", number)
    except RuntimeError as error:
        assert "KeyError" in str(error)
        return False
    return True


def test_one_that_cannot_be_made_is_one_line():
    with pytest.raises(UserError, match=r"^environment 'tests\.environments\.misbehaving:Nobody': 'Nobody' does not"):
        Workers("tests.environments.misbehaving:Nobody", {})()
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        Workers(NAME, {"colour": "red"})()
    with pytest.raises(UserError, match=r"misbehaving:Misbehaving': OSError: no display; mend it"):
        Workers(NAME, {"fork": "raise"})()
    with pytest.raises(UserError, match=r"Misbehaving': its process ended with status 4 in its start; mend"):
        Workers(NAME, {"fork": "crash"})()


def test_episodes_are_the_same_and_only_the_bad_ones_are_lost(made):
    """Each costs its own episode; the others are as they would have been."""

    def episodes(make, texts):
        jobs = [(f"train/{task}", number) for task in range(3) for number in range(3)]
        found = rollouts(make, SeededPolicy(1, texts=texts), jobs, temperature=1.0, in_flight=5)
        return {(one.task, one.number): one for one in found}

    factory = workers(made, at_once=3, timeout=30.0)
    good, here = episodes(factory, ("x", "y")), episodes(Misbehaving, ("x", "y"))
    assert {key: one.messages for key, one in good.items()} == {key: one.messages for key, one in here.items()}
    mixed = episodes(factory, ("x", "y", "z", "w", "v", "crash"))
    lost = {key for key, one in mixed.items() if one.error}
    assert 0 < len(lost) < 9 and len(mixed) == 9
    assert all("its process ended" in mixed[key].error for key in lost)
    assert factory.ended["crashed"] == len(lost)
    assert not any(map(alive, processes(made)))


@pytest.mark.parametrize("fork", ["clone", "replay", "none"])
def test_a_search_loses_the_branch_and_nothing_else(made, fork):
    draws = lambda task, path: ["crash", "x"] if not path else ["y", "z"]
    width = 1 if fork == "none" else 2
    runner = BranchRunner(workers(made, at_once=2, fork=fork))
    scores = ScriptedScorer(lambda path: float(path[-1] != "crash") if width == 1 else 0.5)
    trees = beam_search(
        ["test/0", "test/1", "test/2"],
        runner,
        ScriptedPolicy(draws),
        scores,
        width=width,
        actions=1 if width == 2 else 2,
        temperature=1.0,
        max_rounds=6,
    )
    runner.close()
    for tree in trees:
        assert path_of(tree.best.messages) == ("x", *["y"] * 5), path_of(tree.best.messages)
        assert tree.best.branch.outcome == 1.0
    crashed = sum(node.branch.error is not None for tree in trees for node in tree.nodes if node.executed)
    assert crashed == (3 if width == 2 else 0)
    assert not any(map(alive, processes(made)))


def test_slow_ones_work_at_the_same_time(made):
    def seconds(at_once):
        runner = BranchRunner(workers(made, at_once=at_once, delay=0.3))
        runner.map(runner.start, ["warm/0", "warm/1", "warm/2", "warm/3"], lambda task: task)
        begin = time.monotonic()
        runner.map(runner.start, ["warm/0", "warm/1", "warm/2", "warm/3"], lambda task: task)
        took = time.monotonic() - begin
        runner.close()
        return took

    alone = seconds(1)
    assert alone >= 4 * 0.3
    assert seconds(4) < 0.75 * alone


def test_none_outlives_the_program_that_started_it(made):
    code = (
        "import sys, time; from jaxprm.environments.worker import Workers;"
        f"e = Workers({NAME!r}, {{'made': sys.argv[1]}})(); print('ready', flush=True); time.sleep(60)"
    )
    command, root = [sys.executable, "-c", code, str(made)], Path(__file__).parents[2]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    assert program.stdout.readline() == b"ready\n"
    (pid,) = processes(made)
    program.send_signal(signal.SIGKILL)
    program.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
