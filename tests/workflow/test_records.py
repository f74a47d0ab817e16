"""A work directory that was copied by half is refused by the first file that differs, before any work."""

import json
import shutil
from pathlib import Path

import pytest

from jaxprm.errors import UserError
from jaxprm.workflow.records import file_record
from jaxprm.workflow.workdir import WorkDirectory

INPUTS = {"seed": 0}
LINES = "".join(json.dumps({"id": str(number), "values": [0.5]}) + "\n" for number in range(24))


def run(path: Path, *, ran=None):
    """Two stages: one of a file, one of a directory. Returns which had to run."""
    work = WorkDirectory(path)
    ran = []
    with work.stage("collect", INPUTS, [work / "trajectories/train.jsonl"]) as needed:
        if needed:
            ran.append("collect")
            (path / "trajectories").mkdir(exist_ok=True)
            (path / "trajectories/train.jsonl").write_text(LINES)
    with work.stage("train", INPUTS, [work / "models/a"]) as needed:
        if needed:
            ran.append("train")
            for name in ("checkpoints/100/x", "model/weights", "metrics.jsonl", "timing.jsonl", "profile/trace"):
                (path / "models/a" / name).parent.mkdir(parents=True, exist_ok=True)
                (path / "models/a" / name).write_text('{"step": 1}\n')
    return ran


@pytest.fixture
def finished(tmp_path):
    assert run(tmp_path / "w") == ["collect", "train"]
    return tmp_path / "w"


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:14]))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def duplicate(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0] + path.read_text())


@pytest.mark.parametrize(
    ("name", "damage", "problem", "output"),
    [
        ("trajectories/train.jsonl", cut, "has 14 lines, ", "trajectories/train.jsonl"),
        ("trajectories/train.jsonl", lambda path: path.write_text(""), "has 0 lines, 0 bytes", None),
        ("trajectories/train.jsonl", flip, "has sha256 ", None),
        ("trajectories/train.jsonl", duplicate, "has 25 lines, ", None),
        ("models/a/metrics.jsonl", lambda path: path.write_text(""), "has 0 lines, 0 bytes", "models/a"),
        ("models/a/model/weights", flip, "has sha256 ", "models/a"),
        ("models/a/model/weights", Path.unlink, "is missing", "models/a"),
        ("models/a/model", shutil.rmtree, "is missing", "models/a"),
    ],
)
def test_a_damaged_output_is_named_with_what_it_was_and_what_to_do(finished, name, damage, problem, output):
    damage(finished / name)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refused:
        WorkDirectory(finished).check({"collect": INPUTS, "train": INPUTS})
    message = str(refused.value)
    assert message.startswith(f"{finished / name}") and problem in message and "\n" not in message
    assert f"delete {finished / (output or name)} to run the stage again" in message
    if "has" in problem and "sha256" not in problem and "train.jsonl" in name:
        assert f"stage collect wrote 24 lines, {len(LINES)} bytes" in message
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_the_advice_works(finished):
    cut(finished / "trajectories/train.jsonl")
    (finished / "trajectories/train.jsonl").unlink()
    assert run(finished) == ["collect"]
    flip(finished / "models/a/model/weights")
    shutil.rmtree(finished / "models/a")
    assert run(finished) == ["train"]
    assert run(finished) == []


def test_files_that_no_stage_reads_may_change(finished):
    for folder in ("checkpoints", "profile"):
        shutil.rmtree(finished / "models/a" / folder)
    (finished / "models/a/timing.jsonl").unlink()
    (finished / "models/a/notes.txt").touch()
    assert run(finished) == []


def test_a_trace_that_an_earlier_version_recorded_may_be_deleted(finished):
    file = finished / "stages/train.json"
    record = json.loads(file.read_text())
    assert not any("profile" in name for name in record["files"])
    record["files"]["models/a/profile/trace"] = record["files"]["models/a/metrics.jsonl"]
    file.write_text(json.dumps(record))
    shutil.rmtree(finished / "models/a/profile")
    assert run(finished) == []


def test_a_stage_made_again_with_another_result_is_said(finished, capsys):
    record = json.loads((finished / "stages/collect.json").read_text())
    (finished / "trajectories/train.jsonl").unlink()
    record["files"]["trajectories/train.jsonl"]["sha256"] = "0" * 64
    (finished / "stages/collect.json").write_text(json.dumps(record))
    assert run(finished) == ["collect"]
    assert "stage collect: was made again, with another result" in capsys.readouterr().err


def test_records_of_earlier_versions_are_not_verified(finished):
    for path in (finished / "stages").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: record[name] for name in ("inputs", "finished", "seconds")}))
    cut(finished / "trajectories/train.jsonl")
    assert run(finished) == []


@pytest.mark.parametrize("content", [b'{"inputs": {"seed"', b"", b"\xff", b"[]", b'{"inputs": 5}', b"[" * 100_000])
def test_a_half_written_record_is_one_line(finished, content):
    (finished / "stages/collect.json").write_bytes(content)
    for use in (lambda: run(finished), WorkDirectory(finished).seconds):
        with pytest.raises(
            UserError, match=r"stages/collect\.json: damaged \(.*\); copy it again, or delete it"
        ) as error:
            use()
        assert "\n" not in str(error.value)
    (finished / "stages/collect.json").unlink()
    assert run(finished) == ["collect"]


def test_a_stage_that_failed_before_it_left_anything_does_not_bind(tmp_path):
    work = WorkDirectory(tmp_path)
    with pytest.raises(ValueError), work.stage("collect", {"file": "bad"}, [work / "out"]):
        raise ValueError
    assert not work.has_begun("collect")
    with work.stage("collect", {"file": "fixed"}, [work / "out"]) as needed:
        assert needed
        (work / "out").touch()
    assert work.has_begun("collect")
    with pytest.raises(UserError, match="file = 'fixed', now 'bad'"):
        work.check({"collect": {"file": "bad"}})


def test_what_is_recorded_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc\n")
    record = file_record(tmp_path / "x")
    # sha256sum of "abc\n"
    assert record.sha256 == "edeaaff3f1774ad2888673770c6d64097e391bc362d7d6fb34982ddf0efd18cb"
    assert (record.bytes, record.lines) == (4, 1)
