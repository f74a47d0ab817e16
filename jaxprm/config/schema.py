"""The fields of an experiment: one frozen, typed section for each part of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
AxisSize = Annotated[int, msgspec.Meta(ge=-1)]
PositiveInts = Annotated[tuple[PositiveInt, ...], msgspec.Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every config section: immutable, keyword-only, without unknown fields."""


class EnvironmentConfig(Section, frozen=True):
    """The environment: a registered name or a user's `module:attribute`; `arguments` go to its constructor.

    workers: 0 runs environments in this process, one call at a time; N runs each environment in its own process, N of
    them at a time. `timeout` bounds one call, in seconds; `memory_mb` bounds a worker process between episodes.
    """

    name: str = "textcraft"
    # msgspec gives every instance its own copy of an empty default.
    arguments: dict[str, Any] = {}
    workers: NonNegativeInt = 0
    timeout: PositiveFloat = 120.0
    memory_mb: PositiveInt | None = None


class DecoderConfig(Section, frozen=True):
    """Sizes of a decoder trained from scratch by imitation. A reward model has the sizes of its base model instead."""

    vocab_size: PositiveInt = 1024
    hidden_size: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    intermediate_size: PositiveInt = 256
    rope_theta: PositiveFloat = 10_000.0


class ImitationConfig(Section, frozen=True):
    """Behaviour cloning of an environment's expert. Every episode is generated when it is needed, so none repeats."""

    steps: PositiveInt = 10_000
    rows: PositiveInt = 16
    length: PositiveInt = 512
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: NonNegativeInt = 200
    weight_decay: NonNegativeFloat = 0.01
    tokenizer_episodes: PositiveInt = 2_000
    checkpoint_every: PositiveInt = 500
    demonstrations: dict[str, Any] = {}


class EndpointConfig(Section, frozen=True):
    """An OpenAI-compatible server of chat completions. `base_url` ends before `/chat/completions`.

    The key stays in the environment: `api_key_env` names its variable; null sends no key. `served_as` is the model name
    in the server's answers, if it is neither `model` nor a version of it. `timeout_seconds` bounds one attempt,
    `retries` counts further attempts. After `give_up_after` failed requests in a row the run stops. `send_reasoning`
    sends back what the model thought in earlier turns. `extra_body` is added to every request; `"seed": null` in it
    sends no seed.
    """

    model: Annotated[str, msgspec.Meta(min_length=1)]
    base_url: str = "http://127.0.0.1:8000/v1"
    api_key_env: str | None = None
    served_as: str | None = None
    requests_in_flight: PositiveInt = 32
    timeout_seconds: PositiveFloat = 120.0
    retries: NonNegativeInt = 5
    give_up_after: PositiveInt = 64
    log_probabilities: bool = False
    send_reasoning: bool = False
    extra_body: dict[str, Any] = {}


class PolicyConfig(Section, frozen=True):
    """The policy. `path` is a model directory, a Hub id (org/name or org/name@revision), `default` for the one that
    ships, or a user's `module:attribute`, called with `arguments` and the seed. An `endpoint` replaces all of these.

    `chat_template` is used by the policy and by the reward models trained on its trajectories: `own` (the
    tokenizer's), `chatml` or `llama3` (shipped), or a file. `reasoning` keeps or drops what the agent thought, and
    `special_tokens` refuses or breaks special tokens in the text of messages; both are recorded in reward models.
    """

    path: str = "default"
    chat_template: str = "own"
    reasoning: Literal["keep", "drop"] = "keep"
    special_tokens: Literal["error", "break"] = "error"
    endpoint: EndpointConfig | None = None
    arguments: dict[str, Any] = {}
    max_action_tokens: PositiveInt = 96
    max_tokens: PositiveInt = 1024
    in_flight: PositiveInt = 128

    @property
    def encoding(self) -> dict[str, Any]:
        """The arguments of Encoder.load beside the directory."""
        return {"template": self.chat_template, "reasoning": self.reasoning, "special_tokens": self.special_tokens}


class CollectionConfig(Section, frozen=True):
    """Trajectories for training and validation. `tasks` null means all tasks of a split.

    `files`, each FILE or SPLIT=FILE, replace sampling. A row goes to the split given for its file, else to the split it
    names, else by a hash of its task: `validation_share` of the tasks to validation. `skip_bad` leaves out bad rows.

    A run stops before training if all training trajectories have the same outcome, or if the share of those with an
    outcome above 0 is below `min_success`; 0 trains in any case.
    """

    train_tasks: PositiveInt | None = None
    validation_tasks: PositiveInt | None = None
    # The paper samples 16 trajectories per task at temperature 1.
    trajectories_per_task: PositiveInt = 16
    temperature: NonNegativeFloat = 1.0
    files: tuple[str, ...] = ()
    validation_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    skip_bad: bool = False
    min_success: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01


