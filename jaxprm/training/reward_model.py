"""A reward model before and after training: made from a policy, described, and written with its recipe."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from data_pipeline.shards import Dataset, ShardSplit
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.artifacts.directory import RECIPE
from jaxprm.errors import UserError
from jaxprm.hf import hub, reader, writer
from jaxprm.hf.config import hf_config
from jaxprm.hf.safetensors import weight_files
from jaxprm.model import sharding
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.transformer import RewardModel
from jaxprm.training.step import progress_beta, reads_states


def training_facts(dataset: Dataset, batches: TrainingBatches) -> dict[str, Any]:
    """trained_on: trajectories, and tokens of all epochs; lengths: their histogram; turn_tokens; fill; skipped.

    `turn_tokens` has the `median` and the `most`, of 99 in 100, tokens of an action and of what follows it up to the
    next one. `fill` is the share of the token slots of all batches that hold one; `skipped` is by split.
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
    within[split.step_starts[1:-1] - 1] = False  # from one trajectory's last step to the first of the next
    turns = {
        "action": split.read_positions - split.state_positions,
        "observation": (split.state_positions[1:] - split.read_positions[:-1])[within],
    }
    return {name: _spread(tokens) for name, tokens in turns.items()}


def _spread(tokens: np.ndarray) -> dict[str, int]:
    median, most = np.percentile(tokens, (50, 99), method="higher") if len(tokens) else (0, 0)
    return {"median": int(median), "most": int(most)}


def to_lines(name: str, facts: dict[str, Any], data: config_lib.DataConfig, steps: int) -> Iterator[str]:
    """The facts for a terminal."""
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


READ_POSITION = "last token of the chat rendering that ends with the assistant message"

# How often a run is looked at or saved changes nothing in what it computes.
_CADENCE = ("evaluate_every", "checkpoint_every")


def from_policy_config(policy: TransformerConfig) -> TransformerConfig:
    """The config of the reward model that is made from a policy with this one."""
    # No token is predicted: an unembedding would be memory, and three times that with the optimizer's moments.
    return dataclasses.replace(policy, head=Head(), tie_embeddings=True)


def abstract(config: TransformerConfig) -> nnx.State:
    """Shapes of the parameters, in the tree of `from_policy`."""
    head = {name: part for name, part in reader.abstract(config, reward=True).items() if name != "transformer"}
    return nnx.State({"transformer": reader.abstract(config, reward=False), **head})


def from_policy(base: Path, seed: int, mesh: Mesh | None = None) -> tuple[TransformerConfig, nnx.State]:
    """(config, parameters): the policy's transformer and a head drawn from the seed.

    With a mesh everything is made where it will lie: no host, and no device, ever has the whole model.
    """
    config = from_policy_config(reader.read_config(base)[0])
    places = None
    if mesh is not None:
        sharding.check_model(mesh, config)
        places = sharding.shardings(sharding.with_shardings(mesh, abstract(config)))
    backbone_places, head_place = (None, None) if places is None else (places["transformer"], places["head"])
    config, backbone = reader.load_transformer(base, unembedding=False, shardings=backbone_places)
    make_head = jax.jit(lambda: nnx.state(RewardModel(config, rngs=nnx.Rngs(seed)))["head"], out_shardings=head_place)
    return config, nnx.State({"transformer": backbone, "head": make_head()})


def identity(
    settings: config_lib.RewardModelConfig,
    data: config_lib.DataConfig,
    seed: int,
    *,
    base: Path,
    dataset: str,
    tokenizer: str,
) -> dict[str, Any]:
    """What a training run's result is a function of, given the code; the mesh changes it by rounding only."""
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


def is_written(directory: Path, expected: dict[str, Any]) -> bool:
    """Whether the model is there, complete.

    Raises UserError when it is there but of another identity, or when the directory is something else.
    """
    if not directory.exists():
        return False
    recipe = directory / RECIPE
    if not recipe.is_file():
        raise UserError(f"{directory}: exists and is no trained reward model ({RECIPE} is missing); move it away")
    found = files.read_json(recipe)["fingerprints"]
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(
                f"{directory}: trained with another {name} ({_short(found.get(name))}, now {_short(value)}); "
                "use another work directory or --redo"
            )
    return True


def write(
    directory: Path, config: TransformerConfig, parameters: Any, *, base: Path, encoder: Encoder, recipe: dict
) -> None:
    """The model in Hugging Face format, the policy's tokenizer with `encoder`'s template, the recipe; or nothing."""
    with _whole(directory) as beside:
        writer.write_model(beside, config, parameters, **_described(base, encoder, recipe))
        _write_companions(beside, base, encoder, recipe)


def describe(directory: Path, config: TransformerConfig, *, base: Path, encoder: Encoder, recipe: dict) -> None:
    """All files of the model but its weights: with them a checkpoint can be scored and exported while it is trained.

    Raises OSError for a full disk.
    """
    shutil.rmtree(directory, ignore_errors=True)  # of the same run, before it was killed
    with _whole(directory) as beside:
        described = hf_config(config, reward=True, **_described(base, encoder, recipe))
        files.write_json(beside / "config.json", described)
        _write_companions(beside, base, encoder, recipe)


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A new directory beside it, in its place once it is filled."""
    beside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    beside.mkdir(parents=True)
    yield beside
    beside.rename(directory)


def _described(base: Path, encoder: Encoder, recipe: dict) -> dict[str, Any]:
    _, source = reader.read_config(base)
    length = int(source.get("max_position_embeddings") or recipe["max_tokens"])
    return {"pad_id": encoder.pad_id, "end_id": encoder.end_id, "max_length": length, "source": source}


def _write_companions(directory: Path, base: Path, encoder: Encoder, recipe: dict) -> None:
    encoder.write_tokenizer(base, directory)
    files.write_json(directory / RECIPE, recipe)


def recipe(
    settings: config_lib.RewardModelConfig,
    seed: int,
    *,
    base: Path,
    max_tokens: int,
    value_range: tuple[float, float],
    **found: Any,
) -> dict[str, Any]:
    """reward_model.json: how the model was trained and how to read it; `found` is what came out."""
    targets = ("gae_lambda", "discount", "bootstrap", "progress_gradient", "target_update")
    return {
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
        **found,
    }


def _short(value: Any) -> str:
    return str(value)[:12]
