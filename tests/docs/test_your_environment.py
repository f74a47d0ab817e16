"""docs/your-environment.md, executed unchanged."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm import environments
from tests.docs import pages

PAGE = "your-environment.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, importable."""
    for name, text in pages.files(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_corridor_keeps_the_protocol(folder):
    """Splits share no task, and one object serves two tasks in turn through its snapshots."""
    corridor = environments.create("corridor:Corridor")
    splits = [set(corridor.tasks(split)) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [200, 40, 80]
    assert len(set.union(*splits)) == 320
    first, second = "corridor/2-1-4", "corridor/5-6-7"
    corridor.reset(first)
    start = corridor.snapshot()
    corridor.reset(second)
    corridor.step("right")
    other = corridor.snapshot()
    corridor.restore(start)
    for action in ("left", "right", "right"):
        assert not corridor.step(action).done
    corridor.restore(other)
    assert corridor.step("right") == ("key held, door 0 left, 8 moves to go", 1.0, True)
    corridor.restore(start)
    assert corridor.step("left").observation == "key held, door 3 right, 9 moves to go"


def test_a_corridor_episode_ends_after_its_moves(folder):
    corridor = environments.create("corridor:Corridor")
    corridor.reset("corridor/2-1-4")
    results = [corridor.step("right") for _ in range(corridor.max_rounds)]
    assert [result.done for result in results] == [False] * 9 + [True]
    assert corridor.outcome() == 0.0


def test_the_demonstrations_drift_to_the_right(folder):
    corridor = environments.create("corridor:Corridor")
    rng = random.Random(0)
    episodes = [corridor.demonstration(rng) for _ in range(300)]
    wanted = {"left": 0, "right": 0}
    for episode in episodes:
        for view, action in zip(episode[::2], episode[1::2], strict=True):
            key, door = re.search(r"key (?:held|\d (\w+)), door \d (\w+)", view["content"]).groups()
            if (key or door) == "left":
                wanted[action["content"]] += 1
            else:
                assert action["content"] == "right"
    assert 0.45 < wanted["left"] / sum(wanted.values()) < 0.55


@pytest.mark.slow
def test_the_page_runs_unchanged(folder):
    """Imitation, the full loop, training on shards; guided search beats the policy, files are documented."""
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    outputs = []
    for arguments in pages.shell(PAGE):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    imitated, ran, _, trained = outputs
    assert imitated.strip() == "policy: runs/corridor_policy/policy"
    assert "report: runs/corridor/report/index.html" in ran
    assert (folder / "runs/corridor/report/index.html").is_file()
    assert trained.strip() == "mine/model"
    assert (folder / "mine/model/model.safetensors").is_file()

    results = json.loads((folder / "runs/corridor/results.json").read_text())
    formats = (pages.ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", formats.partition("## results.json")[2], re.MULTILINE))
    # The configuration names only searches of the package, so the key for others is absent.
    assert set(results) == documented - {"searches"}

    policy = results["policy"]["sampled"]
    assert 0.1 < policy["mean"] < 0.8  # it learned to walk, and to drift
    guided = results["methods"]["agentprm"]
    assert guided["beam"]["2x2"]["mean"] > policy["mean"] + 0.1
    assert guided["stepwise"]["4"]["mean"] > policy["mean"] + 0.1
