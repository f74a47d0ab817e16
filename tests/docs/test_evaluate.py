"""docs/evaluate.md, executed with a small random reward model instead of the demo's."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout

import pytest

from jaxprm import cli
from jaxprm.evaluation.labels import KINDS
from jaxprm.evaluation.step_metrics import METRICS, TERNARY
from tests.docs import pages
from tests.model import tiny

PAGE = "evaluate.md"
TEXT = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """The page's command, executed: (its table, its JSON)."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    tiny.write_reward_model(folder / "runs/demo/reward_models/agentprm/seed-0/model")
    (_, module, *arguments), *_ = pages.shell(PAGE)
    assert module == "jaxprm"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with redirect_stdout(io.StringIO()) as printed:
            assert cli.main(arguments) == 0
    return printed.getvalue(), json.loads((folder / "evaluation.json").read_text())


def test_the_commands_without_a_reward_model_run(done, tmp_path, monkeypatch, capsys):
    for name, text in pages.files(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tiny.write_reward_model(tmp_path / "runs/demo/reward_models/agentprm/seed-0/model")
    for name in ("policy", "start"):
        tiny.write_policy(tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    _, *commands = pages.shell(PAGE)
    assert [arguments[2] for arguments in commands] == ["evaluate", "score"]
    for _, _, *arguments in commands:
        assert cli.main(arguments) == 0
    assert "log-ratio of models/policy and models/start, progress" in capsys.readouterr().out
    line = json.loads((tmp_path / "log-ratios.jsonl").read_text().splitlines()[0])
    assert [step.keys() for step in line["steps"]] == [{"message", "log_ratio"}] * 2 and line["score"] == 0.0


def section(title: str) -> str:
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return section[1]


def numbers(title: str) -> set[str]:
    """The first column of a section's table of numbers, one name per row."""
    table = section(title).partition("| number |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    return {name for cell in cells if cell != "---" for name in cell.split(", ")}


def test_the_example_has_two_attempts_at_two_tasks_with_labels(done):
    table, report = done
    counts = report["counts"]
    assert (counts["trajectories"], counts["tasks"], counts["with_labels"], counts["null_labels"]) == (4, 2, 4, 1)
    assert report["labels"]["kind"] == "binary"
    assert report["labels"]["parts"]["validation"]["tasks"] == report["labels"]["parts"]["test"]["tasks"] == 1


def test_every_printed_number_is_explained(done):
    table, report = done
    lines = table.splitlines()
    header = next(line for line in lines if "explained variance" in line)
    shown = set(re.split(r"  +", header.strip()))
    assert shown == numbers("Against outcomes")
    explained = numbers("Against step labels")
    for corner in ("steps", "first errors"):
        header = next(line for line in lines if re.match(rf"{corner}  ", line))
        assert set(re.split(r"  +", header.strip())) - {corner, "threshold"} <= explained
    titled = {name.replace("_", " ").replace("f1", "F1") for name in [*METRICS, TERNARY]}
    assert (
        titled | {"argmin accuracy", "AUROC", "AUROC within task", "correlation", "rank correlation", "mse"}
        == explained
    )


def test_the_kinds_and_the_baselines_are_the_programs(done):
    table, report = done
    assert set(re.findall(r"^\| `([\w-]+)` \|", section("Against step labels"), re.MULTILINE)) == set(KINDS)
    for part in ("outcomes", "step_labels"):
        for name in report[part]["baselines"]:
            assert f"**{name.replace('_', ' ')}**" in TEXT
    for column in ("random", "final", "mean", "min", "oracle", "gain"):
        assert f"`{column}`" in section("Against outcomes")


def test_the_json_is_described(done):
    _, report = done
    formats = (pages.ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    described = re.search(r"^## Evaluations\n(.*?)(?=^## )", formats, re.MULTILINE | re.DOTALL)[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", described, re.MULTILINE))
    assert set(rows) == set(report)
    for key in ("input", "counts", "bootstrap", "labels"):
        assert set(report[key]) <= set(re.findall(r"`(\w+)`", rows[key]))
    (judged,) = report["outcomes"]["models"].values()
    assert set(judged) <= set(re.findall(r"`(\w+)`", rows["outcomes"]))
    assert set(judged["summary"]) <= set(re.findall(r"`(\w+)`", described))
    assert {"depth", "success", "failure", "auroc", "auroc_within_task"} < set(judged["by_depth"][0])
