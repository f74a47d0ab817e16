"""Training runs in processes of their own that are killed, and the digests that must be equal once they are resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.toy import Toy
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.artifacts.checkpoints import inspect
from jaxprm.errors import RESUMABLE

ROOT = Path(__file__).parents[1]
KILLED = -signal.SIGKILL
CHANGES = {"epochs": 2, "checkpoint_every": 6, "evaluate_every": 15, "target_update": "ema", "bootstrap": "state"}


class EndedProcess(NamedTuple):
    """A process that has ended: its output, exit status, the first batch it took (None if it took none), its stderr."""

    output: Path
    status: int
    began: int | None
    stderr: str


class Trainer:
    """Starts training runs on the toy, in subfolders of `folder`."""

    def __init__(self, folder: Path, toy: Toy, **changes):
        self._folder, self._toy = folder, toy
        self._experiment = msgspec.structs.replace(toy.experiment, reward_models=(toy.settings(**CHANGES | changes),))
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            # Shared, because a process is started many times and compilation is not what is tested.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def __call__(self, output: str, **kill) -> EndedProcess:
        """Runs one process until it ends or is killed; for the arguments see killed_training.py."""
        arguments = {
            "experiment": config_lib.to_dict(self._experiment),
            "shards": str(self._toy.shards),
            "base": str(self._toy.base),
            "output": str(self._folder / output),
            **kill,
        }
        path = self._folder / "arguments.json"
        path.write_text(json.dumps(arguments))
        command = [sys.executable, str(Path(__file__).with_name("killed_training.py")), str(path)]
        done = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, RESUMABLE, KILLED), done.stderr[-3000:]
        began = json.loads(done.stdout.splitlines()[0])["began"] if done.stdout else None
        return EndedProcess(self._folder / output, done.returncode, began, done.stderr)


def result(output: Path) -> dict[str, str]:
    """What runs that end with the same bits have in common: fingerprints of the state, digests of written files."""
    checkpoint = inspect(output)
    digests = {name: files.sha256(output / name) for name in ("model/model.safetensors", "metrics.jsonl")}
    return {"step": str(checkpoint["step"])} | checkpoint["fingerprints"] | digests