class DataConfig(Section, frozen=True):
    """Shards and packed batches; lengths in tokens. `skip_bad` trains without truncated and corrupt shards."""

    shards: PositiveInt = 4
    rows: PositiveInt = 8
    length: PositiveInt = 1024
    steps_per_row: PositiveInt = 64
    too_long: Literal["error", "drop", "window"] = "window"
    skip_bad: bool = False


class LoraConfig(Section, frozen=True):
    """LoRA adapters: W + alpha / rank * A B for every matrix in `targets`, with A [inputs, rank], B [rank, outputs]."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: Annotated[
        tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...], msgspec.Meta(min_length=1)
    ] = ("query", "key", "value", "output", "gate", "up", "down")


class LabelsConfig(Section, frozen=True):
    """Step labels as targets (docs/train-on-labels.md).

    loss: `bce` is the cross-entropy of a head of two labels, `mse` half the squared error of the promise. `weight` is
    the share of the label in the loss of a step that has a label and an outcome; 0 leaves labels out, except in the
    objective step_labels, which trains on nothing else. `range` maps (lowest, highest) label to targets 0 and 1; null
    is (0, 1), or (-1, 1) if there are negative labels.
    """

    loss: Literal["bce", "mse"] = "bce"
    weight: Fraction = 0.0
    range: tuple[float, float] | None = None


class RewardModelConfig(Section, frozen=True):
    """One reward model: its objective (docs/method.md, sections 3, 5 and 6), its optimizer, and how it is computed.

    `objective` is a registered name or a user's `module:attribute` of a jaxprm.objectives.Objective.
    `dtype` is that of activations and products; parameters, norms, head, targets and loss are float32. `remat` is what
    the backward pass computes again. A batch is computed in `microbatches` parts; its gradient stays the same.
    `attention`: `auto` uses the splash kernel on TPUs for shapes that it supports, `reference` never uses it.
    `trainable` is everything, `lora` adapters, the `head` alone (on hidden states that are computed once), or the
    `last_k` layers with the final norm; the head is trained with each. It starts at random; `centred` then moves it so
    that the values of the first batch begin at the mean of its targets. A checkpoint is written every
    `checkpoint_every` steps, and after `checkpoint_minutes` without one. The `keep_latest` newest and the `keep_best`
    with the smallest validation loss are kept. `head`: a base that is a reward model already keeps its head, unless
    this is `new`.
    """

    label: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]
    objective: str = "agentprm"
    # beta and lambda as in the paper.
    beta: NonNegativeFloat = 1.0
    gae_lambda: Fraction = 0.95
    discount: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    bootstrap: Literal["action", "next", "state"] = "action"
    progress_gradient: Literal["both", "previous"] = "both"
    target_update: Literal["online", "ema", "copy"] = "online"
    target_decay: Fraction = 0.99
    target_every: PositiveInt = 50
    labels: LabelsConfig = LabelsConfig()
    head: Literal["keep", "new"] = "keep"
    trainable: Literal["full", "lora", "head", "last_k"] = "full"
    lora: LoraConfig = LoraConfig()
    last_k: PositiveInt = 2
    head_start: Literal["centred", "random"] = "centred"
    epochs: PositiveInt = 2
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # For small models; the paper trains larger ones with 1e-6.
    learning_rate: PositiveFloat = 3e-4
    head_multiplier: PositiveFloat = 10.0
    warmup_fraction: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.01
    gradient_clip: PositiveFloat = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "minimal", "full"] = "none"
    microbatches: PositiveInt = 1
    attention: Literal["auto", "splash", "reference"] = "auto"
    evaluate_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 100
    checkpoint_minutes: PositiveFloat | None = None
    keep_latest: PositiveInt = 2
    keep_best: NonNegativeInt = 0


# These fields change how a reward model is computed or saved but, up to rounding, not its parameters.
_NON_SEMANTIC = ("remat", "microbatches", "attention", "checkpoint_minutes", "keep_latest", "keep_best")
# Runs made before these fields existed used their defaults. Leaving defaults out keeps the fingerprints of those runs.
# Of `head_start` only "random" is recorded: models from before the field, whose heads started so, stay usable.
_OMIT_IF_DEFAULT = ("dtype", "trainable", "lora", "last_k", "head_start", "optimizer", "schedule", "labels", "head")


def fingerprint_fields(model: RewardModelConfig, *, base_has_head: bool = False) -> dict[str, Any]:
    """The fields that determine a trained reward model, as recorded by a run and compared when it resumes.

    base_has_head: whether the base is a reward model. Runs from before `head` made a new one from such a base too, so
    there `keep` is recorded and `new` is not.
    """
    defaults = {field.name: field.default for field in msgspec.structs.fields(model)}
    if base_has_head:
        defaults["head"] = "new"
    return {
        name: value
        for name, value in msgspec.to_builtins(model, str_keys=True).items()
        if name not in _NON_SEMANTIC and not (name in _OMIT_IF_DEFAULT and getattr(model, name) == defaults[name])
    }


class MeshConfig(Section, frozen=True):
    """Devices along each mesh axis; one axis may be -1: all remaining devices. dcn_data: slices, -1 for all."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1
    sequence: AxisSize = 1
    dcn_data: AxisSize = -1


