"""The experiment as one frozen, typed value; a config file is Python that names it `config`.

Every field has a type and, where it matters, a bound: a wrong name, type or value is one line that says which.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import runpy
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from jaxprm import redaction
from jaxprm.errors import UserError
from jaxprm.policies import endpoint_check

Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Devices = Annotated[int, msgspec.Meta(ge=-1)]
Counts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part of a config: immutable, keyword-only, closed to unknown fields."""


class Environment(Section):
    """`name` is a registered environment or a user's `module:attribute`; `arguments` go to its constructor.

    workers: 0 for environments in this process, one after the other; else each in a process of its own, so many of
    which work at a time. There a call may take `timeout` seconds, and a process hold `memory_mb` between episodes.
    """

    name: str = "textcraft"
    arguments: dict[str, Any] = {}
    workers: Whole = 0
    timeout: Positive = 120.0
    memory_mb: Count | None = None


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


class Endpoint(Section):
    """An OpenAI-compatible server of chat completions. `base_url` ends where `/chat/completions` begins.

    The key stays in the environment: `api_key_env` names the variable; null sends none. `served_as` is what the server
    calls the model in its answers, where that is neither `model` nor a version of it. `timeout_seconds` bounds one
    attempt as a whole, `retries` the further attempts; after `give_up_after` requests in a row that failed all theirs,
    the run stops. `extra_body` is added to every request; `"seed": null` there leaves the seed out.
    """

    model: Annotated[str, msgspec.Meta(min_length=1)]
    base_url: str = "http://127.0.0.1:8000/v1"
    api_key_env: str | None = None
    served_as: str | None = None
    requests_in_flight: Count = 32
    timeout_seconds: Positive = 120.0
    retries: Whole = 5
    give_up_after: Count = 64
    log_probabilities: bool = False
    extra_body: dict[str, Any] = {}


class Policy(Section):
    """`path` is a model directory or a name on the hub (org/name, org/name@revision), `default` the one that ships,
    or a user's `module:attribute`, to whose call `arguments` go beside the seed. An `endpoint` is asked in their place.

    `chat_template`, for the policy and the reward models that learn from it: `own` is the tokenizer's; `chatml` or
    `llama3` one that ships; anything else a file.
    """

    path: str = "default"
    chat_template: str = "own"
    endpoint: Endpoint | None = None
    arguments: dict[str, Any] = {}
    max_action_tokens: Count = 96
    max_tokens: Count = 1024
    in_flight: Count = 128


class Collection(Section):
    """Trajectories for training and validation. `tasks` null means all of a split.

    With `files`, each a FILE or SPLIT=FILE, nothing is sampled. Rows go to the split of their file, or to the one they
    name, or by a hash of their task, `validation_share` of the tasks to validation. `skip_bad` leaves bad rows out.
    """

    train_tasks: Count | None = None
    validation_tasks: Count | None = None
    trajectories_per_task: Count = 16
    temperature: NotNegative = 1.0
    files: tuple[str, ...] = ()
    validation_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    skip_bad: bool = False


class Data(Section):
    """Shards and packed batches; lengths in tokens. `skip_bad` leaves truncated and corrupt shards out of training."""

    shards: Count = 4
    rows: Count = 8
    length: Count = 1024
    steps_per_row: Count = 64
    too_long: Literal["error", "drop", "window"] = "window"
    skip_bad: bool = False


class Lora(Section):
    """Adapters: W + alpha / rank * A B for every matrix in `targets`, with A [I, rank] and B [rank, O]."""

    rank: Count = 16
    alpha: Positive = 32.0
    targets: Annotated[
        tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...], msgspec.Meta(min_length=1)
    ] = ("query", "key", "value", "output", "gate", "up", "down")


class RewardModel(Section):
    """One reward model: its objective (docs/method.md, sections 3, 5 and 6), its optimizer, and how it is computed.

    `dtype` is that of activations and products; parameters, norms, head, targets and loss are float32. `remat` is what
    the backward pass computes again. A batch is computed in `microbatches` parts, with the gradient of the whole.
    `attention` is the splash kernel on TPUs where it takes the shapes (`auto`), or nowhere (`reference`).
    `trainable` is everything, `lora` adapters, the `head` alone (on hidden states that are computed once), or the
    `last_k` layers with the final norm; the head is trained with each. A checkpoint is written every
    `checkpoint_every` steps, and after `checkpoint_minutes` without one; kept are the `keep_latest` newest and the
    `keep_best` of the smallest validation loss.
    """

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
    trainable: Literal["full", "lora", "head", "last_k"] = "full"
    lora: Lora = Lora()
    last_k: Count = 2
    epochs: Count = 2
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    learning_rate: Positive = 3e-4
    head_multiplier: Positive = 10.0
    warmup_fraction: Fraction = 0.05
    weight_decay: NotNegative = 0.01
    gradient_clip: Positive = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "minimal", "full"] = "none"
    microbatches: Count = 1
    attention: Literal["auto", "splash", "reference"] = "auto"
    evaluate_every: Count = 50
    checkpoint_every: Count = 100
    checkpoint_minutes: Positive | None = None
    keep_latest: Count = 2
    keep_best: Whole = 0


