"""Trainings in processes of their own that are killed, and what must be equal when they were resumed to their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.artifacts.checkpoints import inspect
from jaxprm.errors import RESUMABLE
from tests.training.toy import Run

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL
CHANGES = {"epochs": 2, "checkpoint_every": 6, "evaluate_every": 15, "target_update": "ema", "bootstrap": "state"}


class Process(NamedTuple):
    """One that has ended: its output, exit status, the batch it began with, if it took any, and its stderr."""

    output: Path
    status: int
    began: int | None
    said: str


class Trainer:
    """Trains a toy below `folder`; compiled programs are shared, for it is the resumption that is looked at."""

    def __init__(self, folder: Path, toy: Run, **changes):
        self._folder, self._toy = folder, toy
        self._experiment = msgspec.structs.replace(toy.experiment, reward_models=(toy.settings(**CHANGES | changes),))
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def __call__(self, output: str, **how) -> Process:
        """One process, to its end or its death; how: see killed_training.py."""
        arguments = {
            "experiment": config_lib.to_dict(self._experiment),
            "shards": str(self._toy.shards),
            "base": str(self._toy.base),
            "output": str(self._folder / output),
            **how,
        }
        written = self._folder / "arguments.json"
        written.write_text(json.dumps(arguments))
        command = [sys.executable, str(Path(__file__).with_name("killed_training.py")), str(written)]
        done = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, RESUMABLE, KILLED), done.stderr[-3000:]
        began = json.loads(done.stdout.splitlines()[0])["began"] if done.stdout else None
        return Process(self._folder / output, done.returncode, began, done.stderr)


def result(output: Path) -> dict[str, str]:
    """What two runs that end with the same bits have in common: fingerprints, and digests of what was written."""
    found = inspect(output)
    digests = {name: files.sha256(output / name) for name in ("model/model.safetensors", "metrics.jsonl")}
    return {"step": str(found["step"])} | found["fingerprints"] | digests
