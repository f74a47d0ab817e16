"""Reward models and checkpoints on disk: locating, describing and identifying them.

A training output has `model` (the finished model) and `checkpoints` (one directory per step), and next to them
DESCRIPTION. A checkpoint with a description can be used as a model. This module loads no Orbax, which takes two seconds
to import.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_pipeline import typed_json
from jaxprm import files
from jaxprm.artifacts import recipe
from jaxprm.errors import UserError
from jaxprm.hf import hub
from jaxprm.hf.safetensors import WEIGHTS, has_weights, model_files

RECIPE = "reward_model.json"
# In a training output: config, tokenizer and recipe of the model that its checkpoints belong to.
DESCRIPTION = "model-files"
# The files that identify a checkpoint's arrays: each is written once, with the names of the data files.
_CHECKPOINT_FILES = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt")
# Training outputs below a path that is a reward model's directory, the one above it, or a run.
_BELOW = ("seed-*", "*/seed-*", "reward_models/*/seed-*")
_MAX_LISTED = 8


def find_model(path: str | Path) -> Path:
    """The model that a path means: a directory with weights, a checkpoint, or the only model at or below the path.

    The path may be a training output or a run; an unfinished training run is represented by its newest checkpoint. A
    path that is no directory may be a name on the hub, "org/name" or "org/name@revision".

    Raises UserError if there is no model, if there are several, or if the checkpoint cannot be used as a model.
    """
    path = hub.resolve(path)
    if has_weights(path):
        return path
    if is_checkpoint(path):
        return _check_usable(path)
    finished = {output for output in _outputs(path) if has_weights(output / "model")}
    models = {output / "model" for output in finished}
    models |= {newest for output, newest in _newest_checkpoints(path).items() if output not in finished}
    if not models:
        raise UserError(f"model {path}: no {WEIGHTS} there, and no trained reward model or checkpoint below it")
    _check_single(models, f"model {path}: holds {len(models)} reward models")
    (model,) = models
    return _check_usable(model) if is_checkpoint(model) else model


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of the only training run at or below it.

    Raises UserError if there is none, or if there are several training runs.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such directory; give a training output or a run")
    if is_checkpoint(path):
        return path
    if newest := newest_checkpoint(path):
        return newest
    newest_by_output = _newest_checkpoints(path)
    if not newest_by_output:
        raise UserError(f"checkpoint {path}: no checkpoint there, nor below it")
    _check_single(newest_by_output, f"checkpoint {path}: holds {len(newest_by_output)} training runs")
    (newest,) = newest_by_output.values()
    return newest


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory is a complete checkpoint of a training run."""
    # Orbax writes the metadata last, so a checkpoint that is being written, or was interrupted, has none.
    # absolute(): the name of "." is empty.
    is_step = directory.absolute().name.isdigit()
    return is_step and (directory / "_CHECKPOINT_METADATA").is_file() and (directory / "state").is_dir()


def newest_checkpoint(directory: Path) -> Path | None:
    """The last complete checkpoint in a folder of checkpoints, or None; the training run may still be writing."""
    checkpoints = [path for path in directory.glob("*") if is_checkpoint(path)]
    # As numbers: as texts, "1000" comes before "200".
    return max(checkpoints, key=lambda path: int(path.name), default=None)


def files_of(model: Path) -> Path:
    """The directory with a model's config, tokenizer and recipe; a checkpoint's is in its training output."""
    return model.absolute().parents[1] / DESCRIPTION if is_checkpoint(model) else model


def model_identity(model: Path) -> dict[str, str]:
    """sha256, by file name, of every file that the model's scores depend on."""
    directory = files_of(model)
    paths = [directory / name for name in (*model_files(directory), RECIPE)]
    if is_checkpoint(model):
        paths += [model / name for name in _CHECKPOINT_FILES]
    return {path.name: files.sha256(path) for path in paths if path.is_file()}


def read_recipe(model: Path) -> dict[str, Any]:
    """The fields of a model's reward_model.json, {} if it has none; those of a checkpoint say how far it was trained.

    Raises UserError if the file is not a JSON object, or a field of this package has another type.
    """
    path = files_of(model) / RECIPE
    if not path.is_file():
        return {}
    fields = recipe.read(path)
    return fields | _training_progress(model) if is_checkpoint(model) else fields


def _outputs(path: Path) -> set[Path]:
    return {path, *(output for pattern in _BELOW for output in path.glob(pattern))}


def _newest_checkpoints(path: Path) -> dict[Path, Path]:
    """The newest checkpoint of every training run, by its output; `path` may also be a folder of checkpoints."""
    folders = {path, *(output / "checkpoints" for output in _outputs(path))}
    return {folder.parent: newest for folder in folders if (newest := newest_checkpoint(folder)) is not None}


def _check_single(candidates: Collection[Path], what: str) -> None:
    if len(candidates) > 1:
        names = ", ".join(map(str, sorted(candidates)[:_MAX_LISTED]))
        raise UserError(f"{what}; name one of them: {names}" + (", ..." if len(candidates) > _MAX_LISTED else ""))


def _check_usable(checkpoint: Path) -> Path:
    """The checkpoint. Raises UserError if it has no description, or not all parameters of its model."""
    if not (files_of(checkpoint) / "config.json").is_file():
        raise UserError(
            f"checkpoint {checkpoint}: {files_of(checkpoint)} is missing, which has the model's config and tokenizer; "
            "give the complete training output, or its finished model"
        )
    trainable = read_recipe(checkpoint).get("config", {}).get("trainable", "full")
    if trainable != "full":
        raise UserError(
            f"checkpoint {checkpoint}: trained with trainable = {trainable!r}, it holds only the trained part of the "
            "model; finish the training run, and give the model in its output"
        )
    return checkpoint


def _training_progress(checkpoint: Path) -> dict[str, Any]:
    """The step of a checkpoint, and the last validation metrics up to it."""
    step, log = int(checkpoint.absolute().name), checkpoint.absolute().parents[1] / "metrics.jsonl"
    latest: dict[str, float | None] = {}
    for number, line in enumerate(files.read_lines(log) if log.is_file() else (), start=1):
        if "validation_loss" in line:
            fix = "remove the line"
            metrics = typed_json.convert(
                line, dict[str, float | None], where=f"{log}:{number}", fix=fix, error=UserError
            )
            if (metrics.pop("step", None) or 0) <= step:
                latest = metrics
    validation = {name.removeprefix("validation_"): value for name, value in latest.items()}
    return {"steps": step, "validation": validation, "unfinished": True}