class LoggingConfig(Section, frozen=True):
    """Where training metrics go, in addition to the run's own files.

    `wandb`: `online` sends them to Weights & Biases with the key in WANDB_API_KEY; `offline` writes files for a later
    `wandb sync`. `entity` null is the default entity of the key.
    """

    wandb: Literal["off", "online", "offline"] = "off"
    project: Annotated[str, msgspec.Meta(min_length=1)] = "jaxprm"
    entity: str | None = None


class ProgressAdvantageConfig(Section, frozen=True):
    """A baseline without a reward model: actions ranked by the log-ratio of two language models (docs/method.md).

    reference: the model that the policy's training started from, a directory or a Hub id. policy: null means the run's.
    """

    reference: Annotated[str, msgspec.Meta(min_length=1)]
    policy: str | None = None


class SearchConfig(Section, frozen=True):
    """What is searched on the held-out tasks. `tasks` null means all of the split.

    beams, diverse: (paths kept, actions of each); lookahead: (paths, actions, steps ahead); mcts: (simulations before a
    step, actions), with `exploration`; stepwise: actions; custom: sizes of other searches, by their registered kind or
    as "module:attribute" of a jaxprm.search.methods.SearchMethod; aggregations: scores and votes for best-of-N beside
    the final step's. stop_at: a finished path of at least this score ends the search of its task; budget: the search of
    a task also ends after so many tokens or FLOPs. progress_advantage: also search and choose with this baseline.
    docs/search.md says more.
    """

    split: Literal["validation", "test"] = "test"
    tasks: PositiveInt | None = None
    # The paper's temperature of searches.
    temperature: PositiveFloat = 0.7
    pool: PositiveInt = 32
    best_of_n: PositiveInts = (1, 2, 4, 8, 16, 32)
    prefix_steps: PositiveInt = 3
    prefix_best_of_n: PositiveInts = (1, 2, 4, 8, 16)
    beams: tuple[tuple[PositiveInt, PositiveInt], ...] = ((2, 2), (4, 4))
    stepwise: tuple[PositiveInt, ...] = (4,)
    diverse: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    lookahead: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...] = ()
    mcts: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    custom: dict[str, tuple[tuple[PositiveInt, ...], ...]] = {}
    exploration: NonNegativeFloat = 1.0
    aggregations: tuple[Literal["mean", "min", "max", "product", "sum", "vote", "weighted_vote"], ...] = ()
    progress_weight: NonNegativeFloat = 0.0
    stop_at: float | None = None
    budget: PositiveFloat | None = None
    budget_unit: Literal["tokens", "flops"] = "tokens"
    progress_advantage: ProgressAdvantageConfig | None = None
    trees: NonNegativeInt = 6


class Experiment(Section, frozen=True):
    """A whole run: environment and policy -> trajectories -> shards -> reward models -> search -> report.

    `base_model`, a directory or a Hub id, is the model that reward models start from; null means the policy's.
    """

    name: str
    seed: NonNegativeInt = 0
    environment: EnvironmentConfig = EnvironmentConfig()
    policy: PolicyConfig = PolicyConfig()
    base_model: str | None = None
    collection: CollectionConfig = CollectionConfig()
    data: DataConfig = DataConfig()
    reward_models: tuple[RewardModelConfig, ...] = (RewardModelConfig(label="agentprm"),)
    reward_seeds: Annotated[tuple[NonNegativeInt, ...], msgspec.Meta(min_length=1)] = (0,)
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    search: SearchConfig = SearchConfig()
    bootstrap_samples: PositiveInt = 2_000
    model: DecoderConfig = DecoderConfig()
    imitation: ImitationConfig = ImitationConfig()
