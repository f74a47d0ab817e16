"""Environments in worker processes: the same results, and what happens when one crashes, hangs or leaks memory."""

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
def pids(tmp_path):
    """A file to which every worker appends its process id."""
    return tmp_path / "pids"


def workers(pids, *, timeout=20.0, memory=None, at_once=1, **arguments):
    return Workers(NAME, {"pids": str(pids), **arguments}, at_once=at_once, timeout=timeout, memory=memory)


def processes(pids) -> list[int]:
    return [int(line) for line in pids.read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_remote_environment_answers_like_a_local_one(pids):
    local, remote = Misbehaving(), workers(pids)()
    assert (remote.fork, remote.max_rounds) == (local.fork, local.max_rounds)
    assert remote.tasks("test") == list(local.tasks("test"))
    assert remote.describe("a")["goal"] == local.describe("a")["goal"]
    assert not hasattr(remote, "answer") and not hasattr(remote, "anything")
    assert remote.reset("a") == local.reset("a")
    for action in ("x", "\u2028 \n ü"):
        assert remote.step(action) == local.step(action)
    local_state, remote_state = local.snapshot(), remote.snapshot()
    assert remote.step("y") == local.step("y") and remote.outcome() == local.outcome()
    local.restore(local_state), remote.restore(remote_state)
    assert remote.step("z") == local.step("z")
    (pid,) = processes(pids)
    assert pid != os.getpid() and alive(pid)
    remote.close()
    assert not alive(pid)
    remote.close()


def test_an_exception_is_passed_on_and_the_worker_lives_on(pids):
    factory = workers(pids)
    environment = factory()
    environment.reset("a")
    with pytest.raises(RuntimeError, match="OSError: the path is broken"):
        environment.step("raise")
    with pytest.raises(RuntimeError, match="TypeError: Encoding objects of type object"):
        environment.step("odd")
    assert len(processes(pids)) == 1 and not factory.ended
    environment.close()


@pytest.mark.parametrize(
    ("action", "error", "message", "reason"),
    [
        ("crash", ConnectionError, r"its worker ended with status 3 in step\(\)", "crashed"),
        ("hang", TimeoutError, r"step\(\) took more than 1.5 s; its worker was ended", "timed out"),
    ],
)
def test_a_worker_that_crashes_or_hangs_is_replaced_and_states_are_restored(pids, action, error, message, reason):
    factory = workers(pids, timeout=1.5)
    environment = factory()
    environment.reset("a")
    environment.step("x")
    state = environment.snapshot()
    with pytest.raises(error, match=message):
        environment.step(action)
    environment.restore(state)  # in another worker, by the same steps
    assert environment.step("y").observation == "2 after y"
    first, second = processes(pids)
    assert not alive(first) and alive(second)
    assert factory.ended == {reason: 1}
    environment.close()


def test_a_state_that_cannot_be_repeated_is_an_error(pids, tmp_path):
    weather = tmp_path / "weather"
    weather.write_text("rain")
    environment = workers(pids, drift=str(weather))()
    environment.reset("a")
    environment.step("x")
    state = environment.snapshot()
    with pytest.raises(ConnectionError):
        environment.step("crash")
    weather.write_text("sun")
    with pytest.raises(RuntimeError, match="its worker was lost, and an observation differs now: '1 after x in sun'"):
        environment.restore(state)
    environment.close()


def test_a_worker_that_leaks_is_replaced_between_episodes(pids):
    factory = workers(pids, memory=150 << 20)
    environment = factory()
    environment.reset("a")
    environment.step("leak")
    assert environment.step("x").observation == "2 after x"  # not within an episode
    environment.reset("b")
    assert environment.step("x").observation == "1 after x"
    assert len(processes(pids)) == 2 and factory.ended == {"too large": 1}
    environment.close()


def test_unused_snapshots_are_dropped(pids):
    environment = workers(pids)()
    environment.reset("a")
    state = environment.snapshot()
    for _ in range(50):
        environment.snapshot()
    gc.collect()
    environment.restore(state)
    # Of fifty-one snapshots the worker still has the one that is used.
    assert [number for number in range(1, 52) if _holds(environment, number)] == [state.number]
    environment.close()


def _holds(environment, number):
    try:
        environment._call("restore", number)
    except RuntimeError as error:
        assert "KeyError" in str(error)
        return False
    return True


def test_an_environment_that_cannot_be_made_is_a_one_line_error():
    with pytest.raises(UserError, match=r"^environment 'tests\.environments\.misbehaving:Nobody': 'Nobody' does not"):
        Workers("tests.environments.misbehaving:Nobody", {})()
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        Workers(NAME, {"colour": "red"})()
    with pytest.raises(UserError, match=r"misbehaving:Misbehaving': OSError: no display; fix the environment"):
        Workers(NAME, {"fork": "raise"})()
    with pytest.raises(UserError, match=r"Misbehaving': its worker ended with status 4 in start-up; fix"):
        Workers(NAME, {"fork": "crash"})()


def test_only_the_episodes_of_crashed_workers_are_lost(pids):
    """The others are as in this process."""

    def episodes(make, texts):
        jobs = [(f"train/{task}", number) for task in range(3) for number in range(3)]
        ended = rollouts(make, SeededPolicy(1, texts=texts), jobs, temperature=1.0, in_flight=5)
        return {(episode.task, episode.number): episode for episode in ended}

    factory = workers(pids, at_once=3, timeout=30.0)
    remote, local = episodes(factory, ("x", "y")), episodes(Misbehaving, ("x", "y"))
    messages = lambda ended: {key: episode.messages for key, episode in ended.items()}
    assert messages(remote) == messages(local)
    mixed = episodes(factory, ("x", "y", "z", "w", "v", "crash"))
    lost = {key for key, episode in mixed.items() if episode.error}
    assert 0 < len(lost) < 9 and len(mixed) == 9
    assert all("its worker ended" in mixed[key].error for key in lost)
    assert factory.ended["crashed"] == len(lost)
    assert not any(map(alive, processes(pids)))


@pytest.mark.parametrize("fork", ["clone", "replay", "none"])
def test_a_search_loses_only_the_branch_of_a_crashed_worker(pids, fork):
    draws = lambda task, path: ["crash", "x"] if not path else ["y", "z"]
    width = 1 if fork == "none" else 2
    runner = BranchRunner(workers(pids, at_once=2, fork=fork))
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
    assert not any(map(alive, processes(pids)))


def test_slow_environments_work_at_the_same_time(pids):
    def seconds(at_once):
        runner = BranchRunner(workers(pids, at_once=at_once, delay=0.3))
        runner.map(runner.start, ["warm/0", "warm/1", "warm/2", "warm/3"], lambda task: task)
        begin = time.monotonic()
        runner.map(runner.start, ["warm/0", "warm/1", "warm/2", "warm/3"], lambda task: task)
        elapsed = time.monotonic() - begin
        runner.close()
        return elapsed

    alone = seconds(1)
    assert alone >= 4 * 0.3
    assert seconds(4) < 0.75 * alone


def test_no_worker_outlives_the_program_that_started_it(pids):
    code = (
        "import sys, time; from jaxprm.environments.worker import Workers;"
        f"e = Workers({NAME!r}, {{'pids': sys.argv[1]}})(); print('ready', flush=True); time.sleep(60)"
    )
    command, root = [sys.executable, "-c", code, str(pids)], Path(__file__).parents[2]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    assert program.stdout.readline() == b"ready\n"
    (pid,) = processes(pids)
    program.send_signal(signal.SIGKILL)
    program.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
