"""docs/first-hour.md, executed unchanged, with a small random model as the base model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.encode import Encoder
from data_pipeline.trajectory import read
from jaxprm import config
from tests.docs import base_model, pages

PAGE = "first-hour.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder after all commands of the page, run in order, and the output of each, by script or verb."""
    folder = tmp_path_factory.mktemp("first-hour")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    base_model.write(folder / "models/base")
    outputs = {}
    for arguments in [*commands(), ["loop.py"]]:
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(pages.ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, (arguments, process.stderr[-2000:])
        outputs[arguments[2] if arguments[0] == "-m" else arguments[0]] = process.stdout
    return folder, outputs


def commands() -> list[list[str]]:
    texts = [block.text.replace("\\\n", " ") for block in pages.blocks(PAGE) if block.language == "sh"]
    return [shlex.split(line)[1:] for text in texts for line in text.splitlines()]


def test_the_page_goes_from_a_log_to_a_loop(done):
    verbs = [arguments[2] for arguments in commands() if arguments[0] == "-m"]
    assert verbs == ["import-trajectories", "validate", "plan", "train", "evaluate", "score", "export"]


def test_no_row_is_lost_and_no_task_is_in_two_splits(done):
    folder, outputs = done
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    imported = list(read(folder / "trajectories.jsonl"))
    assert [trajectory.id for trajectory in imported] == [row["id"] for row in log] and len(log) == 240
    assert [trajectory.outcome for trajectory in imported] == [row["reward"] for row in log]
    splits = {
        split: {trajectory.task for trajectory in imported if trajectory.split == split}
        for split in ("train", "validation")
    }
    assert not splits["train"] & splits["validation"] and len(splits["validation"]) > 3
    assert "240 trajectories, 0 bad" in outputs["validate"]


def test_the_plan_is_for_the_named_chip(done):
    plan = json.loads((done[0] / "plan.json").read_text())
    assert plan["fits"] is True and plan["bytes_per_device"]["total"] < plan["bytes_per_device"]["limit"]


def test_both_reward_models_are_trained_with_the_template_and_evaluated(done):
    folder, outputs = done
    for label in ("agentprm", "pvm"):
        model = folder / f"runs/first/reward_models/{label}/seed-0/model"
        assert Encoder.load(model).template == Encoder.load(folder / "models/base", "chatml").template
        assert label in outputs["train"] and label in outputs["evaluate"]
    assert "within task" in outputs["evaluate"]


def test_scores_cover_every_line_and_the_export_was_verified(done):
    folder, outputs = done
    scored = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(scored) == 240 and not any("error" in line for line in scored)
    assert (
        "scored 240 trajectories, 0 errors" in outputs["score"] and "verified: largest difference" in outputs["export"]
    )


def test_the_loop_takes_the_candidate_of_highest_promise(done):
    """The loop prints the best of the first four candidates, as scores of full conversations confirm."""
    import jaxprm

    folder, outputs = done
    sys.path.insert(0, str(folder))
    try:
        from make_log import DEPOTS, TOOLS, look
    finally:
        sys.path.remove(str(folder))
    user = {"role": "user", "content": "Parcel 99 was last seen in the west. Where is it?"}
    conversations = [{"messages": [user, look(depot)], "tools": TOOLS} for depot in DEPOTS]
    promises = [result["score"] for result in jaxprm.load(folder / "my-prm").score(conversations)]
    best = promises.index(max(promises))
    assert outputs["loop.py"].splitlines()[0] == f"{DEPOTS[best]}: promise {promises[best]:+.2f}"


def test_the_config_of_the_page_is_valid(done):
    assert config.load(done[0] / "first_hour.py").reward_models[0].objective == "agentprm"
