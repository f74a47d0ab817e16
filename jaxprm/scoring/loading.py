"""From a directory or a checkpoint to a reward model ready to score, and from promises to the steps a user reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from data_pipeline.encode import Encoder
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.model import hub, huggingface, weights
from jaxprm.model.layout import ONE_DEVICE, Layout
from jaxprm.model.orbax_reader import DESCRIPTION, is_checkpoint, newest_checkpoint, read_parameters
from jaxprm.model.prefix_bank import Shapes, TurnTokens
from jaxprm.model.tensor_files import WEIGHTS, has_weights, model_files, open_tensors
from jaxprm.model.transformer import TransformerConfig
from jaxprm.model.weights_writer import DTYPES
from jaxprm.scoring.scorer import Scorer

RECIPE = "reward_model.json"
# What stands for a checkpoint's arrays: written once, with the names of the files that hold them.
_CHECKPOINT_FILES = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt")
_Count = Annotated[int, msgspec.Meta(ge=0)]
_BELOW = ("model", "seed-*/model", "*/seed-*/model", "reward_models/*/seed-*/model")
_CHECKPOINTS_BELOW = tuple(pattern.removesuffix("model") + "checkpoints" for pattern in _BELOW)


def find_model(path: str | Path) -> Path:
    """The model's own directory: `path`, the model of a training output, or the only reward model of a run.

    A path that is no directory may be a name on the hub, "org/name" or "org/name@revision".

    Where a training has not finished, its newest checkpoint; a checkpoint of any training when it is named itself.

    Raises UserError where there is none, or where there are several to choose from.
    """
    path = hub.resolve(path)
    if has_weights(path):
        return path
    if is_checkpoint(path):
        return _described(path)
    found = {one for pattern in _BELOW for one in path.glob(pattern) if has_weights(one)}
    finished = {one.parent for one in found}
    for folder in {path, *(one for pattern in _CHECKPOINTS_BELOW for one in path.glob(pattern))}:
        newest = newest_checkpoint(folder)
        if newest is not None and folder.parent not in finished:
            found.add(newest)
    if not found:
        raise UserError(f"model {path}: no {WEIGHTS} there, and no trained reward model or checkpoint below it")
    if len(found) > 1:
        ordered = sorted(found)
        named = ", ".join(str(one) for one in ordered[:8]) + (", ..." if len(ordered) > 8 else "")
        raise UserError(f"model {path}: holds {len(found)} reward models, name one of them: {named}")
    (model,) = found
    return _described(model) if is_checkpoint(model) else model


def files_of(model: Path) -> Path:
    """The directory with a model's config, tokenizer and recipe: its own, or what lies beside its checkpoints."""
    return model.absolute().parents[1] / DESCRIPTION if is_checkpoint(model) else model


def _described(checkpoint: Path) -> Path:
    if not (files_of(checkpoint) / "config.json").is_file():
        raise UserError(
            f"checkpoint {checkpoint}: {files_of(checkpoint)} is missing, which tells what it is a checkpoint of; "
            "give the training's output with all that is in it, or its finished model"
        )
    trainable = read_recipe(checkpoint).get("config", {}).get("trainable", "full")
    if trainable != "full":
        raise UserError(
            f"checkpoint {checkpoint}: of a training with trainable = {trainable!r}, it holds the part of the model "
            "that is trained and not the rest; let the training end, and give its output's model"
        )
    return checkpoint


def identity(model: Path) -> dict[str, str]:
    """sha256 of every file that the model's scores depend on."""
    directory = files_of(model)
    paths = [directory / name for name in (*model_files(directory), RECIPE)]
    if is_checkpoint(model):
        paths += [model / name for name in _CHECKPOINT_FILES]
    return {path.name: files.sha256(path) for path in paths if path.is_file()}


def read_recipe(model: Path) -> dict[str, Any]:
    """What reward_model.json says of a model, and for a checkpoint how far it was trained; {} where there is none."""
    path = files_of(model) / RECIPE
    if not path.is_file():
        return {}
    try:
        recipe = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    return recipe | _progress_of(model) if is_checkpoint(model) else recipe


def _progress_of(checkpoint: Path) -> dict[str, Any]:
    """Steps so far, and the last validation up to there."""
    step, log = int(checkpoint.absolute().name), checkpoint.absolute().parents[1] / "metrics.jsonl"
    lines = files.read_lines(log) if log.is_file() else ()
    validations = [line for line in lines if "validation_loss" in line and line["step"] <= step]
    last = dict(validations[-1]) if validations else {}
    last.pop("step", None)
    validation = {name.removeprefix("validation_"): value for name, value in last.items()}
    return {"steps": step, "validation": validation, "unfinished": True}


