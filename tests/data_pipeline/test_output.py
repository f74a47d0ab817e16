"""Staged files and directories: complete, or as they were before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.output import backup_of, staged_directory, staged_file, staging_of, write_errors

ROOT = Path(__file__).parents[2]


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def fill(staging: Path, text: str) -> None:
    (staging / "deep").mkdir()
    (staging / "deep" / "a.txt").write_text(text)


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with staged_file(path) as file:
        file.write(b"one\n")
        assert not path.exists()
    assert contents(tmp_path) == {"deep/rows.jsonl": "one\n"}


def test_an_existing_file_is_overwritten_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(DataError, match="exists already and is not overwritten"), staged_file(path):
        pass
    with pytest.raises(DataError, match="a directory"), staged_file(tmp_path):
        pass
    assert contents(tmp_path) == {"rows.jsonl": "old"}
    with staged_file(path, overwrite=True) as file:
        file.write(b"new")
    assert contents(tmp_path) == {"rows.jsonl": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_after_an_error_a_file_is_what_it_was(tmp_path, error):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(error), staged_file(path, overwrite=True) as file:
        file.write(b"half")
        raise error
    assert contents(tmp_path) == {"rows.jsonl": "old"}


def test_a_directory_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "parent" / "model"
    with staged_directory(path) as staging:
        fill(staging, "new")
        assert staging == staging_of(path) and not path.exists()
    assert contents(tmp_path) == {"parent/model/deep/a.txt": "new"}


def test_a_directory_with_files_is_replaced_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    with staged_directory(path) as staging:  # an empty one is filled
        fill(staging, "old")
    with pytest.raises(DataError, match="exists already"), staged_directory(path):
        pass
    with staged_directory(path, overwrite=True, staging=tmp_path / "elsewhere") as staging:
        assert staging == tmp_path / "elsewhere"
        (staging / "b.txt").write_text("new")
        assert contents(path) == {"deep/a.txt": "old"}
    assert contents(tmp_path) == {"model/b.txt": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_after_an_error_a_directory_is_what_it_was(tmp_path, error):
    path = tmp_path / "model"
    with staged_directory(path) as staging:
        fill(staging, "old")
    with pytest.raises(error), staged_directory(path, overwrite=True) as staging:
        fill(staging, "new")
        raise error
    assert contents(tmp_path) == {"model/deep/a.txt": "old"}


def test_a_failed_rename_restores_the_earlier_directory(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with staged_directory(path) as staging:
        fill(staging, "old")
    rename = Path.rename

    def fail_on_staging(self, target):
        if self == staging_of(path):
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_staging)
    with pytest.raises(OSError, match="no rename"), staged_directory(path, overwrite=True) as staging:
        fill(staging, "new")
    assert contents(tmp_path) == {"model/deep/a.txt": "old"}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data_pipeline.output import staged_directory

rename, left = Path.rename, int(sys.argv[2])

def rename_or_die(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return rename(self, target)

Path.rename = rename_or_die
with staged_directory(sys.argv[1], overwrite=True) as staging:
    (staging / "a.txt").write_text("new")
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_the_renames_loses_nothing(tmp_path, renames):
    path = tmp_path / "model"
    with staged_directory(path) as staging:
        (staging / "a.txt").write_text("old")
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT)), str(path), str(renames)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    earlier = path if renames == 0 else backup_of(path)
    assert contents(earlier) == {"a.txt": "old"} and contents(staging_of(path)) == {"a.txt": "new"}
    with pytest.raises(ValueError), staged_directory(path, overwrite=True):
        assert contents(path) == {"a.txt": "old"}  # restored
        raise ValueError
    with staged_directory(path, overwrite=True) as staging:
        assert not os.listdir(staging)
        (staging / "a.txt").write_text("newer")
    assert contents(tmp_path) == {"model/a.txt": "newer"}


def test_write_errors_name_the_output(tmp_path):
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be written: No space left"), write_errors("x.jsonl"):
        raise OSError(28, "No space left on device")


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for content in ("first", "second"):
        with staged_directory(tmp_path / "link", overwrite=True) as staging:
            (staging / "file").write_text(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real/file").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
