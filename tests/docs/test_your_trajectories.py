"""docs/your-trajectories.md, executed unchanged, with a small random model as the base model."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import build
from data_pipeline.encode import Encoder
from data_pipeline.importers import registry
from data_pipeline.metadata import Metadata
from data_pipeline.trajectory import read
from jaxprm import cli
from tests.data_pipeline import beam_environment
from tests.docs import base_model, pages

PAGE = "your-trajectories.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files and a base model; its template, like many, has no tool calls."""
    folder = tmp_path_factory.mktemp("trajectories")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    base_model.write(folder / "models/base")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(command: list[str]) -> int:
    if command[0] == "make_log.py":
        runpy.run_path("make_log.py")
        return 0
    main = {"jaxprm": cli.main, "data_pipeline.build": build.main}[command[1]]
    return main(command[2:])


def commands(kind: str) -> list[list[str]]:
    texts = [
        block.text.replace("\\\n", " ") for block in pages.blocks(PAGE) if (block.language, block.name) == ("sh", kind)
    ]
    return [shlex.split(line)[1:] for text in texts for line in text.splitlines()]


def shown() -> list[str]:
    text = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    return [line[4:] for line in text.splitlines() if line.startswith("    ") and not line.startswith("     -")]


def test_the_quick_commands_run(folder, capsys):
    outputs = []
    for command in commands(""):
        if "validate" in command and "--chat-template" in command:
            own = [part for part in command if part not in ("--chat-template", "chatml")]
            assert run(own) == 1
            error = next(line for line in capsys.readouterr().out.splitlines() if "trajectories.jsonl:1 " in line)
            assert error.strip() in shown()
        assert run(command) == 0
        outputs.append(capsys.readouterr())
    _, imported, counted, encoded, built = outputs
    lines = imported.out.splitlines() + [
        line for line in imported.err.splitlines() if "bad row" in line or "log.jsonl" in line
    ]
    assert lines == [line for line in shown() if line in lines] and len(lines) == 6
    assert "36 rows, 36 trajectories, 0 bad" in counted.out
    assert "tasks: 12, 12 with several attempts" in counted.out and "in 8 (66.7%) their outcomes differ" in counted.out
    assert "longer than 1024 tokens: 0" in encoded.out
    assert built.out.startswith("train: 27 rows") and Metadata.load("shards").splits["validation"].rows == 9


def test_the_log_of_the_page_is_imported_unchanged(folder):
    run(["make_log.py"])
    first = json.loads(Path("log.jsonl").read_text().splitlines()[0])
    import_command = next(command for command in commands("") if "import-trajectories" in command)
    Path("trajectories.jsonl").unlink(missing_ok=True)
    assert run(import_command) == 0
    trajectory = next(read("trajectories.jsonl"))
    assert (trajectory.id, trajectory.task, trajectory.outcome) == ("0-0", "find-0", 1.0)
    assert [message.role for message in trajectory.messages] == [message["role"] for message in first["messages"]]
    assert trajectory.tools == first["tools"] and trajectory.meta == {"metrics": {"reward": 100}}


def samples(folder: Path) -> None:
    """The logs that the table of formats names, from the cases of the importers."""
    cases = pages.ROOT / "tests/data_pipeline/importers/cases"
    names = {
        "sdk.jsonl": "sdk_dump.jsonl",
        "anthropic.jsonl": "anthropic_blocks.jsonl",
        "responses.jsonl": "responses_items.jsonl",
        "trace.jsonl": "verifiers_trace.jsonl",
        "rollouts.jsonl": "prompt_completion.jsonl",
        "log.json": "inspect.json",
        "session.jsonl": "claude_code.jsonl",
        "django-1.traj": "swe_agent.traj",
        "django-1.traj.json": "mini_swe_agent.traj.json",
        "sharegpt.jsonl": "sharegpt_system_labels.jsonl",
        "stepwise.jsonl": "trl_prm.jsonl",
        "shepherd.jsonl": "math_shepherd.jsonl",
        "who_when.jsonl": "several_agents.jsonl",
        "pairs.jsonl": "preference_pair.jsonl",
    }
    same = ("langchain.jsonl", "openhands.json", "agentgym.jsonl", "processbench.jsonl", "prm800k.jsonl")
    for name in same:
        names[name] = name
    for name, case in names.items():
        (folder / name).write_bytes((cases / case).read_bytes())
    for trial in range(2):
        agent = folder / "jobs" / f"trial-{trial}" / "agent"
        agent.mkdir(parents=True)
        (agent / "trajectory.json").write_bytes((cases / "atif_trajectory.json").read_bytes())
        result = {
            "trial_name": f"find__{trial}",
            "task_name": f"find-{trial}",
            "verifier_result": {"rewards": {"r": 1}},
        }
        (agent.parent / "result.json").write_text(json.dumps(result))


def formats() -> list[tuple[str, str]]:
    """Format and options of every row of the table."""
    text = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    return re.findall(r"^\| `([\w-]+)` \| .* \| `(--input .*)` \|$", text, re.MULTILINE)


def test_every_format_has_a_command_that_imports_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    samples(tmp_path)
    table = formats()
    assert [name for name, _ in table] and {name for name, _ in table} == set(registry.BY_NAME)
    for name, options in table:
        output = f"{name}.out"
        assert cli.main(["import-trajectories", *shlex.split(options), "--output", output]) == 0, (
            capsys.readouterr().err
        )
        assert f"rows in format {name}: " in capsys.readouterr().out
        rows = [json.loads(line) for line in Path(output).read_text().splitlines()]
        assert rows and all(row["messages"] for row in rows)
        if name in ("atif", "openhands", "agentgym", "verifiers", "inspect", "trl-prm", "processbench", "who-when"):
            assert any("outcome" in row or "step_labels" in row for row in rows) or name == "openhands"


@pytest.mark.slow
def test_beam_builds_the_shards_of_the_page_again(folder):
    import_command = next(command for command in commands("") if "import-trajectories" in command)
    run(["make_log.py"])
    Path("trajectories.jsonl").unlink(missing_ok=True)
    assert run(import_command) == 0
    assert run(next(command for command in commands("") if "data_pipeline.build" in command)) == 0
    (command,) = commands("beam")
    done = beam_environment.run(beam_environment.python(), *command, cwd=folder)
    assert done.stdout.splitlines()[-2].startswith("train: 27 rows")
    ours, beams = (
        {path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("shards", "beam-shards")
    )
    assert beams == ours and len(ours) > 5


@pytest.mark.slow
def test_the_page_trains_and_scores(folder):
    if not Path("trajectories.jsonl").exists():
        for command in commands("")[:2]:
            assert run(command) == 0
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    outputs = []
    for command in commands("slow"):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "trajectories: 27 train, 9 validation" in outputs[0] and "agentprm, seed 0: loss" in outputs[0]
    model = Path("runs/own/reward_models/agentprm/seed-0/model")
    assert Encoder.load(model).template == Encoder.load("models/base", "chatml").template
    assert "scored 36 trajectories, 0 errors" in outputs[1]
