"""The experiment as one frozen, typed value; a config file is Python that names it `config`.

Every field has a type and, where it matters, a bound: a wrong name, type or value is one line that says which.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

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
    """One reward model: its objective (METHOD.md, sections 3 and 4), its optimizer, and how it is computed.

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
