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
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.artifacts import recipe as recipe_file
from jaxprm.artifacts.directory import RECIPE
from jaxprm.errors import UserError
from jaxprm.hf import hub, reader, writer
from jaxprm.hf.config import hf_config
from jaxprm.hf.safetensors import weight_files
from jaxprm.model import sharding
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.transformer import RewardModel
from jaxprm.objectives import find_objective, is_built_in, progress_beta, reads_states

READ_POSITION = "last token of the chat rendering that ends with the assistant message"

# Fields that are no part of the identity: evaluating and saving changes nothing in the parameters.
_CADENCE = ("evaluate_every", "checkpoint_every")


def from_policy_config(policy: TransformerConfig) -> TransformerConfig:
    """The config of the reward model that starts from a policy with this config."""
    # No token is predicted: an unembedding would only take memory, three times its size with the optimizer's moments.
    return dataclasses.replace(policy, head=Head(), tie_embeddings=True)


def abstract(config: TransformerConfig) -> nnx.State:
    """Shapes of the parameters, in the tree of `from_policy`."""
    head = {name: part for name, part in reader.abstract(config, reward=True).items() if name != "transformer"}
    return nnx.State({"transformer": reader.abstract(config, reward=False), **head})


def from_policy(base: Path, seed: int, mesh: Mesh | None = None) -> tuple[TransformerConfig, nnx.State]:
    """(config, parameters): the policy's transformer, and a head initialized from the seed.

    With a mesh every array is created with its sharding: no host and no device holds the whole model.
    """
    config = from_policy_config(reader.read_config(base)[0])
    shardings: dict[str, Any] = {"transformer": None, "head": None}
    if mesh is not None:
        sharding.check_model(mesh, config)
        shardings = sharding.shardings(sharding.with_shardings(mesh, abstract(config)))
    config, transformer = reader.load_transformer(base, unembedding=False, shardings=shardings["transformer"])

    def initialize_head() -> Any:
        return nnx.state(RewardModel(config, rngs=nnx.Rngs(seed)))["head"]

    # Under jit the rest of the initialized model is dead code: only the head is computed.
    head = jax.jit(initialize_head, out_shardings=shardings["head"])()
    return config, nnx.State({"transformer": transformer, "head": head})


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
    section = {name: value for name, value in config_lib.fingerprint_fields(settings).items() if name not in _CADENCE}
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
    within = np.ones(max(0, len(split.read_positions) - 1), bool)
    within[split.step_starts[1:-1] - 1] = False  # from the last step of a trajectory to the first of the next one
    turns = {
        "action": split.read_positions - split.state_positions,
        "observation": (split.state_positions[1:] - split.read_positions[:-1])[within],
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
    value_range: tuple[float, float],
    **facts: Any,
) -> dict[str, Any]:
    """reward_model.json: how the model was trained and how to read it. `facts` are added as they are."""
    targets = ("gae_lambda", "discount", "bootstrap", "progress_gradient", "target_update")
    contents = {
        "format": "jaxprm-reward-model",
        "version": 1,
        "label": settings.label,
        "objective": settings.objective,
        "read_position": READ_POSITION,
        "value_range": list(value_range),
        "max_tokens": max_tokens,
        "targets": {"beta": progress_beta(settings)} | {name: getattr(settings, name) for name in targets},
        "config": msgspec.to_builtins(settings),
        "base": hub.name_of(base),
        "seed": seed,
        **facts,
    }
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
