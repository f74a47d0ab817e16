"""SmolLM2-135M-Instruct through the product: read, trained on, checked, exported, served, and searched with.

Real weights have what random ones lack: one large mean vector in all hidden states, a tokenizer whose padding token
ends messages, a template with a system prompt of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jaxprm
from benchmarks import learning_rates
from benchmarks.smollm2 import prepare
from data_pipeline.batches import evaluation_batches
from data_pipeline.encode import Encoder
from data_pipeline.shards import open_dataset
from data_pipeline.trajectory import parse_line
from jaxprm import cli, files
from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.evaluation.value_metrics import validation
from jaxprm.hf import reader
from jaxprm.model.transformer import transformer_graph
from jaxprm.training.evaluate import step_values
from tests.docs import pages
from tests.policies.transformers_server import free_port, transformers_server, wait_until_healthy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE = """
import msgspec
from jaxprm import config as config_lib

recipe = config_lib.load({recipe!r})
config = msgspec.structs.replace(
    recipe,
    base_model={base!r},
    collection=msgspec.structs.replace(recipe.collection, trajectories_per_task=3),
    reward_models=tuple(model for model in recipe.reward_models if model.label == "agentprm"),
)
"""
# The policy of a real model: few tokens of few actions, because it writes twenty tokens a second here.
SEARCH = [
    "environment.arguments.max_rounds=2",
    "policy.max_action_tokens=12",
    "policy.max_tokens=1500",
    "search.tasks=1",
    "search.pool=2",
    "search.best_of_n=[1,2]",
    "search.prefix_steps=1",
    "search.prefix_best_of_n=[1,2]",
    "search.beams=[]",
    "search.stepwise=[2]",
    "search.trees=1",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    try:
        return prepare(tmp_path_factory.mktemp("smollm2") / "base")
    except UserError as error:
        pytest.fail(f"the slow tests need a real model: {error}")


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory) -> Path:
    """The shipped recipe, with half of the trajectories and one objective."""
    path = tmp_path_factory.mktemp("recipe") / "smollm2.py"
    path.write_text(RECIPE.format(recipe=str(ROOT / "configs/smollm2_head.py"), base=str(base)))
    return path


@pytest.fixture(scope="module")
def trajectories(recipe, tmp_path_factory) -> Path:
    """Folder of trajectories that the shipped policy sampled."""
    workdir = tmp_path_factory.mktemp("collected")
    assert cli.main(["collect", str(recipe), "--workdir", str(workdir)]) == 0
    return workdir / "trajectories"


@pytest.fixture(scope="module")
def command(recipe, trajectories) -> list[str]:
    """Options of the verbs that train on these trajectories."""
    files = [f"{split}={trajectories / split}.jsonl" for split in ("train", "validation")]
    return [str(recipe), f"collection.files={json.dumps(files)}"]


@pytest.fixture(scope="module")
def workdir(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    assert cli.main(["train", *command, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def model(workdir) -> Path:
    return workdir / "reward_models/agentprm/seed-0/model"


def read(path: Path) -> list:
    return [parse_line(line, where=path.name) for line in path.read_bytes().splitlines()]


def plain(trajectory) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in trajectory.messages]


def test_hidden_states_and_logits_are_those_of_torch(base):
    tokens = np.random.default_rng(0).integers(100, 40_000, size=(2, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), output_hidden_states=True)
    config, state = reader.load_transformer(base)
    graph, positions = transformer_graph(config), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def outputs(state):
        model = nnx.merge(graph, state)
        hidden = model(tokens, positions, jnp.ones_like(tokens)).hidden
        return hidden, model.logits(hidden)

    # Rounding in another order, through 30 layers, relative to the largest number.
    for ours, reference in zip(outputs(state), (expected.hidden_states[-1], expected.logits), strict=True):
        reference = reference.numpy()
        assert np.abs(np.asarray(ours) - reference).max() < 1e-4 * np.abs(reference).max()


def test_its_padding_token_ends_messages_so_another_one_pads(base, trajectories, capsys):
    encoder = Encoder.load(base)
    settings = files.read_json(base / "tokenizer_config.json")
    assert settings["pad_token"] == settings["eos_token"] == encoder.decode([encoder.end_id])
    encoded = encoder.trajectory(plain(read(trajectories / "validation.jsonl")[0]), row="first")
    assert encoder.pad_id != encoder.end_id and encoder.pad_id not in encoded.tokens
    arguments = ["validate", str(trajectories / "train.jsonl"), "--tokenizer", str(base)]
    assert cli.main(arguments) == 0
    assert "0 bad" in capsys.readouterr().out


def test_a_head_on_its_hidden_states_tells_success_from_failure_far_better_than_depth(model, workdir, recipe, base):
    metrics = files.read_json(model / "reward_model.json")["validation"]
    # The steps that the head was judged on. Those after data.length tokens are cut; nearly all are of failures, so that
    # depth alone would tell a lot if they counted.
    dataset = open_dataset(workdir / "shards", encoder_fingerprint=Encoder.load(base).fingerprint)
    data = config_lib.load(recipe).data
    shape = {"rows": data.rows, "length": data.length, "steps_per_row": data.steps_per_row}
    nothing = np.zeros((data.rows, data.steps_per_row))
    records = step_values(lambda _: (nothing, nothing), evaluation_batches(dataset, "validation", **shape))
    by_depth = validation([dataclasses.replace(records, values=-records.depths.astype(float))])["auroc"]["mean"]
    assert metrics["auroc"] > max(by_depth, 1 - by_depth) + 0.1, by_depth
    # The head began at the mean of the targets: the first loss is not that of a constant far away.
    lines = list(files.read_lines(model.parent / "metrics.jsonl"))
    assert lines[0]["loss"] < 0.2 and lines[0]["value_mean"] == pytest.approx(lines[0]["target_mean"], abs=0.02)


def test_the_benchmark_of_learning_rates_runs_as_on_the_page(command, workdir, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (arguments,) = pages.command_lines(text, "benchmarks.learning_rates")
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert options["--config"] == "configs/smollm2_head.py" and "centred random" in " ".join(arguments)
    config, override = command
    monkeypatch.setattr(sys, "argv", ["learning_rates", "--config", config, "--workdir", str(workdir)])
    sys.argv += ["--output", str(tmp_path / "rates"), "--rates", "1e-4", "--starts", "centred", "random"]
    sys.argv += ["--epochs", "1", override]
    learning_rates.main()
    lines = (tmp_path / "rates/table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| head | 0.0001 |")]
    assert len(rows) == 3 and "depth alone" in "".join(lines)
    # A centred head begins where the loss is small: its first gradient is not of one large vector.
    norms = [float(row.split("|")[-2]) for row in rows[:2]]
    assert norms[0] < norms[1] / 5
    (before,) = (tmp_path / "rates").glob("*-centred-*.npz")
    written = before.stat().st_mtime_ns
    learning_rates.main()
    assert before.stat().st_mtime_ns == written


def test_its_scores_do_not_depend_on_how_they_are_computed(model, trajectories, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((trajectories / "validation.jsonl").read_text().splitlines(keepends=True)[:1]))
    assert cli.main(["check-scorer", "--model", str(model), "--input", str(few)]) == 0
    assert "passed" in capsys.readouterr().out


def test_its_export_is_verified_with_transformers(model, tmp_path, capsys):
    assert cli.main(["export", "--model", str(model), "--output", str(tmp_path / "export"), "--verify"]) == 0
    assert "verified: largest difference" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.pad_token != theirs.eos_token


def test_a_server_gives_the_scores_of_the_loaded_model(model, trajectories, tmp_path):
    messages = plain(read(trajectories / "validation.jsonl")[0])[:3]
    candidates = ["I give up.", "Action: inventory"]
    (expected,) = [jaxprm.load(model).score_actions(messages, candidates)]
    port, log = free_port(), tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "jaxprm", "serve", "--model", str(model), "--port", str(port)]
        # Few shapes: each takes seconds to compile here.
        command += ["--rows", "2", "--max-tokens", "256"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(process, port, log, seconds=300)
        body = json.dumps({"messages": messages, "candidates": candidates}).encode()
        url, headers = f"http://127.0.0.1:{port}/v1/score_actions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as response:
            scores = json.load(response)["scores"]
    finally:
        process.terminate()
        process.wait(30)
    served, ours = ([score["promise"] for score in scores], [score.promise for score in expected])
    np.testing.assert_allclose(served, ours, atol=1e-4)


def test_a_search_with_a_server_of_it_reaches_results(command, workdir, base, tmp_path):
    served = tmp_path / "smollm2"
    served.mkdir()
    for path in base.iterdir():
        (served / path.name).symlink_to(path)
    (served / "generation_config.json").unlink()
    # This server samples only if the model's generation config says so, whatever the requested temperature.
    settings = {"do_sample": True, "eos_token_id": 2, "pad_token_id": 2}
    (served / "generation_config.json").write_text(json.dumps(settings))
    with transformers_server(tmp_path, threads=2) as url:
        endpoint = {"base_url": url, "model": str(served), "requests_in_flight": 1, "retries": 1}
        arguments = [*command, *SEARCH, f"policy.endpoint={json.dumps(endpoint)}"]
        assert cli.main(["report", *arguments, "--workdir", str(workdir)]) == 0
    results = files.read_json(workdir / "results.json")
    assert "agentprm" in json.dumps(results["methods"]) and results["methods"]
