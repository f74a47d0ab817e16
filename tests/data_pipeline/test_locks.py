"""One writer for each output: a second is refused by name, a dead one never blocks, and foreign files stay."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import locks
from data_pipeline.errors import DataError
from data_pipeline.locks import locked
from data_pipeline.output import backup_of, lock_of, staged_directory, staged_file, staging_file_of, staging_of

ROOT = Path(__file__).parents[2]
# Holds the lock of an output, makes its staging path, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from data_pipeline.locks import locked
from data_pipeline.output import staging_file_of

output = Path(sys.argv[1])
with locked(output, staging=[staging_file_of(output)]):
    staging_file_of(output).write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_holder(output: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"ready\n"
    return holder


def write(output: Path, text: bytes) -> None:
    with locked(output, staging=[staging_file_of(output)]), staged_file(output, overwrite=True) as file:
        file.write(text)


def test_a_second_writer_is_refused_with_the_first_by_its_number_also_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    holder = start_holder(tmp_path / "real" / "out")
    try:
        for output in (tmp_path / "real/out", tmp_path / "link/out"):
            with pytest.raises(DataError) as refused:
                write(output, b"other")
            assert str(refused.value) == (
                f"output {output}: process {holder.pid} is writing it; wait until it ends, or name another output"
            )
        write(tmp_path / "real" / "other", b"free")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert not (tmp_path / "real/out").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_does_not_block_and_its_staging_path_is_replaced(tmp_path, how):
    output = tmp_path / "out"
    holder = start_holder(output)
    holder.send_signal(how)
    holder.wait()
    holder.stdout.close()
    assert names(tmp_path) == [".out.lock", ".out.tmp"]
    write(output, b"new")
    assert output.read_bytes() == b"new" and names(tmp_path) == ["out"]


def test_a_holder_on_another_host_is_named_with_its_host(tmp_path, monkeypatch):
    output = tmp_path / "out"
    with locked(output):
        # What another host would have written; this process holds the lock that a server would.
        content = {"pid": 7, "host": "elsewhere", "staging": []}
        with lock_of(output).open("r+b") as file:
            file.write(json.dumps(content).encode().ljust(lock_of(output).stat().st_size))
        with pytest.raises(DataError, match="process 7 on elsewhere is writing it"), locked(output):
            pass


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_staging_path_of_others_is_refused_and_stays(tmp_path, make):
    output = tmp_path / "out"
    make(staging_file_of(output))
    with pytest.raises(DataError, match=r"\.out\.tmp: exists, and no interrupted command left it"):
        write(output, b"new")
    assert names(tmp_path) == [".out.tmp"]
    with locked(output, staging=[staging_file_of(output)], is_ours=lambda path: path.name == ".out.tmp"):
        pass


def test_a_foreign_backup_is_never_removed(tmp_path):
    output = tmp_path / "set"
    backup_of(output).mkdir()
    (backup_of(output) / "thesis.tex").touch()
    output.mkdir()
    staging = (staging_of(output), backup_of(output))
    with (
        pytest.raises(DataError, match="move or delete it"),
        locked(output, staging=staging),
        staged_directory(output, overwrite=True),
    ):
        pass
    assert names(tmp_path) == [".set.old", "set"] and names(backup_of(output)) == ["thesis.tex"]


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    output, flock, calls = tmp_path / "out", locks.fcntl.flock, []

    def remove_first(file, operation):
        if not calls:
            lock_of(output).unlink()
        calls.append(operation)
        return flock(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", remove_first)
    with locked(output):
        assert lock_of(output).exists()
        with pytest.raises(DataError, match=f"process {os.getpid()} is writing"), locked(output):
            pass
    assert len(calls) == 3 and names(tmp_path) == []


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    write(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert "no locks" in capsys.readouterr().err


def test_the_names_of_a_killed_process_survive_a_full_disk(tmp_path, monkeypatch):
    output = tmp_path / "out"
    staging_file_of(output).touch()
    left = {"pid": 2**30, "host": platform.node(), "staging": [".out.tmp"]}
    lock_of(output).write_text(json.dumps(left))

    class Full(locks.LockFile):
        def _write(self):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr(locks, "LockFile", Full)
        write(output, b"new")
    assert json.loads(lock_of(output).read_text()) == left
    write(output, b"new")
    assert names(tmp_path) == ["out"]
