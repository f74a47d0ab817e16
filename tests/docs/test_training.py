"""docs/training.md: every command, executed in order on a few trajectories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jaxprm import cli
from tests.docs import pages

TINY = """
import msgspec
from jaxprm import config as lib

shipped = lib.load({shipped!r}, quick=True)
config = msgspec.structs.replace(
    shipped,
    collection=lib.Collection(train_tasks=2, validation_tasks=2, trajectories_per_task=2),
    data=msgspec.structs.replace(shipped.data, rows=2),
    reward_models=(lib.RewardModel(label="agentprm", epochs=1, gae_lambda=0.9),),
)
"""


def commands() -> list[list[str]]:
    text = (pages.ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    return pages.command_lines(text, "jaxprm")


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = pages.ROOT / "configs" / "textcraft_tiny.py"
    Path("configs").mkdir()
    Path("configs/textcraft_tiny.py").write_text(TINY.format(shipped=str(shipped)))
    for arguments in commands():
        if "--workdir" in arguments:
            workdir = Path(arguments[arguments.index("--workdir") + 1])
            if not workdir.exists() and Path("runs/demo").exists():
                # The same trajectories: it is the training that is looked at.
                shutil.copytree("runs/demo", workdir, ignore=shutil.ignore_patterns("reward_models", "train-*", "lock"))
        assert cli.main(arguments) == 0, arguments
        printed = capsys.readouterr().out
        if arguments[0] == "inspect":
            assert set(json.loads(printed)["fingerprints"]) == {"parameters", "optimizer"}
    assert {path.name for path in Path("runs").iterdir()} == {"demo", "low", "head", "logged"}
    for run in ("demo", "low", "head", "logged"):
        assert (Path("runs") / run / "reward_models/agentprm/seed-0/model/model.safetensors").is_file(), run
    assert list(Path("runs/head/features").glob("*/train/read_features.npy"))
    assert list(Path("runs/logged/reward_models/agentprm/seed-0/wandb").glob("offline-run-*/*.wandb"))