# Fields of a reward model that change how it is computed or kept and, but for rounding, not what comes out.
_NEUTRAL = ("remat", "microbatches", "attention", "checkpoint_minutes", "keep_latest", "keep_best")
# Fields that are recorded only where they are not at their default, which is how all was computed before they came.
_LATER = ("dtype", "trainable", "lora", "last_k", "optimizer", "schedule")


def recorded(model: RewardModel) -> dict[str, Any]:
    """The fields of a reward model that its training is a function of, to be compared with an earlier run's."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(model)}
    return {
        name: value
        for name, value in msgspec.to_builtins(model, str_keys=True).items()
        if name not in _NEUTRAL and not (name in _LATER and getattr(model, name) == defaults[name])
    }


class Mesh(Section):
    """Devices along each axis; -1 takes what is left, for one of them. dcn_data is the number of slices, -1 all."""

    data: Devices = -1
    fsdp: Devices = 1
    tensor: Devices = 1
    sequence: Devices = 1
    dcn_data: Devices = -1


class Logging(Section):
    """Where a training's metrics go beside its own files.

    `wandb`: to Weights & Biases, `online` with the key in WANDB_API_KEY, or `offline` into files that `wandb sync`
    sends later; `entity` null is the key's own.
    """

    wandb: Literal["off", "online", "offline"] = "off"
    project: Annotated[str, msgspec.Meta(min_length=1)] = "jaxprm"
    entity: str | None = None


class Search(Section):
    """What is searched on the held-out tasks. `tasks` null means all of the split.

    beams, diverse: (paths kept, actions of each); lookahead: (paths, actions, steps ahead); mcts: (simulations before a
    step, actions), with `exploration`; stepwise: actions; aggregations: scores and votes for best-of-N beside the final
    step's. stop_at: a finished path of at least this score ends the search of its task; budget: so does having spent so
    many tokens or FLOPs. docs/search.md says more.
    """

    split: Literal["validation", "test"] = "test"
    tasks: Count | None = None
    temperature: Positive = 0.7
    pool: Count = 32
    best_of_n: Counts = (1, 2, 4, 8, 16, 32)
    prefix_steps: Count = 3
    prefix_best_of_n: Counts = (1, 2, 4, 8, 16)
    beams: tuple[tuple[Count, Count], ...] = ((2, 2), (4, 4))
    stepwise: tuple[Count, ...] = (4,)
    diverse: tuple[tuple[Count, Count], ...] = ()
    lookahead: tuple[tuple[Count, Count, Count], ...] = ()
    mcts: tuple[tuple[Count, Count], ...] = ()
    exploration: NotNegative = 1.0
    aggregations: tuple[Literal["mean", "min", "max", "product", "sum", "vote", "weighted_vote"], ...] = ()
    progress_weight: NotNegative = 0.0
    stop_at: float | None = None
    budget: Positive | None = None
    budget_unit: Literal["tokens", "flops"] = "tokens"
    trees: Whole = 6


class Experiment(Section):
    """A whole run: environment and policy -> trajectories -> shards -> reward models -> search -> report.

    `base_model`, a directory or a name on the hub, is what the reward models start from; null is the policy's own.
    """

    name: str
    seed: Whole = 0
    environment: Environment = Environment()
    policy: Policy = Policy()
    base_model: str | None = None
    collection: Collection = Collection()
    data: Data = Data()
    reward_models: tuple[RewardModel, ...] = (RewardModel(label="agentprm"),)
    reward_seeds: Annotated[tuple[Whole, ...], msgspec.Meta(min_length=1)] = (0,)
    mesh: Mesh = Mesh()
    logging: Logging = Logging()
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
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise UserError(f"config {where}: {type(error).__name__}: {error}") from error
    if not isinstance(found.get(name), Experiment):
        raise UserError(f"config {path}: must define `{name}`, a jaxprm.config.Experiment")
    try:
        plain = to_dict(found[name])
    except TypeError as error:
        raise UserError(f"config {path}: {error}; a config holds numbers, text, lists and dicts alone") from None
    for override in overrides:
        _apply(plain, override)
    return from_dict(plain, where=str(path))


def to_dict(experiment: Experiment) -> dict:
    """Plain JSON types: what comes back from a config.json."""
    return json.loads(json.dumps(msgspec.to_builtins(experiment, str_keys=True)))


def from_dict(plain: dict, *, where: str) -> Experiment:
    """Validates and converts. Raises UserError, naming field, value and bound, but never the value of a secret."""
    if secret := redaction.secret_field(plain):
        raise UserError(
            f"config {where}: {secret} looks like a key or a password, and configs are written to the work directory; "
            "take it out, and name an environment variable in policy.endpoint.api_key_env"
        )
    try:
        experiment = msgspec.convert(plain, Experiment)
    except msgspec.ValidationError as error:
        raise UserError(f"config {where}: {_with_value(plain, str(error))}") from None
    for field, value in _floats(plain, ""):
        if not math.isfinite(value):
            raise UserError(f"config {where}: {field} = {value}: expected a finite number")
    if wrong := endpoint_check.wrong(experiment.policy):
        raise UserError(f"config {where}: {wrong}")
    labels = [model.label for model in experiment.reward_models]
    if len(set(labels)) != len(labels):
        raise UserError(f"config {where}: reward_models: labels must differ, got {labels}")
    if taken := {"random", "policy", "oracle"} & set(labels):
        raise UserError(f"config {where}: reward_models: label {min(taken)!r} is a control's; choose another")
    for index, model in enumerate(experiment.reward_models):
        if len(set(model.lora.targets)) != len(model.lora.targets):
            raise UserError(f"config {where}: reward_models[{index}].lora.targets must differ: {model.lora.targets}")
    if len(set(experiment.reward_seeds)) != len(experiment.reward_seeds):
        raise UserError(f"config {where}: reward_seeds must differ, got {list(experiment.reward_seeds)}")
    for index, model in enumerate(experiment.reward_models):
        if model.objective == "agentprm" and model.beta > 0 and model.discount != 1:
            raise UserError(
                f"config {where}: reward_models[{index}].discount = {model.discount} with beta = {model.beta}: "
                "progress needs discount 1; set that, or beta to 0"
            )
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
        node = _child(node, part)
        if node is None:
            raise UserError(f"override {override!r}: the config has no section {part!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(node, dict):
        node[last] = value
    elif _child(node, last) is not None:
        node[int(last)] = value
    else:
        have = f"items 0 to {len(node) - 1}" if isinstance(node, list) and node else "no fields"
        raise UserError(f"override {override!r}: {'.'.join(path)} has {have}, not {last!r}")


def _child(node: Any, name: str) -> Any:
    """A dict's field or a list's item; None where there is none."""
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and int(name) < len(node) else None
    return node.get(name) if isinstance(node, dict) else None


def _floats(node: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, float):
        yield where, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _floats(value, f"{where}.{name}" if where else name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _floats(value, f"{where}[{index}]")


def _with_value(plain: dict, message: str) -> str:
    """msgspec says what and where; a reader also wants the value and what would do."""
    what, _, where = message.partition(" - at `$.")
    where = where.rstrip("`")
    parts = where.replace("[", ".").replace("]", "").split(".") if where else []
    node, kind = plain, Experiment
    for part in parts:
        node, kind = _child(node, part), _kind_of(kind, part)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        fields = ", ".join(field.name for field in msgspec.structs.fields(kind))
        return f"{where}{where and '.'}{unknown[1]}: no such field; {where or 'an experiment'} has {fields}"
    if what.startswith("Invalid enum value"):
        what = f"must be one of {', '.join(map(str, get_args(kind)))}"
    value = f"{where} = {json.dumps(node)}: " if where else ""
    return f"{value}{what[0].lower()}{what[1:]}"


def _kind_of(kind: Any, part: str) -> Any:
    """The type of a struct's field, or of a tuple's items."""
    found = get_args(kind)[0] if part.isdecimal() else next(
        field.type for field in msgspec.structs.fields(kind) if field.name == part
    )
    if get_origin(found) is Annotated:
        return get_args(found)[0]
    sections = [one for one in get_args(found) if isinstance(one, type) and issubclass(one, Section)]
    return sections[0] if sections and get_origin(found) is types.UnionType else found
