"""Healthy examples of the files that verbs read, and the verbs as functions of a directory with comparable output."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.model import tiny
from tests.mutation.outcomes import command

Verb = Callable[[Path], Any]

# Models and checkpoints.

RECIPE = {
    "format": "jaxprm-reward-model",
    "version": 1,
    "max_tokens": 1024,
    "seed": 3,
    "trained_on": {"trajectories": 1234, "tokens": 56789},
    "turn_tokens": {"action": {"median": 5, "most": 9}, "observation": {"median": 6, "most": 12}},
    "config": {"trainable": "full", "label": "agentprm"},
    "validation": {"loss": 0.0625, "by_depth": {"1": 0.5}},
    "objective_text": "the outcome",
}


def make_model(directory: Path) -> None:
    fingerprints = {"fingerprints": {"tokenizer": tiny.encoder().fingerprint, "shards": "s"}}
    model = tiny.write_reward_model(directory / "model")
    recipe = json.loads((model / "reward_model.json").read_text()) | RECIPE | fingerprints
    (model / "reward_model.json").write_text(json.dumps(recipe))
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": tiny.encoder().decode([1]), "x": "y"}))
    write_trajectories(directory / "t.jsonl")


def make_sharded_model(directory: Path) -> None:
    from jaxprm.hf import writer

    make_model(directory)
    model, encoder = directory / "model", tiny.encoder()
    (model / "model.safetensors").unlink()
    sizes = {"pad_id": encoder.pad_id, "end_id": encoder.end_id, "max_length": 1024}
    writer.write_model(model, tiny.CONFIG, tiny.reward_model(), **sizes, max_shard_bytes=40_000)


def make_checkpoint(directory: Path) -> None:
    import jax.numpy as jnp

    from jaxprm.artifacts.checkpoints import Checkpoints
    from jaxprm.artifacts.directory import DESCRIPTION

    make_model(directory)
    checkpoints = Checkpoints(directory / "run/checkpoints", {"config": "c", "seed": 3}, config={"label": "agentprm"})
    state = {"step": jnp.int32(7), "parameters": tiny.reward_model(), "optimizer": {"mu": jnp.ones(3)}}
    checkpoints.save(7, state, {"batches": 7})
    checkpoints.close()
    shutil.move(directory / "model", directory / "run" / DESCRIPTION)
    log = [{"step": 5, "validation_loss": 0.5}, {"step": 7, "loss": 0.1}, {"step": 9, "validation_loss": 0.25}]
    (directory / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def write_trajectories(path: Path, count: int = 4, first: int = 0) -> None:
    lines = []
    for number in range(first, first + count):
        messages = tiny.conversation(number)
        line = {"id": f"row {number}", "task": f"task {number // 2}", "environment": "craft", "messages": messages}
        line |= {"outcome": number % 2, "success": bool(number % 2), "step_labels": [1, 0, 1], "ended": "done"}
        line |= {"meta": {"level": number % 2, "own": {"labels": [0.5, None, 1]}}, "policy": {"name": "p"}}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def load(directory: Path, name: str = "model") -> Any:
    """What loading a model for scoring gives: its config and parameters, tokens of a conversation, and its recipe."""
    from jaxprm.api import Model
    from jaxprm.artifacts.directory import find_model, model_identity, read_recipe
    from jaxprm.scoring.loading import load_scorer

    model = find_model(directory / name)
    scorer, recipe = load_scorer(model), read_recipe(model)
    model_identity(model)
    Model(scorer, recipe)
    tokens = scorer.encoder.trajectory(tiny.conversation(3), row="x").tokens.tolist()
    return str(scorer.config), digest(scorer.parameters), tokens, str(scorer.engine.shapes)


def digest(parameters: Any) -> str:
    import jax

    leaves = jax.tree.leaves(parameters)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def score(directory: Path, name: str = "model") -> Any:
    output = directory / "scores"
    for path in directory.glob("scores*"):
        path.unlink()
    status = command("score", "--model", directory / name, "--input", directory / "t.jsonl", "--output", output)()
    return status, output.read_text()


def evaluate(directory: Path, name: str = "model", *options: str) -> Any:
    output = directory / "report.json"
    arguments = ("--model", directory / name, "--input", directory / "t.jsonl", "--json", output, "--samples", 20)
    status = command("evaluate", *arguments, *options)()
    report = json.loads(output.read_text())
    del report["models"], report["input"]["sha256"]
    return status, json.dumps(report)


def export(directory: Path, name: str = "model") -> Any:
    output = directory / "exported"
    shutil.rmtree(output, ignore_errors=True)
    command("export", "--model", directory / name, "--output", output)()
    from data_pipeline.encode import Encoder
    from jaxprm.hf.reader import read_config

    # Not the files that are copied as they are: what they mean.
    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.glob("*.safetensors"))]
    return weights, str(read_config(output)[0]), Encoder.load(output).fingerprint, (output / "README.md").read_text()


def serve(directory: Path, name: str = "model") -> Any:
    """The serve verb up to the socket: the model is loaded, nothing is served."""
    with mock.patch("jaxprm.serving.server.run") as run:
        command("serve", "--model", directory / name, "--port", 0)()
        return run.call_args.args[0].batcher is not None


def check_scorer(directory: Path, name: str = "model") -> Any:
    return command("check-scorer", "--model", directory / name)()


def plan(directory: Path, name: str = "model") -> Any:
    from jaxprm.planning.models import policy_config

    return str(policy_config(directory / name))


def inspect(directory: Path) -> Any:
    from jaxprm.artifacts import checkpoints

    description = checkpoints.inspect(directory / "run")
    return checkpoints.summary(description), json.dumps(description)


def resume(directory: Path) -> Any:
    """The state that a resumed training run starts from."""
    import jax

    from jaxprm.artifacts.checkpoints import Checkpoints, abstract

    state = {"step": jax.numpy.int32(7), "parameters": tiny.reward_model(), "optimizer": {"mu": jax.numpy.ones(3)}}
    checkpoints = Checkpoints(directory / "run/checkpoints", {"config": "c", "seed": 3})
    restored = checkpoints.restore(abstract(state))
    return "nothing" if restored is None else (restored[0], digest(restored[1]), restored[2])


# Datasets.


def make_dataset(directory: Path) -> None:
    from data_pipeline.build import build

    for first, split in enumerate(("train", "validation")):
        write_trajectories(directory / f"{split}.jsonl", 2, 2 * first)
    inputs = {"train": [directory / "train.jsonl"], "validation": [directory / "validation.jsonl"]}
    build(inputs, tiny.encoder(), directory / "shards", max_length=None, shards=1)


def read_dataset(directory: Path) -> Any:
    from data_pipeline.shards import open_dataset

    dataset = open_dataset(directory / "shards", encoder_fingerprint=tiny.encoder().fingerprint)
    splits = [dataset.split(name) for name in ("train", "validation")]
    fields = [value.tolist() if isinstance(value, np.ndarray) else value for split in splits for value in split]
    return str(fields), dataset.fingerprint, dataset.metadata.pad_id


# Trajectories.


def make_trajectories(directory: Path) -> None:
    make_model(directory)


def validate(directory: Path) -> Any:
    output = directory / "validated.json"
    status = command("validate", directory / "t.jsonl", "--json", output, "--tokenizer", directory / "model")()
    return status, output.read_text()


def import_rows(directory: Path) -> Any:
    output = directory / "imported.jsonl"
    output.unlink(missing_ok=True)
    arguments = (
        "--format",
        "openai",
        "--input",
        directory / "t.jsonl",
        "--output",
        output,
        "--outcome-field",
        "outcome",
    )
    status = command("import-trajectories", *arguments)()
    return status, output.read_text()


def collect(directory: Path) -> Any:
    """Trajectories of a user as a run takes them, with --data."""
    from jaxprm.workflow.user_files import import_files

    outputs = {"train": directory / "collected.jsonl"}
    arguments = [f"train={directory / 't.jsonl'}"]
    imported = import_files(arguments, outputs, validation_share=0.5, seed=0, skip_bad=False)
    return str(imported), outputs["train"].read_text()


# Reports.


def make_report(directory: Path) -> None:
    from tests.report.conftest import make_results, make_trees, write

    write(directory / "run", make_results(), make_trees()[:2])


def report(directory: Path) -> Any:
    """The page, without its figures' files, which take seconds."""
    from jaxprm.report.build import render
    from jaxprm.report.results import load_results, load_trees

    return render(load_results(directory / "run/results.json"), load_trees(directory / "run/search/trees.json"))


