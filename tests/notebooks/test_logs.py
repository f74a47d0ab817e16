"""A log is imported once; another log in the same work directory is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notebooks import colab, logs
from tests.notebooks.notebook import ROOT

SETTINGS = {"form": "openai", "outcome_field": "reward", "validation_share": 0.25}
OTHER = {"log": "other.jsonl"} | SETTINGS


def session() -> colab.Session:
    return colab.Session(ROOT, "cpu")


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_synthetic_log_of_the_first_hour_page_is_imported_once(tmp_path, capsys):
    imported = logs.import_log(session(), tmp_path, log="", **SETTINGS)
    rows = [json.loads(line) for line in imported.read_text().splitlines()]
    assert len(rows) == 240 and {row["split"] for row in rows} == {"train", "validation"}
    assert {row["outcome"] for row in rows} == {0.0, 1.0}
    written = imported.stat().st_mtime_ns
    capsys.readouterr()
    assert logs.import_log(session(), tmp_path, log="", **SETTINGS) == imported
    assert imported.stat().st_mtime_ns == written and "exists and is used" in capsys.readouterr().out
    with pytest.raises(colab.Stop, match=r"imported with log = '', now 'other.jsonl': use another WORKDIR"):
        logs.import_log(session(), tmp_path, **OTHER)


def test_trajectories_are_copied_unchanged(tmp_path):
    log = lines(tmp_path / "mine.jsonl", {"id": "a"})
    imported = logs.import_log(session(), tmp_path, log=str(log), **SETTINGS | {"form": "jaxprm"})
    assert imported.read_text() == log.read_text()


@pytest.mark.parametrize(
    "log, message", [("nowhere.jsonl", "LOG nowhere.jsonl: no such file"), ("upload", "which works only in Colab")]
)
def test_a_missing_log_is_rejected_and_can_be_replaced(tmp_path, log, message):
    with pytest.raises(colab.Stop, match=message):
        logs.import_log(session(), tmp_path, log=log, **SETTINGS | {"form": "jaxprm"})
    log = lines(tmp_path / "mine.jsonl", {"id": "a"})
    assert logs.import_log(session(), tmp_path, log=str(log), **SETTINGS | {"form": "jaxprm"}).is_file()


def test_a_tasks_best_and_worst_attempt_are_shown(tmp_path, capsys):
    call = {"function": {"name": "look", "arguments": "{}"}}
    messages = lambda text: [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    rows = [
        {"id": "x", "task": "same", "outcome": 1.0, "messages": messages("x")},
        {"id": "bad", "task": "t", "outcome": 0.0, "messages": messages("no\nidea")},
        {"id": "broken", "task": "t", "outcome": 0.1, "messages": messages("-")},
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


def test_first_copies_lines(tmp_path):
    source = lines(tmp_path / "source", {"a": 1}, {"a": 2}, {"a": 3})
    assert logs.first(source, tmp_path / "two", 2).read_text() == '{"a": 1}\n{"a": 2}\n'
    assert logs.first(source, tmp_path / "all", 9).read_text() == source.read_text()


def test_a_secret_comes_from_the_environment_or_is_reported_missing(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "value")
    assert logs.secret("SOME_TOKEN") == "value"
    monkeypatch.delenv("SOME_TOKEN")
    with pytest.raises(colab.Stop, match="secret SOME_TOKEN is missing .*key symbol"):
        logs.secret("SOME_TOKEN")
