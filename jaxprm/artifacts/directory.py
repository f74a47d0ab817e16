"""A reward model or a checkpoint on disk: found, described, and identified by its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.hf import hub
from jaxprm.hf.safetensors import WEIGHTS, has_weights, model_files

RECIPE = "reward_model.json"


# What stands for a checkpoint's arrays: written once, with the names of the files that hold them.
_CHECKPOINT_FILES = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt")


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


def model_identity(model: Path) -> dict[str, str]:
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


# Beside OUTPUT/checkpoints: config, tokenizer and recipe of the model they belong to.
DESCRIPTION = "model-files"


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory is a checkpoint, finished, of a training run."""
    return (directory / "_CHECKPOINT_METADATA").is_file() and (directory / "state").is_dir()


def newest_checkpoint(directory: Path) -> Path | None:
    """The last finished checkpoint below OUTPUT/checkpoints; the training may still be running."""
    found = [one for one in directory.glob("*") if one.name.isdigit() and is_checkpoint(one)]
    return max(found, key=lambda one: int(one.name), default=None)


def find_checkpoint(directory: Path) -> Path:
    """A step's own directory: `directory`, the newest of a training output, or of the only training of a run.

    Raises UserError where there is none, or where there are several trainings to choose from.
    """
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such directory; give a training output or a run")
    if directory.name.isdigit() and (directory / "state").is_dir():
        return directory
    if found := _steps(directory):
        return found[-1]
    trainings = sorted({one for pattern in _BELOW for one in directory.glob(pattern) if _steps(one)})
    if not trainings:
        raise UserError(f"checkpoint {directory}: no checkpoint there, nor below it")
    if len(trainings) > 1:
        named = ", ".join(str(one.parent) for one in trainings[:8]) + (", ..." if len(trainings) > 8 else "")
        raise UserError(f"checkpoint {directory}: holds {len(trainings)} trainings, name one of them: {named}")
    return _steps(trainings[0])[-1]


def _steps(directory: Path) -> list[Path]:
    """Committed steps by number; a write that was interrupted has another name."""
    found = [one for one in directory.iterdir() if one.name.isdigit() and (one / "state").is_dir()]
    return sorted(found, key=lambda one: int(one.name))
