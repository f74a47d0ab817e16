"""docs/train-on-labels.md, executed unchanged, with a small random model as the base model."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import pytest

from data_pipeline.trajectory import read
from jaxprm import cli, config
from jaxprm.config.schema import LabelsConfig
from jaxprm.objectives import OBJECTIVES
from tests.docs import base_model, pages

PAGE = "train-on-labels.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    base_model.write(folder / "models/base")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(command: list[str]) -> int:
    if command[0].startswith("make_"):
        runpy.run_path(command[0])
        return 0
    assert command[:2] == ["-m", "jaxprm"]
    return cli.main(command[2:])


def commands(kind: str) -> list[list[str]]:
    texts = [block.text for block in pages.blocks(PAGE) if (block.language, block.name) == ("sh", kind)]
    return [shlex.split(line)[1:] for text in texts for line in text.splitlines()]


def text() -> str:
    return (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")


def test_the_quick_commands_run(capsys):
    for command in commands(""):
        assert run(command) == 0
    rows = list(read("labelled.jsonl"))
    assert len(rows) == 120 and {label for row in rows for label in row.step_labels} == {0.0, 1.0}
    for name in ("steps.py", "pairs.py"):
        assert config.load(name).reward_models[0].objective in ("step_labels", "preference")


def test_the_page_has_every_field_and_every_objective():
    page = text()
    for field in LabelsConfig.__struct_fields__:
        assert f"| `{field}` |" in page
    assert all(f"`{name}`" in page for name in OBJECTIVES)


@pytest.mark.slow
def test_the_page_trains_evaluates_and_exports(capsys):
    if not Path("labelled.jsonl").exists():
        for command in commands(""):
            assert run(command) == 0
    printed = []
    for command in commands("slow"):
        assert run(command) == 0, (command, capsys.readouterr().err)
        printed.append(capsys.readouterr().out)
    recipe = json.loads(Path("runs/steps/reward_models/labels/seed-0/model/reward_model.json").read_text())
    assert recipe["targets"]["labels"] == {"loss": "bce", "weight": 0.0, "range": [0.0, 1.0]}
    assert "label_auroc" in printed[1] and "160 steps; 0 with an outcome, 40 with step labels" in printed[2]
    exported = json.loads(Path("my-prm/config.json").read_text())
    assert exported["architectures"] == ["Qwen2ForTokenClassification"] and exported["num_labels"] == 2
    assert "pair_accuracy" in printed[5] and "40 pairs in 40 states of 40 tasks" in printed[6]
    pairs = json.loads(Path("pairs.json").read_text())
    assert 0 <= next(iter(pairs["pairs"]["models"].values()))["pairwise_accuracy"]["mean"] <= 1
