"""Weights & Biases: the calls it gets, recorded by a fake module, and the files of its own offline mode."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.training import metrics
from jaxprm.training.metrics import WandbSink
from jaxprm.training.train import train_reward_model
from jaxprm.workflow import run

SECRET = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


class Fake(types.ModuleType):
    """Records the calls of a run."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished, self.metrics, self.refuses = [], [], [], [], None
        self.url = "https://wandb.example/run"

    def Settings(self, **settings):
        return settings

    def Histogram(self, *, np_histogram):
        return np_histogram

    def init(self, **arguments):
        if self.refuses:
            raise self.errors.Error(self.refuses)
        self.inits.append(arguments)
        return self

    def define_metric(self, name, **how):
        self.metrics.append((name, how))

    def log(self, numbers):
        self.logged.append(numbers)

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def fake(monkeypatch) -> Fake:
    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return module


def opened(output: Path, mode: str = "online", **settings) -> WandbSink:
    return WandbSink(config_lib.LoggingConfig(wandb=mode, **settings), output, name="a", group="b", config={"rows": 2})


def test_everything_is_keyed_by_the_step(tmp_path, fake):
    sink = opened(tmp_path, project="p", entity="e")
    sink.scalars({"training/loss": 0.5, "training/auroc": None}, 7)
    sink.histogram("validation/values", np.array([0.0, 1.0]), 7, weights=np.array([1.0, 2.0]))
    sink.close(failed=True)
    assert ("*", {"step_metric": "step"}) in fake.metrics
    scalars, histogram = fake.logged
    assert scalars == {"training/loss": 0.5, "step": 7}
    counts, edges = histogram["validation/values"]
    assert (counts[0], counts[-1], counts.sum(), len(edges)) == (1, 2, 3, metrics.BINS + 1)
    assert histogram["step"] == 7
    assert fake.finished == [1]
    (init,) = fake.inits
    assert (init["project"], init["entity"], init["mode"], init["config"]) == ("p", "e", "online", {"rows": 2})
    assert init["settings"]["disable_git"] and init["settings"]["console"] == "off"


def test_the_next_process_resumes_the_same_run_and_another_training_run_does_not(tmp_path, fake):
    for folder in ("one", "one", "two"):
        opened(tmp_path / folder).close(failed=False)
    first, second, other = (init["id"] for init in fake.inits)
    assert first == second != other and len(first) > 8
    assert [init["resume"] for init in fake.inits] == ["allow"] * 3


def test_the_key_is_nowhere_but_in_the_environment(tmp_path, fake, capsys):
    sink = opened(tmp_path)
    sink.scalars({"training/loss": 0.5}, 1)
    sink.close(failed=False)
    assert SECRET not in repr((fake.inits, fake.logged)) + "".join(capsys.readouterr())
    fake.refuses = f"key {SECRET}\n is not known"
    with pytest.raises(UserError, match="logging.wandb = online: key .key. is not known; fix it") as raised:
        opened(tmp_path)
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_missing_key_or_package_is_an_error_before_any_work(tmp_path, fake, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    online = config_lib.Experiment(name="x", logging=config_lib.LoggingConfig(wandb="online"))
    with pytest.raises(UserError, match="logging.wandb = online: the environment has no WANDB_API_KEY; set it, or"):
        run.run(online, tmp_path / "run", until="train")
    assert not (tmp_path / "run/trajectories").exists()
    metrics.check_wandb(config_lib.LoggingConfig(wandb="offline"))
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="logging.wandb = offline: the package wandb is not installed; pip install"):
        opened(tmp_path, "offline")
    metrics.check_wandb(config_lib.LoggingConfig())
    assert not fake.inits


def test_a_resumed_training_run_logs_every_step_to_one_wandb_run(toy, tmp_path, fake, monkeypatch):
    experiment = msgspec.structs.replace(toy.experiment, logging=config_lib.LoggingConfig(wandb="online"))
    settings = toy.settings(epochs=1, evaluate_every=4, checkpoint_every=4)
    paths = {"shards": toy.shards, "base": toy.base, "output": tmp_path}
    log = fake.log

    def dies(numbers):
        log(numbers)
        if numbers["step"] == 6:
            raise RuntimeError("killed")

    monkeypatch.setattr(fake, "log", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_reward_model(experiment, settings, 0, **paths)
    monkeypatch.setattr(fake, "log", log)
    train_reward_model(experiment, settings, 0, **paths)
    assert fake.finished == [1, 0] and len({init["id"] for init in fake.inits}) == 1
    losses = [(line["step"], line["training/loss"]) for line in fake.logged if "training/loss" in line]
    kept = {line["step"]: line["loss"] for line in files.read_lines(tmp_path / "metrics.jsonl") if "loss" in line}
    # From the checkpoint of step 4 on again: twice the same number at the same step.
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, *range(5, len(kept) + 1)]
    assert all(kept[step] == loss for step, loss in losses)
    assert any("validation/auroc" in line for line in fake.logged)
    assert fake.inits[0]["config"]["learning_rate"] == settings.learning_rate
    assert fake.inits[0]["name"] == "toy, seed 0" and fake.inits[0]["group"] == "toy"


OFFLINE = """
import sys
from pathlib import Path
import numpy as np
from jaxprm import config
from jaxprm.training.metrics import WandbSink

for _ in range(2):
    sink = WandbSink(config.Logging(wandb="offline"), Path(sys.argv[1]), name="a", group="b", config={"rows": 2})
    sink.scalars({"training/loss": 0.5}, 1)
    sink.histogram("validation/values", np.array([0.0, 1.0]), 1, weights=np.ones(2))
    sink.close(failed=False)
"""


@pytest.mark.slow
def test_offline_the_package_itself_writes_files_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(output)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = list((output / "wandb").glob("offline-run-*/*.wandb"))
    identity = files.read_json(output / "wandb.json")["id"]
    assert runs and {path.stem for path in runs} == {f"run-{identity}"}
    content = b"".join(path.read_bytes() for path in runs)
    assert b"training/loss" in content and b"validation/values" in content
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert SECRET not in done.stdout + done.stderr
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
