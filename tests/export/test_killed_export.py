"""SIGKILL in the middle of an export or of scoring: no incomplete output, and the same bytes after running again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm.export.export import MARKER, export
from jaxprm.scoring.files import LineCounts, score_file
from tests.model import tiny

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("killed_export.py")


def killed(*arguments) -> None:
    """Runs killed_export.py until it is ready, and kills it."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_reward_model(tmp_path_factory.mktemp("model"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_killed_export_leaves_no_output(model, tmp_path):
    output = tmp_path / "out"
    killed("export", model, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.partial"]
    assert MARKER in contents(tmp_path / ".out.partial")
    result = export(model, output, max_shard_size="40KB")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(output).keys() == {*result["files"], MARKER}


def test_an_earlier_export_survives_a_killed_one(model, tmp_path):
    output = tmp_path / "out"
    export(model, output)
    before = contents(output)
    killed("export", model, output)
    assert contents(output) == before


def test_killed_scoring_resumes_to_the_same_bytes(model, tmp_path):
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"id": str(n), "messages": tiny.conversation(n, turns=n % 4 + 1)}) for n in range(23)]
    lines[6] = "broken"
    input.write_text("\n".join(lines))
    score_file(model, input, tmp_path / "uninterrupted.jsonl", chunk=4)
    killed("score", model, input, output)
    assert not output.exists()
    partial = (tmp_path / "out.jsonl.partial").read_bytes()
    assert 12 <= partial.count(b"\n") < 23 and not partial.endswith(b"\n")
    assert score_file(model, input, output, chunk=4) == LineCounts(scored=22, errors=1)
    assert output.read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "uninterrupted.jsonl"}
