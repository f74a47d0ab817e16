"""Commands in forked processes, and the inputs of a run that takes seconds."""

import json
import os
import shutil
import signal as signals
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.model import tiny

ROOT = Path(__file__).parents[2]
CONFIG = """
from jaxprm.config import *

config = Experiment(
    name="small",
    environment=EnvironmentConfig(name="tests.search.fakes:Walk"),
    policy=PolicyConfig(path="tests.search.fakes:SeededPolicy", max_tokens=100, max_action_tokens=28, in_flight=4),
    base_model={base!r},
    collection=CollectionConfig(trajectories_per_task=2),
    data=DataConfig(rows=2, length=128, steps_per_row=16, shards=2),
    reward_models=(RewardModelConfig(label="prm", epochs=1, evaluate_every=2, checkpoint_every=2),),
    search=SearchConfig(
        pool=2, best_of_n=(1, 2), prefix_best_of_n=(1, 2), beams=((2, 2),), stepwise=(), tasks=3, trees=1
    ),
    bootstrap_samples=20,
)
"""


class Done(NamedTuple):
    """A command that has ended, or was stopped: then its status is None."""

    pid: int
    status: int | None
    err: str
    events: list[str]

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Zygote:
    """A process whose children are the commands."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        # Programs are compiled once for all children.
        environment["JAX_COMPILATION_CACHE_DIR"] = self._cache = tempfile.mkdtemp(prefix="compiled-")
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT)

    def run(self, folder: Path, *argv, at=None, signal=None, log=False, user=None) -> Done:
        """Runs a command; see zygote.py."""
        request = {"argv": [str(argument) for argument in argv], "folder": str(folder), "at": at, "signal": signal}
        return self._ask(request | {"log": log, "user": user})

    def wait(self, pid: int) -> Done:
        """Continues a stopped command until it ends."""
        return self._ask({"wait": pid})

    def kill(self, pid: int) -> None:
        """Ends a stopped command."""
        os.kill(pid, signals.SIGKILL)
        assert self.wait(pid).status == -signals.SIGKILL

    def _ask(self, request: dict) -> Done:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote has died"
        return Done(**json.loads(answer))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._cache)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


class Inputs(NamedTuple):
    """The files that the commands read, and what an undisturbed run of each verb writes from them."""

    folder: Path
    config: Path
    model: Path
    trajectories: Path
    log: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def inputs() -> Iterator[Inputs]:
    # Not below pytest's folder, which other users cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="robustness-"))
    folder.chmod(0o755)
    base = tiny.write_policy(folder / "base")
    (folder / "config.py").write_text(CONFIG.format(base=str(base)))
    model = tiny.write_reward_model(folder / "model")
    rows = [
        {"id": str(number), "task": f"t{number % 3}", "outcome": number % 2}
        | {"messages": tiny.conversation(number, turns=number % 4 + 1)}
        for number in range(12)
    ]
    for name in ("trajectories", "log"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny.tokenizer_directory(), folder / "tokenizer")
    (folder / "tokenizer").chmod(0o755)
    yield Inputs(
        folder, folder / "config.py", model, folder / "trajectories.jsonl", folder / "log.jsonl", folder / "tokenizer"
    )
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def undisturbed(zygote, inputs) -> Path:
    """A finished work directory."""
    work = inputs.folder / "undisturbed"
    done = zygote.run(work, "report", inputs.config, "--workdir", work)
    assert done.status == 0, done.err[-3000:]
    return work


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that must be equal after a rerun: without times, logs of times, and locks."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        parts = set(path.relative_to(folder).parts)
        if not path.is_file() or parts & {"checkpoints", "tensorboard", "timing.jsonl", "lock", "stages"}:
            continue
        if name == "results.json":
            results = json.loads(path.read_bytes())
            del results["seconds"]
            kept[name] = json.dumps(results).encode()
        # The page shows the seconds of the stages.
        elif name != "report/index.html":
            kept[name] = path.read_bytes()
    return kept
