"""A reward model trained on the toy: what it learns, what it leaves behind, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from flax import nnx

from data_pipeline.batches import evaluation_batches, training_batches
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.shards import open_dataset
from jaxprm import files
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.evaluation.value_metrics import StepRecords
from jaxprm.hf import reader, writer
from jaxprm.model.transformer import reward_model_graph
from jaxprm.scoring import loading
from jaxprm.training import programs, train
from jaxprm.training.evaluate import step_values, summary
from jaxprm.training.reward_model import from_policy
from jaxprm.training.step import FIELDS, make_evaluation_step
from jaxprm.training.train import train_reward_model


class Trained(NamedTuple):
    output: Path
    model: Path
    lines: list[dict]
    compiled: Counter

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines if "loss" in line]

    @property
    def validations(self) -> list[dict]:
        return [line for line in self.lines if "validation_loss" in line]


@pytest.fixture(scope="session")
def compilations() -> Counter:
    """How often each jitted function was compiled in this process."""
    counts: Counter = Counter()

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts[details.get("fun_name", "")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counts


@pytest.fixture(scope="module")
def train_toy(toy, tmp_path_factory, compilations):
    def run(output: Path | None = None, **changes) -> Trained:
        output = output or tmp_path_factory.mktemp("training")
        before = compilations.copy()
        model = train_reward_model(
            toy.experiment, toy.settings(**changes), 0, shards=toy.shards, base=toy.base, output=output
        )
        return Trained(output, model, list(files.read_lines(output / "metrics.jsonl")), compilations - before)

    return run


@pytest.fixture(scope="module")
def trained(train_toy) -> Trained:
    return train_toy()


def refused(error: type[Exception], match: str, toy, output: Path, **changes) -> None:
    arguments = {"experiment": toy.experiment, "settings": toy.settings(), "shards": toy.shards, "base": toy.base}
    with pytest.raises(error, match=match) as raised:
        train_reward_model(**arguments | changes, seed=0, output=output)
    assert "\n" not in str(raised.value)


def validation_records(model: Path, toy) -> StepRecords:
    """Step records of a written model on the validation split, from its files alone."""
    config, parameters = reader.load_reward_model(model)
    dataset = open_dataset(toy.shards, encoder_fingerprint=Encoder.load(model).fingerprint)
    batches = evaluation_batches(dataset, "validation", rows=8, length=128, steps_per_row=32)
    step = jax.jit(make_evaluation_step(reward_model_graph(config), toy.settings()))
    return step_values(lambda batch: step(parameters, {name: batch[name] for name in FIELDS}), batches)


def test_the_loss_falls_and_values_tell_success_from_failure(trained, toy):
    assert np.mean(trained.losses[-8:]) < 0.8 * np.mean(trained.losses[:8])
    last = trained.validations[-1]
    assert last["auroc"] > 0.75 and last["explained_variance"] > 0.1
    assert last["validation_loss"] < trained.validations[0]["validation_loss"]


def test_promise_grows_towards_the_goal(trained):
    """The value of going to 5 from 4 is above that of going to 3, and far above that of the failing move to 0."""
    config, parameters = reader.load_reward_model(trained.model)
    graph, encoder = reward_model_graph(config), Encoder.load(trained.model)

    @jax.jit
    def values_of(tokens, reads):
        return nnx.merge(graph, parameters)(tokens, jnp.arange(64)[None], jnp.ones_like(tokens), reads)

    def promise(*positions: int) -> float:
        messages = [{"role": "user", "content": f"start at {positions[0]}, reach 6"}]
        for position in positions[1:]:
            messages.append({"role": "assistant", "content": f"go to {position}"})
            messages.append({"role": "user", "content": f"at {position}"})
        encoded = encoder.trajectory(messages[:-1], row="walk")
        tokens = np.full((1, 64), encoder.pad_id, np.int32)
        tokens[0, : len(encoded.tokens)] = encoded.tokens
        return float(values_of(tokens, encoded.read_positions[None, -1:])[0, 0])

    assert promise(4, 5) > promise(4, 3)
    assert promise(4, 5, 6) > promise(2, 1, 0) + 0.3


def test_every_step_and_every_validation_is_logged_once(trained, toy):
    steps = len(training_batches(toy.shards, rows=8, length=128, steps_per_row=32, epochs=4, seed=0))
    assert [line["step"] for line in trained.lines if "loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in trained.validations] == [*range(20, steps, 20), steps]
    assert {"value_loss", "progress_loss", "gradient_norm", "tokens", "weight"} <= set(trained.lines[0])
    assert {"explained_variance", "auroc", "auroc_within_task"} <= set(trained.validations[0])


def test_nothing_is_compiled_twice(trained):
    for step in ("train_step", "evaluation_step"):
        assert sum(count for name, count in trained.compiled.items() if step in name) == 1, step


def test_the_model_directory_is_complete_and_records_its_training(trained, toy):
    recipe = json.loads((trained.model / "reward_model.json").read_text())
    assert recipe["label"] == "toy" and recipe["objective"] == "agentprm" and recipe["seed"] == 0
    assert recipe["targets"]["gae_lambda"] == 0.95 and recipe["targets"]["beta"] == 1.0
    assert recipe["value_range"] == [0.0, 1.0]
    assert recipe["validation"]["auroc"] == pytest.approx(trained.validations[-1]["auroc"])
    assert recipe["steps"] == len(trained.losses)
    assert recipe["trained_on"]["tokens"] == sum(line["tokens"] for line in trained.lines if "loss" in line)
    assert Encoder.load(trained.model).fingerprint == Encoder.load(toy.base).fingerprint
    split, turns = open_dataset(toy.shards).split("train"), {"action": [], "observation": []}
    for first, end in itertools.pairwise(split.step_starts):
        for step in range(first, end):
            turns["action"].append(split.read_positions[step] - split.state_positions[step])
            if step + 1 < end:
                turns["observation"].append(split.state_positions[step + 1] - split.read_positions[step])
    for name, tokens in turns.items():
        assert sorted(tokens)[len(tokens) // 2] == recipe["turn_tokens"][name]["median"], name
        assert np.mean(np.asarray(tokens) <= recipe["turn_tokens"][name]["most"]) >= 0.99, name
    config = json.loads((trained.model / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["max_position_embeddings"] == 256
    assert not list(trained.output.glob("*.partial"))


def test_a_written_model_scores_as_it_did_in_training(trained, toy):
    records = validation_records(trained.model, toy)
    last = trained.validations[-1]
    numbers = summary(records)
    assert numbers.pop("loss") == pytest.approx(last["validation_loss"], rel=1e-5)
    assert numbers == pytest.approx({name: last[name] for name in numbers}, rel=1e-5)
    # Half of the trajectories are duplicates: records count them by weight.
    assert records.weights.sum() > len(records.weights)
    assert set(records.tasks) == {f"validation/{task}" for task in range(12)}


def test_a_finished_model_is_returned_at_once(trained, toy, monkeypatch):
    monkeypatch.setattr(train, "training_batches", None)
    arguments = {"shards": toy.shards, "base": toy.base, "output": trained.output}
    assert train_reward_model(toy.experiment, toy.settings(), 0, **arguments) == trained.model
    # More frequent evaluations do not make it another model.
    assert train_reward_model(toy.experiment, toy.settings(evaluate_every=7), 0, **arguments) == trained.model


def test_a_finished_model_of_another_config_is_refused(trained, toy):
    refused(UserError, "another config", toy, trained.output, settings=toy.settings(gae_lambda=0.5))
    data = msgspec.structs.replace(toy.experiment.data, rows=4)
    other = msgspec.structs.replace(toy.experiment, data=data)
    refused(UserError, "another config", toy, trained.output, experiment=other)


def test_a_checkpoint_of_another_config_or_seed_is_refused(trained, toy, tmp_path):
    shutil.copytree(trained.output / "checkpoints", tmp_path / "checkpoints")
    refused(UserError, "its config differs", toy, tmp_path, settings=toy.settings(learning_rate=1e-4))
    with pytest.raises(UserError, match="its seed differs"):
        train_reward_model(toy.experiment, toy.settings(), 1, shards=toy.shards, base=toy.base, output=tmp_path)
    assert (tmp_path / "checkpoints").is_dir() and not (tmp_path / "model").exists()


def test_shards_of_another_tokenizer_are_refused(toy, tmp_path):
    shutil.copytree(toy.base, tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    refused(DataError, "built with tokenizer", toy, tmp_path / "output", base=tmp_path / "base")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(toy, tmp_path):
    shutil.copytree(toy.base, tmp_path / "base")
    config, transformer = reader.load_transformer(toy.base)
    small = dataclasses.replace(config, vocab_size=200)
    transformer["embedding"] = nnx.Param(transformer["embedding"][:200])
    writer.write_model(tmp_path / "base", small, transformer, pad_id=0, end_id=1, max_length=256)
    refused(UserError, "its embedding 200", toy, tmp_path / "output", base=tmp_path / "base")


def test_a_directory_that_is_no_reward_model_is_left_alone(toy, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    refused(UserError, "no trained reward model", toy, tmp_path)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "mine"


def test_settings_that_train_nothing_are_refused_before_any_file_is_read(toy, tmp_path):
    settings = toy.settings(gae_lambda=0.0)
    refused(UserError, "gae_lambda is 0", toy, tmp_path, settings=settings, base=tmp_path / "nowhere")


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(toy, tmp_path, monkeypatch):
    def make_train_step(graph, optimizer, settings, forward_options):
        def train_step(state, batch, frozen):
            step = state["step"] + 1
            loss = jnp.where(step == 8, jnp.nan, 1.0)
            return state | {"step": step}, {"loss": loss, "gradient_norm": jnp.float32(1)}

        return train_step

    monkeypatch.setattr(programs, "make_train_step", make_train_step)
    settings = toy.settings(checkpoint_every=5, evaluate_every=1000)
    where = rf"loss is nan at step 8; last good checkpoint: .*{tmp_path.name}/checkpoints/5;"
    refused(UserError, where, toy, tmp_path, settings=settings)
    # The message names the trajectories of the eighth batch too.
    stream = training_batches(toy.shards, rows=8, length=128, steps_per_row=32, epochs=4, seed=0)
    examples = [next(stream) for _ in range(8)][-1]["example"]
    ids = {stream.split.ids[example] for example in examples[examples >= 0]}
    assert set(stream.trajectories(7)) == ids
    refused(UserError, f"its {len(stream.trajectories(7))} trajectories: train/", toy, tmp_path, settings=settings)
    assert [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    assert not (tmp_path / "model").exists()
    # Resumed from the checkpoint it fails again: no line was doubled, and no bad state was saved.
    refused(UserError, where, toy, tmp_path, settings=settings)
    assert [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_an_interrupted_run_writes_its_model_from_the_last_checkpoint(trained, train_toy, tmp_path):
    """The run was killed between its last checkpoint and its model, and left a partly written model."""
    shutil.copytree(trained.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "model.partial").mkdir()
    again = train_toy(tmp_path / "run")
    for name in ("model.safetensors", "reward_model.json", "config.json", "tokenizer.json"):
        assert (again.model / name).read_bytes() == (trained.model / name).read_bytes(), name
    assert again.lines == trained.lines
    assert not any("train_step" in name for name in again.compiled)


def test_a_run_prints_what_it_is_trained_on_and_records_it(trained, train_toy, toy, tmp_path, capsys):
    split = open_dataset(toy.shards).split("train")
    recipe = json.loads((trained.model / "reward_model.json").read_text())
    assert sum(recipe["lengths"].values()) == len(split.ids) == recipe["trained_on"]["trajectories"]
    assert recipe["lengths"]["32"] == sum(32 <= length < 64 for length in split.lengths)
    assert recipe["skipped"] == {split: {"shards": 0, "trajectories": 0} for split in ("train", "validation")}
    assert recipe["fill"] == pytest.approx(recipe["trained_on"]["tokens"] / (recipe["steps"] * 8 * 128), abs=1e-4)
    shutil.copytree(trained.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    train_toy(tmp_path / "run")
    printed = capsys.readouterr().err
    batches = f"{recipe['steps']} batches of 8 x 128 tokens, {recipe['fill']:.1%} full"
    assert f"train toy, seed 0: {len(split.ids)} trajectories, {batches}" in printed
    assert f"32 to 63 in {recipe['lengths']['32']}" in printed and "left out" not in printed


def test_a_broken_shard_is_an_error_or_is_left_out_by_choice(toy, tmp_path, capsys):
    shards = shutil.copytree(toy.shards, tmp_path / "shards")
    first, second = sorted(shards.glob("*-train.tfrecord*"))
    kept = second.read_bytes()
    first.write_bytes(first.read_bytes()[:-1])
    refused(DataError, rf"{first.name}: the shard is truncated: it ends at offset \d+", toy, tmp_path, shards=shards)

    data = msgspec.structs.replace(toy.experiment.data, skip_bad=True)
    skipping = msgspec.structs.replace(toy.experiment, data=data)
    settings = toy.settings(epochs=1)
    arguments = {"shards": shards, "base": toy.base, "output": tmp_path / "run"}
    model = train_reward_model(skipping, settings, 0, **arguments)
    recipe, complete = json.loads((model / "reward_model.json").read_text()), open_dataset(toy.shards)
    lost = len(complete.split("train").ids) - recipe["trained_on"]["trajectories"]
    assert recipe["skipped"]["train"] == {"shards": 1, "trajectories": lost} and lost > 10
    assert recipe["skipped"]["validation"] == {"shards": 0, "trajectories": 0}
    assert sum(recipe["lengths"].values()) == recipe["trained_on"]["trajectories"]
    printed = capsys.readouterr().err
    assert f"left out: {first}: the shard is truncated" in printed
    assert f"left out of train: 1 broken shards with {lost} trajectories" in printed
    # With the same shard left out it is the same run; with another one or none it is not.
    assert train_reward_model(skipping, settings, 0, **arguments) == model
    shutil.copy(toy.shards / first.name, first)
    refused(UserError, "trained with another dataset", toy, tmp_path / "run", shards=shards, settings=settings)
    second.write_bytes(kept[:-1])
    changes = {"experiment": skipping, "shards": shards, "settings": settings}
    refused(UserError, "trained with another dataset", toy, tmp_path / "run", **changes)


@pytest.mark.parametrize("objective", ["pvm", "orm"])
def test_the_baselines_train_on_the_same_shards(train_toy, objective):
    baseline = train_toy(objective=objective, epochs=2)
    assert np.mean(baseline.losses[-5:]) < np.mean(baseline.losses[:5])
    assert baseline.validations[-1]["auroc"] > 0.7
    assert json.loads((baseline.model / "reward_model.json").read_text())["targets"]["beta"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "head", "last_k"])
def test_a_part_is_trained_and_a_full_model_is_written(train_toy, toy, trainable):
    dtype = "bfloat16" if trainable == "lora" else "float32"
    part = train_toy(trainable=trainable, last_k=1, epochs=2, dtype=dtype)
    assert np.mean(part.losses[-5:]) < np.mean(part.losses[:5])
    last = part.validations[-1]
    again = summary(validation_records(part.model, toy))
    # A run in bfloat16 is evaluated in bfloat16.
    assert again["loss"] == pytest.approx(last["validation_loss"], rel=2e-2 if trainable == "lora" else 1e-4)
    # Frozen parameters are unchanged.
    _, first = from_policy(toy.base, 0)
    _, trained = reader.load_reward_model(part.model)
    same = {
        name: np.array_equal(leaf[...], first["transformer"]["blocks"][name][...])
        for name, leaf in trained["transformer"]["blocks"].items()
    }
    assert not np.array_equal(trained["head"][...], first["head"][...])
    np.testing.assert_array_equal(trained["transformer"]["embedding"][...], first["transformer"]["embedding"][...])
    if trainable == "head":
        assert all(same.values())
    elif trainable == "lora":
        assert not same["query"] and not same["down"] and same["ffn_norm"] and same["query_bias"]
    else:
        assert not any(same.values())
        up = trained["transformer"]["blocks"]["up"][...]
        np.testing.assert_array_equal(up[0], first["transformer"]["blocks"]["up"][0])


def test_a_reward_model_starts_from_the_policy_and_its_head_from_the_seed(toy, tmp_path):
    config, transformer = reader.load_transformer(toy.base)
    untied = dataclasses.replace(config, tie_embeddings=False)
    policy = nnx.State(dict(transformer.items()) | {"unembedding": nnx.Param(transformer["embedding"][...] + 1)})
    writer.write_model(tmp_path, untied, policy, pad_id=0, end_id=1, max_length=256)
    reward_config, first = from_policy(tmp_path, 0)
    _, again = from_policy(tmp_path, 0)
    _, other = from_policy(tmp_path, 1)
    # It predicts no token, so it has no unembedding.
    assert reward_config == config and "unembedding" not in first["transformer"]
    for copied, original in zip(jax.tree.leaves(first["transformer"]), jax.tree.leaves(transformer), strict=True):
        np.testing.assert_array_equal(copied, original)
    np.testing.assert_array_equal(first["head"][...], again["head"][...])
    assert np.abs(first["head"][...] - other["head"][...]).max() > 1e-3
    assert 0.005 < np.std(first["head"][...]) < 0.05


def test_the_last_checkpoint_is_the_model_and_can_be_scored_before_it_is_written(trained, tmp_path):
    """The files next to the checkpoints make models of them; the finished model has the weights of the last one."""
    last = find_model(shutil.copytree(trained.output, tmp_path / "run", ignore=lambda *_: ["model"]))
    assert last == tmp_path / "run" / "checkpoints" / str(len(trained.losses))
    loaded = [loading.load_reward_model(path) for path in (last, trained.model)]
    (checkpoint_config, parameters), (config, finished) = loaded
    assert checkpoint_config == config
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(parameters), nnx.to_pure_dict(finished))
    recipes = [read_recipe(path) for path in (last, trained.model)]
    assert recipes[0].pop("unfinished") is True
    assert {"steps", "trained_on", "fingerprints"} < recipes[0].keys() <= recipes[1].keys()
    assert recipes[0]["validation"].keys() == recipes[1]["validation"].keys()
    assert (files.sha256(trained.output / "model-files" / "config.json")) == files.sha256(trained.model / "config.json")


def test_a_base_that_cannot_be_exported_is_refused_before_the_first_step(toy, trained, tmp_path, monkeypatch):
    def refuse(base, encoder):
        raise UserError(f"model {base}: cannot be exported")

    monkeypatch.setattr(train, "check_exportable", refuse)
    refused(UserError, "cannot be exported", toy, tmp_path / "output")
    assert not (tmp_path / "output").exists()
    # What is trained, or has begun, is not stopped by it: it can be scored and searched with all the same.
    arguments = {"shards": toy.shards, "base": toy.base, "output": trained.output}
    assert train_reward_model(toy.experiment, toy.settings(), 0, **arguments) == trained.model
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(train.sharding, "make_mesh", lambda settings: pytest.fail("reached the mesh"))
    with pytest.raises(pytest.fail.Exception, match="reached the mesh"):
        train_reward_model(toy.experiment, toy.settings(), 0, **arguments | {"output": tmp_path / "begun"})


def test_values_begin_at_the_mean_of_the_targets(trained):
    first = trained.lines[0]
    # Not equal: targets lean on values, which differ around their mean.
    assert first["value_mean"] == pytest.approx(first["target_mean"], abs=0.01)
    assert 0.2 < first["target_mean"] < 0.8
