"""The recorded identity of a policy changes with every file and setting that changes its draws."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.chat_template import read_template
from jaxprm.config import (
    EndpointConfig,
    Experiment,
    PolicyConfig,
    ProgressAdvantageConfig,
    RewardModelConfig,
    SearchConfig,
)
from jaxprm.hf.config import hf_config
from jaxprm.training import reward_model
from jaxprm.workflow.context import Run, log_ratio_inputs
from tests.model import tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture
def policy(tmp_path) -> Path:
    """Files of a sharded model. Only their bytes matter here."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    for number in (1, 2):
        save_file({str(number): np.zeros(number)}, tmp_path / f"{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in (1, 2)}}))
    return tmp_path


def identity(path: Path, **policy) -> str:
    run = Run(Experiment(name="x", policy=PolicyConfig(path=str(path), **policy)), work=None)
    return run.collect_inputs["policy"]["path"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "2.safetensors", INDEX],
)
def test_every_file_changes_the_identity(policy, name):
    before = identity(policy)
    assert identity(policy) == before
    with (policy / name).open("a") as file:
        file.write("\n")
    assert identity(policy) != before


def test_a_chosen_template_changes_the_identity_by_its_text(policy, tmp_path):
    own = identity(policy)
    assert identity(policy, chat_template="own") == own
    identities = {own, identity(policy, chat_template="chatml"), identity(policy, chat_template="llama3")}
    mine = tmp_path / "mine.jinja"
    for text in ("first", "second"):
        mine.write_text(text)
        identities.add(identity(policy, chat_template=str(mine)))
    assert len(identities) == 5
    (tmp_path / "same.jinja").write_text("second")
    assert identity(policy, chat_template=str(tmp_path / "same.jinja")) in identities


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_shipped_template_has_the_identity_of_its_first_version(policy, tmp_path, name):
    earlier = resources.files("data_pipeline") / "templates" / "fingerprints" / f"{name}.jinja"
    (tmp_path / "earlier.jinja").write_bytes(earlier.read_bytes())
    assert read_template(name) != earlier.read_text()
    assert identity(policy, chat_template=name) == identity(policy, chat_template=str(tmp_path / "earlier.jinja"))


def test_the_head_is_recorded_where_the_base_is_a_reward_model(policy):
    """Earlier versions gave such a base a new head."""

    def recorded(head: str, *, reward: bool) -> list[dict]:
        fields = hf_config(tiny.CONFIG, reward=reward, pad_id=0, end_id=1, max_length=64)
        (policy / "config.json").write_text(json.dumps(fields))
        model = RewardModelConfig(label="a", head=head)
        experiment = Experiment(name="x", policy=PolicyConfig(path=str(policy)), reward_models=(model,))
        stage = Run(experiment, work=None).train_inputs(model, 0)["reward_model"]
        identified = reward_model.identity(model, experiment.data, 0, base=policy, dataset="", tokenizer="")
        return [stage, identified["config"]]

    language_model = recorded("keep", reward=False)
    assert recorded("new", reward=True) == language_model
    kept = recorded("keep", reward=True)
    assert kept[0] == language_model[0] | {"head": "keep"} and kept[1] != language_model[1]


def test_how_messages_are_encoded_is_recorded_where_it_changes_a_draw_or_a_score(policy):
    endpoint = EndpointConfig(base_url="http://localhost:1/v1", model="m")

    def recorded(inputs: str, base: str | None = str(policy), **settings) -> dict:
        advantage = ProgressAdvantageConfig(reference=str(policy), policy=str(policy))
        search = SearchConfig(progress_advantage=advantage)
        experiment = Experiment(name="x", policy=PolicyConfig(**settings), base_model=base, search=search)
        run = Run(experiment, work=None)
        if inputs == "log-ratio":
            return log_ratio_inputs(run)
        return (run.collect_inputs if inputs == "collect" else run.search_inputs)["policy"]

    both, breaks = {"reasoning": "drop", "special_tokens": "break"}, {"special_tokens": "break"}
    for inputs in ("collect", "search"):
        own, served = {"path": str(policy)}, {"endpoint": endpoint}
        assert recorded(inputs, **own, **both) == recorded(inputs, **own) | breaks
        assert recorded(inputs, **served, **both) == recorded(inputs, **served) | both
        assert recorded(inputs, None, **served, **both) == recorded(inputs, None, **served)
    assert recorded("log-ratio", **both) == recorded("log-ratio") | both
