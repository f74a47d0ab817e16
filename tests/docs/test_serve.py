"""docs/serve.md, executed: its commands, its client and its curl calls."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import jaxprm
from benchmarks import serve_load
from jaxprm import arguments as arguments_lib
from jaxprm.serving.requests import RequestLimits
from tests.docs import pages
from tests.model import tiny

PAGE = "serve.md"
MODEL = "runs/demo/reward_models/agentprm/seed-0"
TEXT = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and a reward model where the page expects the demo's."""
    folder = tmp_path_factory.mktemp("serve")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    tiny.write_reward_model(folder / MODEL / "model")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path):
    """The first command of the page, on a free port and with less to compile."""
    (arguments, _) = pages.shell(PAGE)
    assert arguments == ["-m", "jaxprm", "serve", "--model", MODEL]
    with serve_load.serving(folder / MODEL, "--max-tokens", "200", "--rows", "1") as server:
        yield server.port


@pytest.mark.slow
def test_the_client_gets_the_scores_of_the_model(folder, port, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    client = folder / "client.py"
    client.write_text(pages.files(PAGE)["client.py"].replace(":8000", f":{port}"))
    client_names = runpy.run_path(str(client))
    expected = jaxprm.load(MODEL).score_actions(client_names["messages"], client_names["candidates"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) == 2
    for line, score, candidate in zip(lines, expected, client_names["candidates"], strict=True):
        promise, progress, text = line.split(" ", 2)
        assert float(promise) == pytest.approx(score.promise, abs=1e-5)
        assert (progress, text) == ("None", candidate)


@pytest.mark.slow
def test_curl_gets_an_answer_from_every_endpoint(folder, port):
    (block,) = [block for block in pages.blocks(PAGE) if block.language == "bash"]
    answers = [
        subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
        for command in _commands(block.text.replace(":8000", f":{port}"))
    ]
    actions, classes, health, metrics = answers
    (score,) = json.loads(actions)["scores"]
    assert score["promise"] == pytest.approx(json.loads(classes)["data"][0]["probs"][0], abs=1e-5)
    assert json.loads(health)["status"] == "ready"
    assert 'jaxprm_requests_total{endpoint="/classify",status="200"}' in metrics


def _commands(text: str) -> list[str]:
    """Commands of a shell block; a command may continue on the next line."""
    return [line for line in text.replace("\\\n", "").splitlines() if line]


def test_a_public_host_is_refused_with_the_error_of_the_page(folder):
    (_, arguments) = pages.shell(PAGE)
    assert arguments[-2:] == ["--host", "0.0.0.0"]
    done = subprocess.run([sys.executable, *arguments], cwd=pages.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and f"    {done.stderr}" in TEXT


def test_the_limits_are_those_of_the_table():
    options = arguments_lib.parser().parse_args(["serve", "--model", MODEL])
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| (\d+) \|", TEXT, re.MULTILINE))
    assert len(rows) == 4
    for name, default in rows.items():
        assert getattr(options, name.replace("-", "_")) == int(default)
    limits = RequestLimits()
    assert f"up to {limits.batch} at a time" in TEXT and f"more than {limits.depth} deep" in TEXT
    assert f"more than {limits.body_seconds:g} seconds" in TEXT and f"more than {limits.held_bytes >> 20} MB" in TEXT
    assert limits.idle_seconds == 60 and "after a minute" in TEXT
    defaults = (limits.tokens, limits.candidates, limits.body_bytes, limits.waiting)
    assert defaults == (options.max_tokens, options.max_candidates, options.max_body, options.max_waiting)