def make_run(directory: Path) -> None:
    from tests.report.conftest import make_results

    make_model(directory)
    model = directory / "run/reward_models/agentprm/seed-0/model"
    model.parent.mkdir(parents=True)
    shutil.move(directory / "model", model)
    (directory / "run/results.json").write_text(json.dumps(make_results()))


# Configs.


def make_overrides(directory: Path) -> None:
    (directory / "overrides.json").write_text(
        json.dumps(
            {
                "search.pool": 64,
                "search.beams": [[2, 2]],
                "collection.files": ["a.jsonl"],
                "environment.arguments": {"a": {"b": [1]}},
                "reward_models.0.learning_rate": 0.5,
                "policy.endpoint": {"model": "m", "base_url": "http://127.0.0.1:1/v1", "extra_body": {"top_p": 0.5}},
                "name": "x",
            }
        )
    )


class _Members(list):
    """The members of a JSON object, repeated ones too."""


def _spelt(value: Any) -> str:
    if isinstance(value, _Members):
        return "{" + ", ".join(f"{json.dumps(name)}: {_spelt(member)}" for name, member in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_spelt, value)) + "]"
    return json.dumps(value)


def load_config(directory: Path) -> Any:
    """The config with the members of the file's object as overrides, each value as it is spelt there."""
    from jaxprm import config

    text = (directory / "overrides.json").read_bytes().decode("utf-8", "surrogateescape")
    try:
        members = json.loads(text, object_pairs_hook=_Members)
        if not isinstance(members, _Members):
            raise ValueError("no object")
        overrides = [f"{name}={_spelt(value)}" for name, value in members]
    except (ValueError, RecursionError):
        overrides = [f"search.pool={text}", f"environment.arguments.text={text}", text[:3000] + "=1"]
    experiment = config.load("textcraft_tiny", overrides)
    plain = json.dumps(config.to_dict(experiment), ensure_ascii=False)
    plain.encode()
    return plain
