"""Every kind of file that a verb reads: a healthy example, how it is broken, and the verbs that read it."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.model import tiny
from tests.mutation import mutations as mutate
from tests.mutation.outcomes import command, json_reason

Verb = Callable[[Path], Any]
Reason = Callable[[bytes, bytes], str | None]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        make: writes a directory that holds a healthy file at `file`.
        mutators: each makes one random mutation.
        verbs: what reads it, by name: a function of the directory that returns the comparable output.
        reason: why other content may change the output.
        names: an error names one of these; by default the file's name.
    """

    name: str
    make: Callable[[Path], None]
    file: str
    mutators: tuple[mutate.Mutate, ...]
    verbs: dict[str, Verb]
    reason: Reason = json_reason
    names: tuple[str, ...] = ()


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


def write_trajectories(path: Path, count: int = 4) -> None:
    lines = []
    for number in range(count):
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
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}


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


SCORING: dict[str, Verb] = {"load": load, "score": score, "evaluate": evaluate, "export": export, "serve": serve}
BYTES, JSON = (mutate.one_bytes,), (mutate.one_json, mutate.one_json, mutate.one_bytes)


def of_run(verb: Verb) -> Verb:
    return functools.partial(verb, name="run")


def any_text(before: bytes, after: bytes) -> str | None:
    """A file whose every valid content has a meaning."""
    return "another valid content"


def weights_reason(before: bytes, after: bytes) -> str | None:
    """Any bytes of a tensor are numbers; a header has one meaning."""
    length = int.from_bytes(before[:8], "little")
    same_header = after[: 8 + length] == before[: 8 + length]
    return (
        "other numbers in a tensor"
        if same_header and len(before) == len(after)
        else json_reason_of_header(before, after)
    )


def json_reason_of_header(before: bytes, after: bytes) -> str | None:
    headers = [text[8 : 8 + int.from_bytes(text[:8], "little")] for text in (before, after)]
    with suppress(ValueError):
        return json_reason(*headers)
    return None


MODELS = (
    Kind("reward_model.json", make_model, "model/reward_model.json", JSON, SCORING, names=("reward_model.json", "/model:")),
    Kind("config.json", make_model, "model/config.json", JSON, SCORING | {"plan": plan}, names=("config.json", "/model")),
    Kind("tokenizer.json", make_model, "model/tokenizer.json", JSON, SCORING, names=("tokenizer.json", "/model")),
    Kind("tokenizer_config.json", make_model, "model/tokenizer_config.json", JSON, SCORING, names=("/model",)),
    Kind("special_tokens_map.json", make_model, "model/special_tokens_map.json", JSON, {"export": export}, names=("/model",)),
    Kind("chat_template.jinja", make_model, "model/chat_template.jinja", BYTES, SCORING, any_text, names=("/model",)),
    Kind(
        "model.safetensors",
        make_model,
        "model/model.safetensors",
        (mutate.one_safetensors,),
        {"load": load, "score": score, "export": export},
        weights_reason,
        names=("/model",),
    ),
    Kind(
        "index of safetensors",
        make_sharded_model,
        "model/model.safetensors.index.json",
        JSON,
        {"load": load, "export": export},
        names=("/model",),
    ),
)  # fmt: skip

KINDS = MODELS
