"""Two processes train as one; when one is killed the other says so in one line, and a rerun resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import RESUMABLE

ROOT = Path(__file__).parents[2]
CHANGES = {"epochs": 1, "checkpoint_every": 5, "evaluate_every": 10, "learning_rate": 1e-3}
SECONDS = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory):
    """start(output, processes, kill, **changes) -> (output, [(exit status, stderr)] of every process); none may hang.

    changes: of the settings.
    """
    folder = tmp_path_factory.mktemp("hosts")
    mesh = config_lib.MeshConfig(data=2, fsdp=4)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(
        output: str, processes: int, kill: dict | None = None, *, shards: Path | None = None, **changes
    ) -> tuple[Path, list[tuple[int, str]]]:
        settings = toy.settings(**CHANGES | changes)
        experiment = msgspec.structs.replace(toy.experiment, mesh=mesh, reward_models=(settings,))
        arguments = {
            "experiment": config_lib.to_dict(experiment),
            "shards": str(shards or toy.shards),
            "base": str(toy.base),
            "output": str(folder / output),
            "coordinator": f"127.0.0.1:{free_port()}",
            "processes": processes,
            "kill": kill,
        }
        (folder / "arguments.json").write_text(json.dumps(arguments))
        command = [sys.executable, str(Path(__file__).with_name("hosts.py")), str(folder / "arguments.json")]
        running = [
            subprocess.Popen([*command, str(process)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for process in range(processes)
        ]
        try:
            errors = [host.communicate(timeout=SECONDS)[1] for host in running]
        finally:
            for host in running:
                host.kill()
        return folder / output, [(host.returncode, text) for host, text in zip(running, errors, strict=True)]

    return run


def losses(output: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in files.read_lines(output / "metrics.jsonl") if "loss" in line}


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive_the_loss_of_one(start):
    single, ((status, stderr),) = start("single", 1)
    assert status == 0, stderr[-3000:]

    lost, ended = start("two", 2, kill={"process": 1, "before": 8})
    assert [status for status, _ in ended] == [RESUMABLE, -signal.SIGKILL], ended[0][1][-3000:]
    reports = [line for line in ended[0][1].splitlines() if line.startswith("jaxprm: ")]
    assert len(reports) == 1 and "process 0 of 2: process 1 is gone" in reports[0]
    assert "Traceback" not in ended[0][1] and not (lost / "model").exists()
    # The rerun resumes from the last checkpoint, and metrics written past it are not doubled.
    resumed, ended = start("two", 2)
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-3000:]
    expected, actual = losses(single), losses(resumed)
    assert list(actual) == list(expected) == list(range(1, len(expected) + 1))
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-4)
    assert np.ptp(list(expected.values())) > 0.01
    assert (resumed / "model/model.safetensors").stat().st_size == (single / "model/model.safetensors").stat().st_size


@pytest.mark.slow
def test_two_processes_compute_hidden_states_once_and_train_the_head_as_one(start, toy, tmp_path):
    outputs = []
    for processes in (1, 2):
        # Each has shards of its own, and so hidden states of its own, which lie next to them.
        shards = tmp_path / str(processes) / "shards"
        shutil.copytree(toy.shards, shards)
        output, ended = start(f"head-{processes}", processes, shards=shards, trainable="head")
        assert [status for status, _ in ended] == [0] * processes, ended[0][1][-3000:]
        outputs.append(output)
    single, two = ([np.load(path) for path in sorted((tmp_path / name).rglob("*.npy"))] for name in ("1", "2"))
    assert len(single) == len(two) == 2
    for ours, expected in zip(two, single, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    expected, actual = (list(losses(output).values()) for output in outputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
