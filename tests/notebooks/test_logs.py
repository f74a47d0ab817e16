"""A log is imported once; another one under the same work directory is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notebooks import colab, logs
from tests.notebooks.notebook import ROOT

ASKED = {"form": "openai", "outcome_field": "reward", "validation_share": 0.25}
OTHER = {"log": "other.jsonl"} | ASKED


def session() -> colab.Session:
    return colab.Session(ROOT, "cpu")


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_made_up_log_is_the_first_hours_and_is_imported_once(tmp_path, capsys):
    found = logs.take(session(), tmp_path, log="", **ASKED)
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(rows) == 240 and {row["split"] for row in rows} == {"train", "validation"}
    assert {row["outcome"] for row in rows} == {0.0, 1.0}
    written = found.stat().st_mtime_ns
    capsys.readouterr()
    assert logs.take(session(), tmp_path, log="", **ASKED) == found
    assert found.stat().st_mtime_ns == written and "is there, and used" in capsys.readouterr().out
    with pytest.raises(colab.Stop, match=r"made with log = '', now 'other.jsonl': take another WORKDIR"):
        logs.take(session(), tmp_path, **OTHER)


def test_trajectories_are_taken_as_they_are(tmp_path):
    given = lines(tmp_path / "mine.jsonl", {"id": "a"})
    found = logs.take(session(), tmp_path, log=str(given), **ASKED | {"form": "jaxprm"})
    assert found.read_text() == given.read_text()


@pytest.mark.parametrize(
    "log, message", [("nowhere.jsonl", "LOG nowhere.jsonl: no such file"), ("upload", "which only Colab can do")]
)
def test_a_log_that_is_not_there_is_refused_and_can_be_mended(tmp_path, log, message):
    with pytest.raises(colab.Stop, match=message):
        logs.take(session(), tmp_path, log=log, **ASKED | {"form": "jaxprm"})
    given = lines(tmp_path / "mine.jsonl", {"id": "a"})
    assert logs.take(session(), tmp_path, log=str(given), **ASKED | {"form": "jaxprm"}).is_file()


def test_a_tasks_best_and_worst_attempt_are_shown(tmp_path, capsys):
    call = {"function": {"name": "look", "arguments": "{}"}}
    said = lambda text: [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    rows = [
        {"id": "x", "task": "same", "outcome": 1.0, "messages": said("x")},
        {"id": "bad", "task": "t", "outcome": 0.0, "messages": said("no\nidea")},
        {"id": "broken", "task": "t", "outcome": 0.1, "messages": said("-")},
        {
            "id": "good",
            "task": "t",
            "outcome": 1.0,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}],
        },
    ]
    step = {"message": 1, "promise": 0.25, "progress": None}
    scores = [{"steps": [step]}, {"steps": [step]}, {"error": "-"}, {"steps": [step | {"progress": -0.5}]}]
    logs.show(lines(tmp_path / "rows", *rows), lines(tmp_path / "scores", *scores))
    assert capsys.readouterr().out.splitlines() == [
        "good, outcome 1",
        "  promise  0.250  progress -0.500  look({})",
        "bad, outcome 0",
        "  promise  0.250  progress         no idea",
    ]
    logs.show(lines(tmp_path / "rows", *rows[:1]), lines(tmp_path / "scores", *scores[:1]))
    assert capsys.readouterr().out == "no task has attempts of different outcomes\n"


def test_the_first_lines_of_a_file_are_a_file(tmp_path):
    given = lines(tmp_path / "given", {"a": 1}, {"a": 2}, {"a": 3})
    assert logs.first(given, tmp_path / "two", 2).read_text() == '{"a": 1}\n{"a": 2}\n'
    assert logs.first(given, tmp_path / "all", 9).read_text() == given.read_text()


def test_a_secret_comes_from_the_environment_or_is_asked_for(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "value")
    assert logs.secret("SOME_TOKEN") == "value"
    monkeypatch.delenv("SOME_TOKEN")
    with pytest.raises(colab.Stop, match="no secret SOME_TOKEN .*key symbol"):
        logs.secret("SOME_TOKEN")
