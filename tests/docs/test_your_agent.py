"""docs/your-agent.md, executed with a small random reward model instead of the demo's."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import jaxprm
from jaxprm import cli
from tests.docs import pages
from tests.model import tiny

PAGE = "your-agent.md"
MODEL = "runs/demo/reward_models/agentprm/seed-0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and a reward model where the page expects the demo's."""
    folder = tmp_path_factory.mktemp("agent")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    tiny.write_reward_model(folder / MODEL / "model")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_the_loop_takes_the_candidate_of_highest_promise(capsys):
    """Each chosen action has a higher score than the other candidate, as scores of full conversations confirm."""
    agent = runpy.run_path("agent.py")
    actions = [index for index, message in enumerate(agent["messages"]) if message["role"] == "assistant"]
    printed = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    candidates = agent["propose"](None, 4)
    model = jaxprm.load(MODEL)
    for index, promise in list(zip(actions, printed, strict=True))[:4]:
        history = agent["messages"][:index]
        scores = [model.score([[*history, {"role": "assistant", "content": text}]])[0]["score"] for text in candidates]
        assert agent["messages"][index]["content"] == candidates[scores.index(max(scores))]
        assert promise == pytest.approx(max(scores), abs=1e-3)
        assert abs(scores[0] - scores[1]) > 2e-3  # or there was nothing to choose


def test_finished_conversations_have_promise_and_progress(capsys):
    finished = runpy.run_path("finished.py")
    first, second = finished["result"]["steps"]
    assert (first["message"], second["message"]) == (1, 3)
    assert first["progress"] is None
    assert second["progress"] == pytest.approx(second["promise"] - first["promise"], abs=1e-6)
    *history, last = finished["conversation"]
    (action,) = finished["model"].score_actions(history, [last["content"]])
    assert action == pytest.approx((second["promise"], second["progress"]), abs=1e-5)
    assert capsys.readouterr().out.splitlines()[-1] == f"score {second['promise']}"


def test_the_score_verb_writes_the_lines_that_the_page_shows(capsys):
    score = next(arguments for arguments in pages.shell(PAGE) if "score" in arguments)
    assert cli.main(score[2:]) == 1
    assert "1 errors" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    text = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    shown = [json.loads(line) for line in text.splitlines() if line.startswith('    {"id"')]
    assert len(shown) == len(lines) == 3
    for line, example in zip(lines, shown, strict=True):
        if "error" in example:
            assert line == example
            continue
        assert line.keys() == example.keys() and line["id"] == example["id"]
        kinds = lambda steps: [(step["message"], type(step["promise"]), type(step["progress"])) for step in steps]
        assert kinds(line["steps"]) == kinds(example["steps"])
        assert example["score"] == example["steps"][-1]["promise"] and line["score"] == line["steps"][-1]["promise"]


@pytest.mark.slow
def test_the_export_gives_transformers_the_same_promise():
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    export = next(arguments for arguments in pages.shell(PAGE) if "export" in arguments)
    for arguments in (export, ["outside.py"]):
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    messages = [
        {"role": "user", "content": "Goal: craft stick."},
        {"role": "assistant", "content": "Action: get 1 stick"},
    ]
    (ours,) = jaxprm.load(MODEL).score([messages])
    assert float(done.stdout) == pytest.approx(ours["score"], abs=1e-5)
