"""From a path a user gives to the one model it means."""

import json

import pytest

from data_pipeline.errors import DataError
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from tests.model import tiny


@pytest.fixture
def run(tmp_path):
    """A work directory with two reward models, one of them with two seeds."""
    for name in ("agentprm/seed-0", "agentprm/seed-1", "orm/seed-0"):
        folder = tmp_path / "reward_models" / name / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("path", ["reward_models/orm", "reward_models/orm/seed-0", "reward_models/orm/seed-0/model"])
def test_the_only_model_at_or_below_a_path_is_found(run, path):
    assert loading.find_model(run / path) == run / "reward_models/orm/seed-0/model"


@pytest.mark.parametrize(("path", "count"), [("", 3), ("reward_models", 3), ("reward_models/agentprm", 2)])
def test_several_models_are_listed(run, path, count):
    with pytest.raises(UserError, match=f"holds {count} reward models") as caught:
        loading.find_model(run / path)
    assert str(run / "reward_models/agentprm/seed-1/model") in str(caught.value)


def test_no_model_is_said_in_words(run):
    (run / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model\.safetensors there"):
        loading.find_model(run / "empty")
    with pytest.raises(UserError, match="no such directory"):
        loading.find_model(run / "nowhere")


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    directory = tiny.write_reward_model(tmp_path, fingerprints={"tokenizer": "0123456789abcdef"})
    with pytest.raises(UserError, match="trained with tokenizer 0123456789ab"):
        loading.load_scorer(directory)
    tiny.write_reward_model(tmp_path, fingerprints={"tokenizer": tiny.encoder().fingerprint})
    assert loading.load_scorer(directory).config == tiny.CONFIG
    (directory / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        loading.load_scorer(directory)


def test_a_recipe_is_read_where_there_is_one(tmp_path):
    assert loading.read_recipe(tmp_path) == {}
    (tmp_path / "reward_model.json").write_text(json.dumps({"label": "pvm"}))
    assert loading.read_recipe(tmp_path) == {"label": "pvm"}
    (tmp_path / "reward_model.json").write_text("{")
    with pytest.raises(UserError, match=r"reward_model\.json: "):
        loading.read_recipe(tmp_path)
