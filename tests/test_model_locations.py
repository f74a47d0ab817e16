"""Every verb that loads a reward model takes every kind of location, with the same scores."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprm
from jaxprm import cli, config
from jaxprm.artifacts.checkpoints import Checkpoints
from jaxprm.artifacts.directory import DESCRIPTION
from jaxprm.errors import UserError
from jaxprm.hf import writer
from jaxprm.policies import loading
from jaxprm.serving import server
from jaxprm.serving.batcher import Asked
from jaxprm.serving.requests import Classify
from jaxprm.training import reward_model
from tests.model import tiny

STATE = tiny.reward_model()
CONVERSATIONS = [tiny.conversation(seed, turns=2 + seed % 2) for seed in range(4)]
LOCATIONS = ("directory", "sharded", "output", "run", "unfinished", "checkpoint")


@pytest.fixture(scope="module")
def locations(tmp_path_factory):
    """The same reward model as a directory, shards, outputs of finished and unfinished training, and a checkpoint."""
    folder = tmp_path_factory.mktemp("locations")
    paths = {name: folder / name for name in LOCATIONS}
    recipe = {"fingerprints": {"tokenizer": tiny.encoder().fingerprint}, "seed": 0}
    directory = tiny.write_reward_model(paths["directory"], STATE, **recipe)
    shutil.copytree(directory, paths["sharded"], ignore=shutil.ignore_patterns("*.safetensors"))
    ids = {"pad_id": tiny.encoder().pad_id, "end_id": tiny.encoder().end_id, "max_length": 1024}
    writer.write_model(paths["sharded"], tiny.CONFIG, STATE, **ids, max_shard_bytes=40_000)
    assert len(list(paths["sharded"].glob("*.safetensors"))) > 2
    shutil.copytree(directory, paths["output"] / "model")
    shutil.copytree(directory, paths["run"] / "reward_models/agentprm/seed-0/model")
    unfinished = folder / "unfinished"
    checkpoints = Checkpoints(unfinished / "checkpoints", {"config": "x"})
    optimizer = optax.adam(1e-3).init(STATE)
    checkpoints.save(20, {"step": jnp.int32(20), "parameters": STATE, "optimizer": optimizer}, {"rows": 7})
    checkpoints.close()
    base = tiny.write_policy(folder / "base")
    described = json.loads((directory / "reward_model.json").read_text()) | {"max_tokens": 1024, "base": str(base)}
    reward_model.describe(unfinished / DESCRIPTION, tiny.CONFIG, base=base, encoder=tiny.encoder(), recipe=described)
    (unfinished / "metrics.jsonl").touch()
    paths["checkpoint"] = unfinished / "checkpoints" / "20"
    return paths


@pytest.fixture(scope="module")
def input(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    rows = [
        {"id": str(n), "task": str(n // 2), "outcome": n % 2, "messages": messages}
        for n, messages in enumerate(CONVERSATIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected() -> list[np.ndarray]:
    encoded = [tiny.encoder().trajectory(messages, row="") for messages in CONVERSATIONS]
    return [tiny.values(STATE, item.tokens[None])[0, item.read_positions] for item in encoded]


def check_promises(results) -> None:
    for result, promises in zip(results, expected(), strict=True):
        tiny.assert_close([step["promise"] for step in result["steps"]], promises)


def load(path, input, tmp_path, capsys, monkeypatch):
    check_promises(jaxprm.load(path, rows=2, max_tokens=480).score(CONVERSATIONS))


def score(path, input, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.jsonl"
    assert cli.main(["score", "--model", str(path), "--input", str(input), "--output", str(output)]) == 0
    check_promises(map(json.loads, output.read_text().splitlines()))


def evaluate(path, input, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.json"
    arguments = ["--model", str(path), "--input", str(input), "--json", str(output), "--samples", "20"]
    assert cli.main(["evaluate", *arguments]) == 0
    report = json.loads(output.read_text())
    (numbers,) = report["outcomes"]["models"].values()
    squares = np.concatenate([(values - n % 2) ** 2 for n, values in enumerate(expected())])
    assert numbers["summary"]["mse"]["mean"] == pytest.approx(squares.mean(), rel=1e-4)
    assert re.fullmatch("[0-9a-f]{64}", report["models"][0]["sha256"])


def check_scorer(path, input, tmp_path, capsys, monkeypatch):
    assert cli.main(["check-scorer", "--model", str(path), "--input", str(input)]) == 0
    assert "passed" in capsys.readouterr().out


def export(path, input, tmp_path, capsys, monkeypatch):
    arguments = ["--model", str(path), "--output", str(tmp_path / "out"), "--max-shard-size", "40KB"]
    assert cli.main(["export", *arguments]) == 0
    check_promises(jaxprm.load(tmp_path / "out", rows=2, max_tokens=480).score(CONVERSATIONS))


def serve(path, input, tmp_path, capsys, monkeypatch):
    services = []
    monkeypatch.setattr(server, "run", lambda service, listening: services.append(service))
    assert cli.main(["serve", "--model", str(path), "--port", "0"]) == 0
    # The answers of the model's thread, without the thread and its warm-up.
    asked = [Asked(Classify("vllm", [], messages, None, True)) for messages in CONVERSATIONS]
    answers = services[0].batcher._answer(asked)
    tiny.assert_close([answer.values[0] for answer in answers], [promises[-1] for promises in expected()])


def base_model(path, input, tmp_path, capsys, monkeypatch):
    """A reward model that another one starts from."""
    experiment = config.Experiment(name="x", base_model=str(path))
    if "checkpoint" in path.parts[-2] or path.name == "unfinished":
        with pytest.raises(UserError, match=r"is a checkpoint of a training run; .* export --model .* base_model"):
            loading.base_directory(experiment)
        return
    directory = loading.base_directory(experiment)
    _, parameters = reward_model.reader.load_transformer(directory, unembedding=False)
    assert np.array_equal(parameters["embedding"][...], STATE["transformer"]["embedding"][...])


VERBS = (load, score, evaluate, check_scorer, export, serve, base_model)


@pytest.mark.slow
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_every_verb_takes_every_location(verb, location, locations, input, tmp_path, capsys, monkeypatch):
    verb(locations[location], input, tmp_path, capsys, monkeypatch)


def test_no_verb_that_loads_a_reward_model_is_missing_here():
    """A new verb with the option --model needs a line in VERBS."""
    from jaxprm.arguments import STAGE_VERBS, parser

    (verbs,) = (action.choices for action in parser()._actions if getattr(action, "choices", None))
    with_model = {name.replace("-", "_") for name, verb in verbs.items() if "--model" in verb.format_help()}
    # The stages take a base model, and plan reads sizes from config.json.
    assert with_model - set(STAGE_VERBS) - {"plan"} == {verb.__name__ for verb in VERBS} - {"load", "base_model"}
