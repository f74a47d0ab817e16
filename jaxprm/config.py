"""The experiment as one frozen, typed value; a config file is Python that names it `config`.

Every field has a type and, where it matters, a bound: a wrong name, type or value is one line that says which.
"""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from jaxprm.errors import UserError

Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part of a config: immutable, keyword-only, closed to unknown fields."""


class Environment(Section):
    """`name` is a registered environment or a user's `module:attribute`; `arguments` go to its constructor."""

    name: str = "textcraft"
    arguments: dict[str, Any] = {}


class Model(Section):
    """Sizes of a decoder made from nothing (imitation); a reward model takes its policy's."""

    vocab_size: Count = 1024
    hidden_size: Count = 128
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 2
    head_dim: Count = 32
    intermediate_size: Count = 256
    rope_theta: Positive = 10_000.0


class Imitation(Section):
    """Behaviour cloning of an environment's expert. Episodes are made on the fly: none is seen twice by design."""

    steps: Count = 10_000
    rows: Count = 16
    length: Count = 512
    learning_rate: Positive = 2e-3
    warmup_steps: Whole = 200
    weight_decay: NotNegative = 0.01
    tokenizer_episodes: Count = 2_000
    checkpoint_every: Count = 500
    demonstrations: dict[str, Any] = {}


class Policy(Section):
    """`path` is a model directory, `default` the one that ships with the package."""

    path: str = "default"
    max_action_tokens: Count = 96
    max_tokens: Count = 1024
    in_flight: Count = 128


class Collection(Section):
    """Trajectories sampled for training and validation. `tasks` null means all of a split."""

    train_tasks: Count | None = None
    validation_tasks: Count | None = None
    trajectories_per_task: Count = 16
    temperature: NotNegative = 1.0


class Data(Section):
    """Shards and packed batches; lengths in tokens."""

    shards: Count = 4
    rows: Count = 8
    length: Count = 1024
    steps_per_row: Count = 64
    too_long: Literal["error", "drop", "window"] = "window"


class RewardModel(Section):
    """One reward model: its objective (METHOD.md, sections 3 and 4) and its optimizer."""

    label: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]
    objective: Literal["agentprm", "pvm", "orm"] = "agentprm"
    beta: NotNegative = 1.0
    gae_lambda: Fraction = 0.95
    discount: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    bootstrap: Literal["action", "next", "state"] = "action"
    progress_gradient: Literal["both", "previous"] = "both"
    target_update: Literal["online", "ema", "copy"] = "online"
    target_decay: Fraction = 0.99
    target_every: Count = 50
    epochs: Count = 2
    learning_rate: Positive = 3e-4
    head_multiplier: Positive = 10.0
    warmup_fraction: Fraction = 0.05
    weight_decay: NotNegative = 0.01
    gradient_clip: Positive = 1.0
    evaluate_every: Count = 50
    checkpoint_every: Count = 100


class Mesh(Section):
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: Count = 1


class Search(Section):
    """What is searched on the held-out tasks. `tasks` null means all of the split."""

    split: Literal["validation", "test"] = "test"
    tasks: Count | None = None
    temperature: Positive = 0.7
    pool: Count = 32
    best_of_n: tuple[Count, ...] = (1, 2, 4, 8, 16, 32)
    prefix_steps: Count = 3
    prefix_best_of_n: tuple[Count, ...] = (1, 2, 4, 8, 16)
    beams: tuple[tuple[Count, Count], ...] = ((2, 2), (4, 4))
    stepwise: tuple[Count, ...] = (4,)
    progress_weight: NotNegative = 0.0
    trees: Whole = 6


class Experiment(Section):
    """A whole run: environment and policy -> trajectories -> shards -> reward models -> search -> report."""

    name: str
    seed: Whole = 0
    environment: Environment = Environment()
    policy: Policy = Policy()
    collection: Collection = Collection()
    data: Data = Data()
    reward_models: tuple[RewardModel, ...] = (RewardModel(label="agentprm"),)
    reward_seeds: tuple[Whole, ...] = (0,)
    mesh: Mesh = Mesh()
    search: Search = Search()
    bootstrap_samples: Count = 2_000
    model: Model = Model()
    imitation: Imitation = Imitation()


def load(path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False) -> Experiment:
    """The experiment in a Python file, with `section.field=value` overrides (values in JSON, or plain text).

    `quick` takes the file's `quick` instead of its `config`. Raises UserError, naming field, value and bound.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file; configs/ holds the recipes that ship")
    name = "quick" if quick else "config"
    try:
        found = runpy.run_path(str(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(found.get(name), Experiment):
        raise UserError(f"config {path}: must define `{name}`, a jaxprm.config.Experiment")
    plain = to_dict(found[name])
    for override in overrides:
        _apply(plain, override)
    return from_dict(plain, where=str(path))


def to_dict(experiment: Experiment) -> dict:
    """Plain JSON types."""
    return msgspec.to_builtins(experiment)


def from_dict(plain: dict, *, where: str) -> Experiment:
    """Validates and converts. Raises UserError, naming field, value and bound."""
    try:
        experiment = msgspec.convert(plain, Experiment)
    except msgspec.ValidationError as error:
        raise UserError(f"config {where}: {_with_value(plain, str(error))}") from None
    labels = [model.label for model in experiment.reward_models]
    if len(set(labels)) != len(labels):
        raise UserError(f"config {where}: reward_models: labels must differ, got {labels}")
    if "random" in labels:
        raise UserError(f"config {where}: reward_models: `random` is the label of the control; choose another")
    if experiment.search.pool < max(experiment.search.best_of_n + experiment.search.prefix_best_of_n):
        raise UserError(
            f"config {where}: search.pool = {experiment.search.pool} is smaller than the largest best-of-N; "
            "raise the pool or drop that N"
        )
    return experiment


def fingerprint(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _apply(plain: dict, override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"override {override!r}: write it as section.field=value")
    *path, last = name.split(".")
    node: Any = plain
    for part in path:
        node = node[int(part)] if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node) else (
            node.get(part) if isinstance(node, dict) else None
        )
        if node is None:
            raise UserError(f"override {override!r}: the config has no section {part!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {'.'.join(path)} has no fields")
    node[last] = value


def _with_value(plain: dict, message: str) -> str:
    """msgspec says what and where; a reader also wants the value."""
    what, separator, where = message.partition(" - at `$.")
    if not separator:
        return message
    where = where.rstrip("`")
    node: Any = plain
    for part in where.replace("[", ".").replace("]", "").split("."):
        if part == "...":
            return f"{where}: {what}"
        try:
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return f"{where}: {what}"
    return f"{where} = {json.dumps(node)}: {what[0].lower()}{what[1:]}"
