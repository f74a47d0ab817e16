"""docs/formats.md names all fields that the code writes and reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from data_pipeline import batches, shards, trajectory
from data_pipeline.encode import Encoded
from data_pipeline.metadata import Metadata, SplitMetadata
from jaxprm import config
from jaxprm.training import reward_model
from tests.docs import pages

TEXT = (pages.ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section, title
    return section[1]


def named(title: str) -> set[str]:
    """The words in backquotes, and the keys in examples of objects."""
    text = section(title)
    return set(re.findall(r"`(\w+)`", text)) | set(re.findall(r'"(\w+)"', text))


def in_table(title: str) -> set[str]:
    """The words in backquotes in the first column of a section's tables."""
    rows = re.findall(r"^\| (`.*?) \|", section(title), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def fields(kind: type) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def test_the_fields_of_a_trajectory():
    assert in_table("Trajectories") == fields(trajectory.Trajectory)
    assert fields(trajectory.Message) <= named("Trajectories")


def test_the_example_of_a_trajectory_is_valid():
    example = next(block.text for block in pages.blocks("formats.md") if '"outcome"' in block.text)
    example_trajectory = trajectory.parse_line(example.replace("\n", " "), where="formats.md")
    assert len(trajectory.steps(example_trajectory.messages)) == 2


def test_the_arrays_of_the_step_table():
    assert in_table("Step table") == set(Encoded._fields)


def test_the_fields_of_the_shards():
    text = named("Shards")
    assert in_table("Shards") == fields(SplitMetadata)
    assert fields(Metadata) - {"splits"} <= text
    stored = {*shards._TOKEN_FIELDS, *shards._STEP_FIELDS, *shards._SCALARS, *shards._TEXTS}
    assert stored <= text


def test_the_fields_of_a_batch():
    assert in_table("Batches") == set(batches._FIELDS)


def test_the_fields_of_a_reward_models_recipe():
    settings = config.RewardModelConfig(label="a")
    facts = ["trained_on", "lengths", "turn_tokens", "fill", "skipped"]
    facts_by_name = dict.fromkeys(["steps", *facts, "validation", "fingerprints"])
    recipe = reward_model.recipe(settings, 0, base=Path("b"), max_tokens=1, value_range=(0, 1), **facts_by_name)
    assert in_table("Reward models") == set(recipe)
    assert set(recipe["targets"]) <= named("Reward models")


def test_the_score_lines_are_json():
    (block,) = [block for block in pages.blocks("formats.md") if '"promise"' in block.text]
    lines = [json.loads(line) for line in block.text.splitlines()]
    assert [set(line) for line in lines] == [{"id", "steps", "score"}, {"id", "error"}, {"id", "line", "error"}]


@pytest.mark.parametrize("quick", [False, True])
def test_the_recipe_to_copy_loads(quick):
    loaded = config.load(pages.ROOT / "configs" / "forkme.py", quick=quick)
    assert loaded.environment.name == "textcraft"
    assert len(loaded.reward_models) == 3
