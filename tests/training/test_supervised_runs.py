"""Training runs on step labels and on pairs, from rows of files to a reward model, and which head they start from."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from flax import nnx

from benchmarks.toy import GOAL, walks
from data_pipeline.build import build
from data_pipeline.encode import Encoder
from data_pipeline.shards import open_dataset
from data_pipeline.supervision import select
from data_pipeline.trajectory import to_line
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.hf import reader, writer
from jaxprm.model.config import Head
from jaxprm.objectives import check_settings
from jaxprm.training.reward_model import _turn_tokens, from_policy
from jaxprm.training.supervision import check_selected, selected, supervision_of, with_label_range
from jaxprm.training.train import train_reward_model
from jaxprm.training.validation import label_numbers, pair_numbers
from tests.training.supervised_records import pair, split_of, walk


def position(message) -> int:
    return int(str(message.content).split()[-1])


def labelled(seed: int, split: str, count: int, *, outcomes: str = "none") -> list:
    """Walks of the toy whose steps are labelled 1 for a move towards the goal. outcomes: of none, half or all."""
    rows = []
    for index, episode in enumerate(walks(seed, split, tasks=24, count=count)):
        path = [int(episode.messages[0].content.split()[2].rstrip(","))]
        path += [position(message) for message in episode.messages if message.role == "assistant"]
        labels = [float(after > before) for before, after in itertools.pairwise(path)]
        keep = outcomes == "all" or (outcomes == "half" and index % 2 == 0)
        rows.append(msgspec.structs.replace(episode, step_labels=labels, outcome=episode.outcome if keep else None))
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
def test_labels_without_outcomes_are_learned(toy, tmp_path):
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
    lines = [
        line for line in files.read_lines(tmp_path / "run/metrics.jsonl") if "label_loss" in line and "loss" in line
    ]
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.7 * np.mean([line["loss"] for line in lines[:5]])


@pytest.mark.slow
def test_pairs_are_learned(toy, tmp_path):
    shards = shards_of(
        toy,
        tmp_path,
        {
            split: list(map(json.dumps, pairs(seed, split, n)))
            for split, seed, n in (("train", 0, 200), ("validation", 1, 40))
        },
    )
    assert open_dataset(shards).metadata.splits["train"].pairs == 200
    recipe = train(toy, shards, tmp_path / "run", objective="preference", epochs=6, beta=0.0)
    assert recipe["validation"]["pair_accuracy"] > 0.95
    assert recipe["validation"]["preference_loss"] < 0.5 and recipe["validation"]["auroc"] is None


def test_the_lengths_of_turns_leave_out_what_lies_between_the_actions_of_a_pair():
    """Found by scoring with a model of pairs: the second action began before the first one had ended."""
    turns = _turn_tokens(split_of([walk(1, [1, 1]), pair(2, 9, (4, 6)), walk(3, [1])]))
    # Steps of walks have 2 tokens, with 1 between two steps; the actions have 4 and 6.
    assert turns["action"] == {"median": 2, "most": 6} and turns["observation"] == {"median": 1, "most": 1}
    assert _turn_tokens(split_of([pair(2, 9, (4, 6))]))["observation"] == {"median": 0, "most": 0}


# What is selected, and what is refused before any work


class InMemory:
    """A dataset of splits that are given."""

    def __init__(self, **splits):
        self._splits = splits

    def split(self, name: str):
        return self._splits[name]


def settings(objective: str, **labels) -> config_lib.RewardModelConfig:
    return config_lib.RewardModelConfig(label="x", objective=objective, labels=config_lib.LabelsConfig(**labels))


BOTH, LABELS = walk(1, [1, np.nan], 1.0), walk(2, [0, -1])
OUTCOME, PAIR = walk(3, [np.nan, np.nan], 0.0), pair(4, 5, (2, 2))


@pytest.mark.parametrize(
    ("objective", "weight", "expected"),
    [
        ("agentprm", 0.0, [True, False, True, False]),
        ("pvm", 0.5, [True, True, True, False]),
        ("step_labels", 0.0, [True, True, False, False]),
        ("preference", 0.0, [False, False, False, True]),
    ],
)
def test_an_objective_trains_on_what_it_reads(objective, weight, expected):
    split = split_of([BOTH, LABELS, OUTCOME, PAIR])
    chosen = settings(objective, weight=weight)
    mask = selected(split, supervision_of(chosen))
    assert mask.tolist() == expected
    part = select(split, mask)
    assert part.ids == [id for id, kept in zip(split.ids, expected, strict=True) if kept]
    assert len(part.tokens) == part.token_starts[-1] and len(part.rewards) == part.step_starts[-1]
    first = int(np.flatnonzero(mask)[-1])
    np.testing.assert_array_equal(
        part.tokens[part.token_starts[-2] :], split.tokens[split.token_starts[first] : split.token_starts[first + 1]]
    )
    lines = list(check_selected(chosen, InMemory(train=split, validation=split)))
    left = 4 - sum(expected)
    assert [line.partition(":")[2].split(", ")[0] for line in lines] == [f" {left} of 4 trajectories"] * 2


def test_an_objective_without_anything_to_train_on_is_refused():
    split, other = split_of([OUTCOME]), split_of([LABELS])
    for objective, train, what in (
        ("step_labels", split, "step labels; split train has none among 1; give trajectories step_labels"),
        ("preference", split, "a chosen and a rejected action"),
        ("agentprm", other, "an outcome; split train has none among 1"),
    ):
        with pytest.raises(UserError, match=f"objective {objective} trains on trajectories with {what}"):
            list(check_selected(settings(objective), InMemory(train=train, validation=train)))


def test_the_range_of_labels_is_that_of_the_data_or_the_config():
    split = split_of([LABELS])
    assert with_label_range(settings("step_labels"), split).labels.range == (-1.0, 1.0)
    assert with_label_range(settings("step_labels"), split_of([BOTH])).labels.range == (0.0, 1.0)
    assert with_label_range(settings("step_labels", range=(-2.0, 3.0)), split).labels.range == (-2.0, 3.0)
    assert with_label_range(settings("agentprm"), split).labels.range is None
    with pytest.raises(UserError, match=r"between -1 and 0, outside of \[0, 1\]; name the lowest"):
        with_label_range(settings("step_labels", range=(0.0, 1.0)), split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "step_labels", "weight": 0.5},
            "labels.weight is 0.5 with objective step_labels, which trains on",
        ),
        ({"objective": "preference", "weight": 1.0}, "trains on pairs, which have no step labels"),
        ({"objective": "pvm", "range": (1.0, 1.0)}, r"labels.range is \(1.0, 1.0\): give the lowest"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_settings(settings(**changes))


# Validation


def test_validation_numbers_of_labels_and_pairs_by_hand():
    columns = {
        "values": np.array([0.9, 0.4, 0.6, 0.2]),
        "targets": np.array([1.0, 1.0, np.nan, np.nan]),
        "depths": np.array([1, 2, 1, 2]),
        "tasks": np.array(["a", "a", "b", "b"]),
        "weights": np.array([1.0, 1.0, 2.0, 2.0]),
        "success": np.array([True, True, False, False]),
    }
    labels, targeted = np.array([1.0, np.nan, -1.0, 0.0]), np.array([True, True, False, False])
    chosen = config_lib.LabelsConfig(loss="mse", weight=0.25, range=(-1.0, 1.0))
    numbers = label_numbers(columns, labels, targeted, chosen)
    squares = np.array([0.1**2, 0.6**2, 0.3**2]) / 2  # of the labels' targets 1, 0 and .5
    assert numbers["label_loss"] == pytest.approx((squares[0] + 2 * squares[1] + 2 * squares[2]) / 5)
    mixed = 0.75 * 0.1**2 / 2 + 0.25 * squares[0] + 0.6**2 / 2 + 2 * squares[1] + 2 * squares[2]
    assert numbers["loss"] == pytest.approx(mixed / 6)
    # Right: the first, and the neutral one; wrong: the third. 0.9 is above 0.6, 0.2 is not, and it counts twice.
    assert numbers["label_auroc"] == pytest.approx(1 / 3)
    crossed = label_numbers(columns, labels, targeted & False, config_lib.LabelsConfig(range=(-1.0, 1.0)))
    hand = -np.log(0.9) - 2 * np.log(0.4) - 2 * (0.5 * np.log(0.2) + 0.5 * np.log(0.8))
    assert crossed["loss"] == crossed["label_loss"] == pytest.approx(hand / 5)
    pairs_of = pair_numbers(columns)
    assert pairs_of["pair_accuracy"] == 1
    assert pairs_of["loss"] == pytest.approx((np.log1p(np.exp(-0.5)) + 2 * np.log1p(np.exp(-0.4))) / 3)
    assert pair_numbers(columns | {"values": np.array([0.4, 0.9, 0.6, 0.6])})["pair_accuracy"] == pytest.approx(1 / 3)


# The head of the base


def test_a_reward_model_as_the_base_keeps_its_head_unless_told_otherwise(toy, tmp_path):
    """Found by training on from a reward model: its head of standard deviation .3 began again at .02."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    config, state = from_policy(toy.base, 0)
    state["head"] = nnx.Param(jnp.linspace(-1, 1, config.hidden_size))
    writer.write_model(tmp_path / "one", config, state, pad_id=0, end_id=1, max_length=64)
    mse, bce = {"loss": "mse"}, {"loss": "bce"}
    kept_config, kept = from_policy(tmp_path / "one", 0, settings=settings("step_labels", **mse))
    np.testing.assert_array_equal(kept["head"][...], state["head"][...])
    np.testing.assert_array_equal(kept["transformer"]["embedding"][...], state["transformer"]["embedding"][...])
    assert kept_config == config
    new = config_lib.RewardModelConfig(label="x", head="new")
    assert float(jnp.std(from_policy(tmp_path / "one", 0, settings=new)[1]["head"][...])) < 0.05
    with pytest.raises(UserError, match='trains a head of two labels, that of .*one has one; set labels.loss to "mse"'):
        from_policy(tmp_path / "one", 0, settings=settings("step_labels", **bce))

    two_config, two = from_policy(toy.base, 0, settings=settings("step_labels", **bce))
    assert two_config.head == Head(2, bias=True) and two["head"].shape == (config.hidden_size, 2)
    two["head_bias"] = nnx.Param(jnp.asarray([0.5, -1.0]))
    writer.write_model(tmp_path / "two", two_config, two, pad_id=0, end_id=1, max_length=64)
    for objective in ("step_labels", "agentprm"):
        kept_config, kept = from_policy(tmp_path / "two", 1, settings=settings(objective))
        np.testing.assert_array_equal(kept["head_bias"][...], [0.5, -1.0])
        np.testing.assert_array_equal(kept["head"][...], two["head"][...])
        assert kept_config.head == Head(2, bias=True)
