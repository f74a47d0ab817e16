"""Stages of a work directory: skipped, resumed, refused, run again, timed."""

import json
import os
import subprocess
import sys

import pytest

from jaxprm.errors import UserError
from jaxprm.workflow import workdir
from jaxprm.workflow.workdir import WorkDirectory, identity

INPUTS = {"seed": 0, "collection": {"temperature": 1.0, "tasks": None}, "beams": ((2, 2), (4, 4))}


class Killed(Exception):
    pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a test sets it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(workdir, "time", clock)
    return clock


def run_stage(work, inputs=INPUTS, *, fail=False, name="collect"):
    """Writes the file `out`, by way of a partial one; returns whether the stage had to run."""
    output = work / "out"
    with work.stage(name, inputs, [output]) as needed:
        if needed:
            (work / "out.partial").write_text("partial")
            if fail:
                raise Killed
            (work / "out.partial").unlink()
            output.write_text("complete")
    return needed


def test_a_work_directory_admits_one_process_at_a_time(tmp_path):
    script = (
        "import sys; from pathlib import Path; from jaxprm.workflow.workdir import WorkDirectory\n"
        "with WorkDirectory(Path(sys.argv[1])).lock(): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=f"process {other.pid} works in it"), WorkDirectory(tmp_path).lock():
            pass
        other.kill()
    with WorkDirectory(tmp_path).lock():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_finished_stage_is_skipped(tmp_path):
    assert run_stage(WorkDirectory(tmp_path))
    assert not run_stage(WorkDirectory(tmp_path))
    assert not run_stage(WorkDirectory(tmp_path, redo=True))
    # Inputs are compared as JSON has them: a tuple is a list.
    assert not run_stage(WorkDirectory(tmp_path), INPUTS | {"beams": [[2, 2], [4, 4]]})


def test_an_interrupted_stage_resumes(tmp_path):
    with pytest.raises(Killed):
        run_stage(WorkDirectory(tmp_path), fail=True)
    assert (tmp_path / "out.partial").read_text() == "partial"
    with pytest.raises(Killed):
        run_stage(WorkDirectory(tmp_path, redo=True), fail=True)
    assert (tmp_path / "out.partial").exists()  # --redo is for stages whose inputs changed
    assert run_stage(WorkDirectory(tmp_path))
    assert not run_stage(WorkDirectory(tmp_path))


def test_a_stage_ended_by_sigkill_resumes(tmp_path):
    """A SIGKILL leaves the record as it was when the stage was entered."""
    entered = WorkDirectory(tmp_path).stage("collect", INPUTS, [tmp_path / "out"])
    assert entered.__enter__()
    assert json.loads((tmp_path / "stages/collect.json").read_text())["finished"] is False
    assert run_stage(WorkDirectory(tmp_path))


def test_a_finished_stage_that_lost_its_output_is_run_again(tmp_path):
    run_stage(WorkDirectory(tmp_path))
    (tmp_path / "out").unlink()
    assert run_stage(WorkDirectory(tmp_path))
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"seed": 1}, "seed = 0, now 1"),
        ({"collection": {"temperature": 0.5, "tasks": None}}, "collection.temperature = 1.0, now 0.5"),
        ({"collection": {"temperature": 1.0}}, "collection.tasks = None, now without it"),
        ({"collection": {"temperature": 1.0, "tasks": None, "more": None}}, "no collection.more, now None"),
        ({"beams": ((2, 2),)}, "beams = [[2, 2], [4, 4]], now [[2, 2]]"),
    ],
)
def test_changed_inputs_are_refused_and_the_field_is_named(tmp_path, changed, difference, fail):
    if fail:
        with pytest.raises(Killed):
            run_stage(WorkDirectory(tmp_path), fail=True)
    else:
        run_stage(WorkDirectory(tmp_path))
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        run_stage(WorkDirectory(tmp_path), INPUTS | changed)
    assert str(error.value) == (
        f"work directory {tmp_path}: stage collect was made with {difference}; "
        "use another --workdir, or --redo to make it again"
    )
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_redo_removes_the_outputs_and_starts_from_nothing(tmp_path, clock):
    work = WorkDirectory(tmp_path)
    folder = tmp_path / "shards"
    for inputs in ({"a": 1}, {"a": 2}):
        with WorkDirectory(tmp_path, redo=True).stage("build", inputs, [folder, tmp_path / "index"]) as needed:
            assert needed
            assert not folder.exists()
            assert not (tmp_path / "index").exists()
            assert not (tmp_path / "index.partial").exists()
            folder.mkdir()
            (folder / "shard").write_text(str(inputs))
            (tmp_path / "index").write_text("index")
            (tmp_path / "index.partial").write_text("partial")
            (tmp_path / "other").write_text("not this stage's")
            clock.now += 5
    assert (tmp_path / "other").exists()
    # The time of removed outputs does not count.
    assert work.seconds() == {"build": 5.0}


def test_redo_removes_a_link_and_keeps_its_target(tmp_path):
    elsewhere = tmp_path / "big_disk"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    work = WorkDirectory(tmp_path / "run", redo=True)
    with work.stage("build", {"a": 1}, [work / "shards"]):
        (work / "shards").symlink_to(elsewhere)
    with work.stage("build", {"a": 2}, [work / "shards"]):
        assert not (work / "shards").exists()
    assert (elsewhere / "precious").exists()


def test_a_redo_that_is_killed_runs_again(tmp_path):
    run_stage(WorkDirectory(tmp_path))
    with pytest.raises(Killed):
        run_stage(WorkDirectory(tmp_path, redo=True), {"seed": 5}, fail=True)
    assert not (tmp_path / "out").exists()
    assert run_stage(WorkDirectory(tmp_path), {"seed": 5})
    with pytest.raises(UserError):
        run_stage(WorkDirectory(tmp_path))


def test_seconds_add_up_over_interruptions(tmp_path, clock):
    for step, fail in ((2.5, True), (1.25, True), (4.0, False)):
        work = WorkDirectory(tmp_path)
        try:
            with work.stage("collect", INPUTS, [tmp_path / "out"]) as needed:
                assert needed
                clock.now += step
                if fail:
                    raise Killed
                (tmp_path / "out").write_text("complete")
        except Killed:
            pass
        clock.now += 1000
    assert WorkDirectory(tmp_path).seconds() == {"collect": 7.75}
    run_stage(WorkDirectory(tmp_path))  # skipped
    assert WorkDirectory(tmp_path).seconds() == {"collect": 7.75}


def test_a_new_directory_has_no_seconds(tmp_path):
    assert WorkDirectory(tmp_path / "new" / "run").seconds() == {}
    assert (tmp_path / "new" / "run").is_dir()


def test_a_file_is_no_work_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        WorkDirectory(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be created"):
        WorkDirectory(tmp_path / "file" / "below")


def test_identity_names_values():
    assert identity({"a": 1, "b": (2,)}) == identity({"b": [2], "a": 1})
    assert len({identity({"a": 1}), identity({"a": 2}), identity({"a": 1}, 2), identity()}) == 4
