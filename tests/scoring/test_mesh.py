"""A search scored on several devices: the same scores and costs as on one, with cache and parameters split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxprm
from jaxprm import cli, files
from jaxprm.errors import UserError
from tests.model import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_scores_do_not_depend_on_the_mesh(tmp_path):
    directory = tiny.write_reward_model(tmp_path / "model")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, str(Path(__file__).with_name("on_meshes.py")), str(directory)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, *others = reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 4
    for report in reports:
        assert report["difference"] < 1e-5 and report["repeat"] < 1e-5, report
        assert report["encoded"] == alone["encoded"]
        assert report["compiled_again"] == 0, report
    assert alone["cache"] == []
    for report in others:
        if "tensor" in report["mesh"]:
            # Slots are replicated, kv heads split. Of a matrix [L, D, H * E] the heads are split, and D over fsdp.
            assert report["cache"] == report["ring"] == [None, "tensor"], report
            assert report["query"] == [None, "fsdp", "tensor"], report
    # The command too: rows over all devices by default, or as --mesh says.
    lines = [{"id": str(seed), "messages": tiny.conversation(seed)} for seed in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(map(files.line, lines)))
    scores = {}
    for name, options, devices in (("one", [], 1), ("rows", [], 8), ("heads", ["--mesh", "tensor=2"], 8)):
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", "jaxprm", "score", "--model", str(directory), *options]
        command += ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / name)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        scores[name] = [line["score"] for line in files.read_lines(tmp_path / name)]
    tiny.assert_close(scores["rows"], scores["one"])
    tiny.assert_close(scores["heads"], scores["one"])


def test_a_mesh_that_cannot_be_is_one_line(tmp_path, capsys):
    directory = tiny.write_reward_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"mesh: no axis 'heads'; axes are data, fsdp, tensor, sequence, dcn_data"):
        jaxprm.load(directory, mesh={"heads": 2})
    with pytest.raises(UserError, match=r"mesh\.tensor = 3.*number of devices"):
        jaxprm.load(directory, mesh={"tensor": 3, "data": 1})
    assert cli.main(["serve", "--model", str(directory), "--port", "0", "--mesh", "data=1,tensor=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mesh.tensor = 3" in line
