"""Training runs on step labels and on pairs, from rows of files to a reward model, and the head of a base that has one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest

from benchmarks.toy import GOAL, make_toy, walks
from data_pipeline.build import build
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.shards import open_dataset
from data_pipeline.trajectory import to_line
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.hf import reader, writer
from jaxprm.model.config import Head
from jaxprm.training.reward_model import from_policy
from jaxprm.training.supervision import check_selected, selected, with_label_range
from jaxprm.training.train import train_reward_model
from jaxprm.training.validation import label_numbers, pair_numbers


def position(message) -> int:
    return int(str(message.content).split()[-1])


def labelled(seed: int, split: str, count: int, *, outcomes: str = "none") -> list:
    """Walks of the toy whose steps are labelled 1 for a move towards the goal. outcomes: of none, half or all."""
    rows = []
    for index, walk in enumerate(walks(seed, split, tasks=24, count=count)):
        path = [int(walk.messages[0].content.split()[2].rstrip(","))]
        path += [position(message) for message in walk.messages if message.role == "assistant"]
        labels = [float(after > before) for before, after in zip(path[:-1], path[1:], strict=True)]
        keep = outcomes == "all" or (outcomes == "half" and index % 2 == 0)
        rows.append(msgspec.structs.replace(walk, step_labels=labels, outcome=walk.outcome if keep else None))
    return rows


def pairs(seed: int, split: str, count: int) -> list[dict]:
    """States of the toy, in which moving to the goal is chosen and moving away is rejected."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        start = rng.randint(2, GOAL - 1)
        messages = [{"role": "user", "content": f"start at {start}, reach {GOAL}"}]
        for _ in range(rng.randint(0, 2)):
            start = min(GOAL - 1, start + 1)
            messages += [{"role": "assistant", "content": f"go to {start}"}, {"role": "user", "content": f"at {start}"}]
        action = lambda to: {"role": "assistant", "content": f"go to {to}"}
        row = {"id": f"{split}-{number}", "task": f"{split}/{number}", "messages": messages}
        rows.append(row | {"chosen": action(start + 1), "rejected": [action(start - 1)]})
    return rows


def shards_of(toy, folder: Path, lines: dict[str, list[str]]) -> Path:
    inputs = {}
    for split, rows in lines.items():
        inputs[split] = [folder / f"{split}.jsonl"]
        inputs[split][0].write_text("".join(f"{row}\n" for row in rows))
    build(inputs, Encoder.load(toy.base), folder / "shards", max_length=128, shards=2)
    return folder / "shards"


def train(toy, shards: Path, output: Path, **changes) -> dict:
    """reward_model.json of a run."""
    settings = toy.settings(**changes)
    model = train_reward_model(toy.experiment, settings, 0, shards=shards, base=toy.base, output=output)
    return json.loads((model / "reward_model.json").read_text())


@pytest.mark.slow
def test_labels_without_outcomes_are_learned_and_the_run_resumes(toy, tmp_path):
    shards = shards_of(
        toy,
        tmp_path,
        {
            "train": list(map(to_line, labelled(0, "train", 12))),
            "validation": list(map(to_line, labelled(1, "validation", 4, outcomes="half"))),
        },
    )
    metadata = open_dataset(shards).metadata
    assert metadata.splits["train"].mean_return is None and metadata.splits["train"].without_outcome == 24 * 12
    recipe = train(toy, shards, tmp_path / "run", objective="step_labels", epochs=6, beta=0.0)
    assert recipe["validation"]["label_auroc"] > 0.9 and recipe["validation"]["loss"] < 0.4
    assert recipe["validation"]["label_loss"] == recipe["validation"]["loss"]
    assert recipe["validation"]["auroc"] is not None  # of the half that has outcomes
    assert recipe["targets"]["labels"] == {"loss": "bce", "weight": 0.0, "range": [0.0, 1.0]}
    assert recipe["objective"] == "step_labels" and recipe["value_range"] == [0.0, 1.0]
    config, _ = reader.load_reward_model(tmp_path / "run/model")
    assert config.head == Head(2, bias=True)
    lines = [line for line in files.read_lines(tmp_path / "run/metrics.jsonl") if "label_loss" in line and "loss" in line]
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.7 * np.mean([line["loss"] for line in lines[:5]])


@pytest.mark.slow
def test_pairs_are_learned(toy, tmp_path):
    shards = shards_of(
        toy,
        tmp_path,
        {split: list(map(json.dumps, pairs(seed, split, n))) for split, seed, n in (("train", 0, 200), ("validation", 1, 40))},
    )
    assert open_dataset(shards).metadata.splits["train"].pairs == 200
    recipe = train(toy, shards, tmp_path / "run", objective="preference", epochs=6, beta=0.0)
    assert recipe["validation"]["pair_accuracy"] > 0.95
    assert recipe["validation"]["preference_loss"] < 0.5 and recipe["validation"]["auroc"] is None
