"""A reward model before and after training: initialized from a policy, and written with its tokenizer and recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from data_pipeline.batches import TrainingBatches
from data_pipeline.encode import Encoder
from data_pipeline.metadata import length_histogram, length_range
from data_pipeline.output import staged_directory
from data_pipeline.shards import Dataset, ShardSplit
from data_pipeline.supervision import of_pairs
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.artifacts import recipe as recipe_file
from jaxprm.artifacts.directory import RECIPE
from jaxprm.errors import UserError
from jaxprm.hf import hub, reader, writer
from jaxprm.hf.config import hf_config, is_reward_model
from jaxprm.hf.safetensors import weight_files
from jaxprm.model import sharding
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.transformer import RewardModel
from jaxprm.objectives import (
    find_objective,
    is_built_in,
    progress_beta,
    reads_states,
    trains_on_labels,
)
from jaxprm.training.supervision import supervision_of

READ_POSITION = "last token of the chat rendering that ends with the assistant message"

# Fields that are no part of the identity: evaluating and saving changes nothing in the parameters.
_CADENCE = ("evaluate_every", "checkpoint_every")


def from_policy_config(
    policy: TransformerConfig, settings: config_lib.RewardModelConfig | None = None
) -> TransformerConfig:
    """The config of the reward model that starts from a policy with this config, and gets a new head.

    The head has one linear output; for the cross-entropy of step labels it has two labels and a bias, as in TRL.
    """
    two = settings is not None and trains_on_labels(settings) and settings.labels.loss == "bce"
    # No token is predicted: an unembedding would only take memory, three times its size with the optimizer's moments.
    return dataclasses.replace(policy, head=Head(2, bias=True) if two else Head(), tie_embeddings=True)


def from_base_config(base: Path, settings: config_lib.RewardModelConfig | None) -> tuple[TransformerConfig, bool]:
    """(config of the reward model that starts from the model in `base`, whether it keeps that model's head).

    Raises UserError for a head that the loss of step labels cannot train.
    """
    policy, source = reader.read_config(base)
    config = from_policy_config(policy, settings)
    if settings is None or settings.head == "new" or not is_reward_model(source):
        return config, False
    if config.head.labels > policy.head.labels:
        raise UserError(
            f'reward model {settings.label}: labels.loss = "bce" trains a head of two labels, that of {base} has one; '
            'set labels.loss to "mse", or head to "new"'
        )
    return dataclasses.replace(policy, tie_embeddings=True), True


def is_centred(base: Path, settings: config_lib.RewardModelConfig) -> bool:
    """Whether the head is centred on the targets of the first batch: if it is new, and trained on outcomes alone.

    Losses of step labels and pairs have no such targets: a head of two labels has a bias for its mean, and pairs decide
    differences only.
    """
    return (
        settings.head_start == "centred"
        and supervision_of(settings) == "outcomes"
        and not from_base_config(base, settings)[1]
    )


def abstract(config: TransformerConfig) -> nnx.State:
    """Shapes of the parameters, in the tree of `from_policy`."""
    head = {name: part for name, part in reader.abstract(config, reward=True).items() if name != "transformer"}
    return nnx.State({"transformer": reader.abstract(config, reward=False), **head})


def from_policy(
    base: Path, seed: int, mesh: Mesh | None = None, settings: config_lib.RewardModelConfig | None = None
) -> tuple[TransformerConfig, nnx.State]:
    """(config, parameters): the transformer of a policy or a reward model, with the latter's head or a new one.

    With a mesh every array is created with its sharding: no host and no device holds the whole model.

    Args:
        seed: initializes a new head.
        settings: decide which head; None is a new one of one label.
    """
    config, keeps_head = from_base_config(base, settings)
    names = ("transformer", "head", "head_bias") if config.head.bias else ("transformer", "head")
    shardings: dict[str, Any] = dict.fromkeys(names)
    if mesh is not None:
        sharding.check_model(mesh, config)
        shardings = sharding.shardings(sharding.with_shardings(mesh, abstract(config)))
    if keeps_head:
        return reader.load_reward_model(base, shardings=None if mesh is None else shardings)
    _, transformer = reader.load_transformer(base, unembedding=False, shardings=shardings["transformer"])

    def initialize_head() -> Any:
        state = nnx.state(RewardModel(config, rngs=nnx.Rngs(seed)))
        return {name: state[name] for name in names[1:]}

    # Under jit the rest of the initialized model is dead code: only the head is computed.
    head = jax.jit(initialize_head, out_shardings={name: shardings[name] for name in names[1:]})()
    return config, nnx.State({"transformer": transformer, **head})


def identity(
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    seed: int,
    *,
    base: Path,
    dataset: str,
    tokenizer: str,
) -> dict[str, Any]:
    """Everything that the result of a training run depends on, given the code; the mesh changes it by rounding only."""
    fields = config_lib.fingerprint_fields(settings, base_has_head=is_reward_model(reader.read_config(base)[1]))
    section = {name: value for name, value in fields.items() if name not in _CADENCE}
    batch = {"rows": data.rows, "length": data.length, "steps_per_row": data.steps_per_row}
    return {
        "config": config_lib.fingerprint({"reward_model": section, "batch": batch}),
        "base model": config_lib.fingerprint(
            [files.sha256(base / name) for name in ("config.json", *weight_files(base))]
        ),
        "dataset": dataset,
        "tokenizer": tokenizer,
        "seed": seed,
    }


def features_identity(settings: config_lib.RewardModelConfig, identity: dict[str, Any]) -> str:
    """A short name for everything that a frozen transformer's features depend on."""
    inputs = {name: identity[name] for name in ("base model", "dataset", "tokenizer")}
    # Which trajectories of the dataset are used. Features of those with outcomes were cached before there were others.
    if (supervision := supervision_of(settings)) != "outcomes":
        inputs["supervision"] = supervision
    return config_lib.fingerprint(inputs | {"dtype": settings.dtype, "states": reads_states(settings)})[:16]


def training_facts(dataset: Dataset, batches: TrainingBatches) -> dict[str, Any]:
    """What a reward model is trained on: {"trained_on", "lengths", "turn_tokens", "fill", "skipped"}.

    - trained_on: number of trajectories, and of tokens over all epochs.
    - lengths: histogram of trajectory lengths, in tokens.
    - turn_tokens: tokens of an action, and of the observation up to the next action: the `median`, and the `most`,
      which 99 % do not exceed.
    - fill: share of the token slots of all batches that hold a token.
    - skipped: broken shards that were left out, by split.
    """
    epochs, lengths = len(batches.epoch_ends), batches.split.lengths
    return {
        "trained_on": {"trajectories": len(lengths), "tokens": int(lengths.sum()) * epochs},
        "lengths": length_histogram(lengths),
        "turn_tokens": _turn_tokens(batches.split),
        "fill": round(batches.fill, 4),
        "skipped": {split: dataset.skipped(split)._asdict() for split in ("train", "validation")},
    }


def _turn_tokens(split: ShardSplit) -> dict[str, dict[str, int]]:
    # From a step of a trajectory to the next one. The actions of a pair follow each other without an observation.
    pairs = np.repeat(of_pairs(split), split.step_counts)
    same = np.ones(max(0, len(split.read_positions) - 1), bool)
    same[split.step_starts[1:-1] - 1] = False
    between = split.read_positions[1:] - split.read_positions[:-1]
    actions = split.read_positions - split.state_positions
    actions[1:] = np.where(same & pairs[1:], between, actions[1:])
    turns = {
        "action": actions,
        "observation": (split.state_positions[1:] - split.read_positions[:-1])[same & ~pairs[1:]],
    }
    return {name: _spread(tokens) for name, tokens in turns.items()}


def _spread(tokens: np.ndarray) -> dict[str, int]:
    median, high = np.percentile(tokens, (50, 99), method="higher") if len(tokens) else (0, 0)
    return {"median": int(median), "most": int(high)}


def summary_lines(name: str, facts: dict[str, Any], data: config_lib.DataConfig, steps: int) -> Iterator[str]:
    """`training_facts` as lines for the terminal."""
    trajectories, fill = facts["trained_on"]["trajectories"], facts["fill"]
    yield (
        f"train {name}: {trajectories} trajectories, {steps} batches of {data.rows} x {data.length} tokens, "
        f"{fill:.1%} full"
    )
    yield "  tokens: " + ", ".join(f"{length_range(low)} in {count}" for low, count in facts["lengths"].items())
    for split, skipped in facts["skipped"].items():
        if skipped["shards"]:
            count = skipped["trajectories"]
            yield f"  left out of {split}: {skipped['shards']} broken shards with {count} trajectories"


def recipe(
    settings: config_lib.RewardModelConfig,
    seed: int,
    *,
    base: Path,
    max_tokens: int,
    value_range: tuple[float, float] | None,
    **facts: Any,
) -> dict[str, Any]:
    """reward_model.json: how the model was trained and how to read it. `facts` are added as they are."""
    targets = ("gae_lambda", "discount", "bootstrap", "progress_gradient", "target_update")
    contents: dict[str, Any] = {
        "format": "jaxprm-reward-model",
        "version": 1,
        "label": settings.label,
        "objective": settings.objective,
        "read_position": READ_POSITION,
        "value_range": None if value_range is None else list(value_range),
        "max_tokens": max_tokens,
        "targets": {"beta": progress_beta(settings)} | {name: getattr(settings, name) for name in targets},
        "config": msgspec.to_builtins(settings),
        "base": hub.name_of(base),
        "seed": seed,
        **facts,
    }
    if trains_on_labels(settings):
        contents["targets"]["labels"] = msgspec.to_builtins(settings.labels)
    if not is_built_in(settings.objective):
        # A later process may not have the user's module; the model card needs the text all the same.
        contents["objective_text"] = find_objective(settings.objective).card_text
    return contents


def is_written(directory: Path, expected: dict[str, Any]) -> bool:
    """Whether the directory holds the complete model of that identity.

    Raises UserError if it holds a model of another identity, or something else.
    """
    if not directory.exists():
        return False
    path = directory / RECIPE
    if not path.is_file():
        raise UserError(f"{directory}: exists and is no trained reward model ({RECIPE} is missing); move it away")
    fingerprints = recipe_file.read(path).get("fingerprints", {})
    for name, value in expected.items():
        if fingerprints.get(name) != value:
            raise UserError(
                f"{directory}: trained with another {name} ({_short(fingerprints.get(name))}, now {_short(value)}); "
                "use another work directory or --redo"
            )
    return True


def write(
    directory: Path, config: TransformerConfig, parameters: Any, *, base: Path, encoder: Encoder, recipe: dict
) -> None:
    """Writes the model in Hugging Face format with the policy's tokenizer, `encoder`'s template and the recipe."""
    with staged_directory(directory, staging=_staging(directory)) as staging:
        writer.write_model(staging, config, parameters, **_hf_options(base, encoder, recipe))
        _write_companions(staging, base, encoder, recipe)


def describe(directory: Path, config: TransformerConfig, *, base: Path, encoder: Encoder, recipe: dict) -> None:
    """Writes all files of the model but its weights, so that checkpoints can be scored and exported during training.

    Raises OSError for a full disk.
    """
    # A run that was killed and resumed has described itself before.
    with staged_directory(directory, overwrite=True, staging=_staging(directory)) as staging:
        described = hf_config(config, reward=True, **_hf_options(base, encoder, recipe))
        files.write_json(staging / "config.json", described)
        _write_companions(staging, base, encoder, recipe)


def _staging(directory: Path) -> Path:
    # Redoing a stage removes this name together with the directory.
    return directory.with_name(directory.name + ".partial")


def _hf_options(base: Path, encoder: Encoder, recipe: dict) -> dict[str, Any]:
    _, source = reader.read_config(base)
    length = int(source.get("max_position_embeddings") or recipe["max_tokens"])
    return {"pad_id": encoder.pad_id, "end_id": encoder.end_id, "max_length": length, "source": source}


def _write_companions(directory: Path, base: Path, encoder: Encoder, recipe: dict) -> None:
    encoder.write_tokenizer(base, directory)
    files.write_json(directory / RECIPE, recipe)


def _short(value: Any) -> str:
    return str(value)[:12]
