"""Checkpoints of an unfinished training run are scored and exported like models."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprm
from jaxprm.artifacts.checkpoints import Checkpoints
from jaxprm.artifacts.directory import DESCRIPTION, files_of, find_model, model_identity, read_recipe
from jaxprm.errors import UserError
from jaxprm.export.export import export
from jaxprm.hf import writer
from jaxprm.scoring import loading
from jaxprm.training import reward_model
from tests.model import tiny

# Of a base with an unembedding; a reward model has none.
STATES = {step: tiny.reward_model(seed=step) for step in (20, 40)}
CONVERSATION = tiny.conversation(5, turns=4)
LOG = [
    {"step": 20, "validation_loss": 0.5, "auroc": 0.6},
    {"step": 30, "loss": 0.1},
    {"step": 40, "loss": 0.2},
    {"step": 60, "validation_loss": 0.1, "auroc": 0.9},
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The output of a training run that has two checkpoints and no model."""
    base = tmp_path_factory.mktemp("base")
    writer.write_model(base, tiny.UNTIED, tiny.transformer(tiny.UNTIED), pad_id=0, end_id=1, max_length=777)
    for file in tiny.tokenizer_directory().iterdir():
        shutil.copy(file, base)
    output = tmp_path_factory.mktemp("run") / "agentprm" / "seed-0"
    checkpoints = Checkpoints(output / "checkpoints", {"config": "x"})
    for step, state in STATES.items():
        optimizer = optax.adam(1e-3).init(state)
        checkpoints.save(step, {"step": jnp.int32(step), "parameters": state, "optimizer": optimizer}, {"rows": 7})
    checkpoints.close()
    recipe = {
        "label": "agentprm",
        "objective": "agentprm",
        "max_tokens": 1024,
        "base": str(base),
        "seed": 3,
        "fingerprints": {"tokenizer": tiny.encoder().fingerprint},
    }
    reward_model.describe(output / DESCRIPTION, tiny.CONFIG, base=base, encoder=tiny.encoder(), recipe=recipe)
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return output


@pytest.fixture
def output(original, tmp_path):
    return shutil.copytree(original, tmp_path / "agentprm" / "seed-0")


def promises(path) -> list[float]:
    return [step["promise"] for step in jaxprm.load(path).score([CONVERSATION])[0]["steps"]]


def expected(step: int) -> np.ndarray:
    encoded = tiny.encoder().trajectory(CONVERSATION, row="")
    return tiny.values(STATES[step], encoded.tokens[None])[0, encoded.read_positions]


def test_without_a_finished_model_the_newest_checkpoint_is_used(output):
    for path in (output, output.parent, output / "checkpoints"):
        assert find_model(path) == output / "checkpoints" / "40"
    tiny.assert_close(promises(output), expected(40))
    tiny.assert_close(promises(output / "checkpoints" / "20"), expected(20))


def test_a_checkpoint_may_be_named_from_its_own_directory(output, monkeypatch):
    monkeypatch.chdir(output / "checkpoints" / "20")
    assert read_recipe(find_model("."))["steps"] == 20
    monkeypatch.chdir(output / "checkpoints")
    assert files_of(find_model(".")) == output / DESCRIPTION


def test_a_finished_model_comes_first_and_checkpoints_by_name(output):
    tiny.write_reward_model(output / "model", STATES[20])
    assert find_model(output.parent) == output / "model"
    assert find_model(output / "checkpoints" / "40") == output / "checkpoints" / "40"


def test_its_recipe_has_the_steps_and_the_last_validation(output):
    recipe = read_recipe(output / "checkpoints" / "40")
    assert (recipe["label"], recipe["steps"], recipe["unfinished"]) == ("agentprm", 40, True)
    assert recipe["validation"] == {"loss": 0.5, "auroc": 0.6}  # of step 20: the next evaluation is of step 60


def test_a_checkpoint_is_exported_with_the_config_of_its_base(output, tmp_path):
    export(output, tmp_path / "out", head_format="token")
    tiny.assert_close(promises(tmp_path / "out"), expected(40))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not finished, a checkpoint after 40 steps" in card and "| auroc | 0.6 |" in card
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["max_position_embeddings"] == 777
    assert described["architectures"] == ["Qwen2ForTokenClassification"]


def test_reading_changes_nothing_of_a_running_training(output):
    """A checkpoint that is being written is neither used nor removed."""
    half = output / "checkpoints" / "60.orbax-checkpoint-tmp-1"
    (half / "state").mkdir(parents=True)
    (output / "checkpoints" / "60" / "state").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert find_model(output) == output / "checkpoints" / "40"
    promises(output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_every_checkpoint_is_another_model(output):
    first, second = (model_identity(output / "checkpoints" / step) for step in ("20", "40"))
    assert first != second and first["config.json"] == second["config.json"]


def test_a_checkpoint_without_its_model_files_is_refused(output):
    shutil.rmtree(output / DESCRIPTION)
    with pytest.raises(
        UserError, match=r"checkpoint .*/40: .*model-files is missing, .* give the complete training output"
    ):
        find_model(output)


@pytest.mark.parametrize("trainable", ["lora", "head", "last_k"])
def test_a_checkpoint_of_a_part_of_the_model_is_refused_in_words(output, trainable):
    path = output / DESCRIPTION / "reward_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"trainable": trainable}}))
    with pytest.raises(
        UserError, match=f"trainable = '{trainable}', it holds only the trained part .* finish the training run"
    ):
        find_model(output)


def test_a_checkpoint_of_another_model_is_refused_by_parameter(output):
    path = output / DESCRIPTION / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 57}))
    with pytest.raises(UserError, match=r"parameter transformer\.blocks\.down has shape \(3, 56, 40\).*\(3, 57, 40\)"):
        loading.load_scorer(output / "checkpoints" / "40")


def test_a_checkpoint_that_vanishes_while_it_is_read_is_one_line(output):
    for name in ("manifest.ocdbt", "_METADATA"):
        (output / "checkpoints" / "40" / "state" / name).unlink()
        with pytest.raises(UserError, match="40: cannot be read .*give a newer checkpoint") as caught:
            loading.load_reward_model(output / "checkpoints" / "40")
        assert "\n" not in str(caught.value)