def load_reward_model(
    model: Path, *, half: bool = False, mesh: jax.sharding.Mesh | None = None
) -> tuple[TransformerConfig, Any]:
    """(config, parameters) of a Hugging Face directory or a checkpoint, in bfloat16 where they are stored in it.

    half: a directory's in bfloat16 whatever they are stored in, for those who want no more of them; mesh: where the
    parameters are to lie, as in training. Raises UserError where the model does not divide over it.
    """
    places = None
    if mesh is not None:
        from jaxprm.training import sharding

        config = dataclasses.replace(huggingface.read_config(files_of(model))[0], tie_embeddings=True)
        sharding.check_model(mesh, config)
        places = sharding.shardings(sharding.place(mesh, weights.abstract(config, reward=True)))
    if not is_checkpoint(model):
        half = half or {tensor.dtype for tensor in open_tensors(model).values()} == {"BF16"}
        dtype = jnp.bfloat16 if half else jnp.float32
        return huggingface.load_reward_model(model, dtype=dtype, shardings=places)
    config, _ = huggingface.read_config(files_of(model))
    # Trained without an unembedding, whatever its base had.
    config = dataclasses.replace(config, tie_embeddings=True)
    return config, read_parameters(model, weights.abstract(config, reward=True), places)


def load_encoder(model: Path, template: str | None = None) -> Encoder:
    """A model's encoder, with a chat template that is not its own where one is chosen, as in Encoder.load.

    Raises UserError where it is not the one the model was trained with.
    """
    encoder = Encoder.load(files_of(model), template)
    trained_with = read_recipe(model).get("fingerprints", {}).get("tokenizer", encoder.fingerprint)
    if trained_with != encoder.fingerprint:
        raise UserError(
            f"model {model}: trained with tokenizer {trained_with[:12]}, beside it lies "
            f"{encoder.fingerprint[:12]}; put tokenizer.json and the chat template it was trained with beside it"
        )
    return encoder


def load_scorer(
    model: Path,
    *,
    rows: int = 8,
    max_tokens: int = 2048,
    dtype: str = "float32",
    template: str | None = None,
    mesh: config_lib.Mesh | None = None,
    shapes: Shapes = Shapes(),
) -> Scorer:
    """The scorer of a model that `find_model` found, computing in `dtype`; template: as in `load_encoder`.

    mesh: the devices of this process that share the work; None is the first of them. shapes: what is compiled for, or
    wider where the model was trained on longer turns.

    Raises UserError where model and tokenizer do not belong together.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    encoder = load_encoder(model, template)
    layout = ONE_DEVICE
    if mesh is not None:
        from jaxprm.training.sharding import make_mesh

        layout = Layout(make_mesh(mesh, jax.local_devices()))
    config, parameters = load_reward_model(model, mesh=layout.mesh)
    huggingface.check_vocabulary(model, config, encoder.vocabulary_size)
    if turns := read_turn_tokens(model):
        shapes = shapes.for_turns(**turns)
    options = {"rows": rows, "max_tokens": max_tokens, "dtype": dtype, "shapes": shapes, "layout": layout}
    return Scorer(config, parameters, encoder, **options)


def read_turn_tokens(model: Path) -> dict[str, TurnTokens]:
    """{"action", "observation"} of what a model was trained on; {} where its recipe does not say."""
    found = read_recipe(model).get("turn_tokens")
    if found is None:
        return {}
    try:
        turns = msgspec.convert(found, dict[Literal["action", "observation"], dict[Literal["median", "most"], _Count]])
        return {name: TurnTokens(**turns[name]) for name in ("action", "observation")}
    except (msgspec.ValidationError, KeyError, TypeError):
        raise UserError(
            f"{files_of(model) / RECIPE}: turn_tokens must have median and most, whole numbers, of action and "
            f"observation, found {str(found)[:200]}"
        ) from None


def all_devices() -> config_lib.Mesh | None:
    """The mesh of what computes much and was told no other: rows go to all devices of this process."""
    return config_lib.Mesh() if jax.local_device_count() > 1 else None


def defines_progress(recipe: dict[str, Any]) -> bool:
    """Progress is the difference of two neighbouring promises only where nothing is discounted between them."""
    return recipe.get("targets", {}).get("discount", 1.0) == 1.0


def step_table(messages: Sequence[int], promises: np.ndarray, *, progress: bool) -> dict[str, Any]:
    """{"steps": [{"message", "promise", "progress"}], "score"} from message indices and promises, [S] each.

    Progress is null for the first step, and for all where it is not defined; the score is the last promise.
    """
    if not np.isfinite(promises).all():
        raise UserError("the model's scores are not finite; its weights are broken")
    gains = [None, *(plain(gain) for gain in np.diff(promises))] if progress else [None] * len(promises)
    steps = [
        {"message": int(message), "promise": plain(promise), "progress": gain}
        for message, promise, gain in zip(messages, promises, gains, strict=True)
    ]
    return {"steps": steps, "score": steps[-1]["promise"]}


def plain(value: np.float32) -> float:
    """The shortest number that is this float32, not the sixteen digits of its double."""
    return float(str(np.float32(value)))
