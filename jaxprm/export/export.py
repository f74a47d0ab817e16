"""The `export` verb: a reward model as a Hugging Face directory with a model card, complete or not at all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from data_pipeline.encode import Encoder
from data_pipeline.output import backup_of, staged_directory, staging_of
from jaxprm import files
from jaxprm.artifacts.directory import RECIPE, files_of, find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.export import verify as verification
from jaxprm.export.model_card import model_card, run_results
from jaxprm.export.tokenizer import write_tokenizer
from jaxprm.hf import reader, writer
from jaxprm.hf.writer import DTYPES, MAX_SHARD, parse_size
from jaxprm.scoring import loading
from jaxprm.scoring.check import sample_conversations
from jaxprm.scoring.engine import LENGTH_BUCKETS

MARKER = ".jaxprm-export"
_TORCH = "pip install torch==2.13.0 (PyTorch's own index has a CPU build, which is enough)"


def export(
    model_dir: Path,
    output: Path,
    *,
    head_format: str = "sequence",
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD,
    template: str | None = None,
    verify: bool = False,
    trajectories: Path | None = None,
) -> dict[str, Any]:
    """Writes OUTPUT as a sequence or token classifier of its family, with tokenizer, chat template and model card.

    Everything is written to a staging directory next to OUTPUT and renamed into place after verification. Killed at any
    moment, it leaves no OUTPUT, or the one before.

    Args:
        model_dir: a reward model: a Hugging Face directory, the output of a training run, or a checkpoint.
        head_format: "sequence", one value for a conversation, or "token", one for each of its tokens.
        dtype: of the weights, "float32" or "bfloat16".
        max_shard_size: of a file of weights, such as "5GB".
        template: a chat template instead of the model's own, as in Encoder.load.
        verify: let transformers score conversations in a separate process, and compare every step's value with ours;
            see `jaxprm.export.verify.verify`.
        trajectories: the conversations to verify on, as JSON Lines; default: a few samples.

    Returns:
        {"model", "output", "files"} and, verified, what `verify` returns.

    Raises:
        UserError: the model cannot be exported, OUTPUT has files that export did not write, torch is missing, or scores
            differ.
    """
    limit = _check_options(head_format, dtype, max_shard_size)
    model, output = find_model(model_dir), Path(output)
    # Looked up, not imported: torch is slow to import, and only the separate process needs it.
    if verify and importlib.util.find_spec("torch") is None:
        raise UserError(f"export --verify compares with transformers' torch model, and torch is missing: {_TORCH}")
    if trajectories is not None and not verify:
        raise UserError("export: trajectories are only read to verify on; add --verify")
    _check_replaceable(output)
    # `staged_directory` removes both of these, whatever they hold.
    for leftover in (staging_of(output), backup_of(output)):
        _check_leftover(leftover)
    with staged_directory(output, overwrite=True) as staging:
        names = _write(model, staging, head_format, dtype, limit, template)
        result = {"model": str(model), "output": str(output), "files": names}
        if verify:
            result |= _verify(model, staging, trajectories, dtype, template)
    return result


def _check_options(head_format: str, dtype: str, max_shard_size: str) -> int:
    """The largest size of a file, in bytes. Raises UserError for an option that is not supported."""
    for name, value, supported in (("format", head_format, writer.FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value not in supported:
            raise UserError(f"export: {name} = {value!r} is not supported; supported: {', '.join(supported)}")
    return parse_size(max_shard_size)


def _check_replaceable(directory: Path) -> None:
    """Raises UserError unless OUTPUT is missing, empty, or an earlier export without any other file."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"output {directory}: is a file; name a directory")
    names = {path.name for path in directory.iterdir()}
    if not names:
        return
    if MARKER not in names:
        raise UserError(f"output {directory}: is not empty and was not made by export; name another directory")
    others = sorted(names - set(_marked(directory)) - {MARKER})
    if others:
        raise UserError(f"output {directory}: holds {others[0]}, which export did not write; name another directory")


def _check_leftover(directory: Path) -> None:
    """Raises UserError for a directory that would be removed as the leftover of a killed export, but is none."""
    if not directory.exists():
        return
    names = {path.name for path in directory.iterdir()}
    # The marker is the first file of an export, and is renamed into place itself.
    if names and not names & {MARKER, MARKER + ".tmp"}:
        raise UserError(f"{directory}: exists but was not made by export; move or delete it")


def _marked(directory: Path) -> list[str]:
    """The files that the marker of an export lists; none if it was killed before it was complete."""
    try:
        return json.loads((directory / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return []


def _mark(directory: Path, names: list[str]) -> None:
    files.write_json(directory / MARKER, {"format": 1, "files": names})


def _write(model: Path, staging: Path, head_format: str, dtype: str, limit: int, template: str | None) -> list[str]:
    """Writes all files of the export; returns their names."""
    # The marker comes first, so that the leftovers of a killed export are recognized as ours.
    _mark(staging, [])
    encoder, recipe = loading.load_encoder(model, template), read_recipe(model)
    _check_pooling(encoder, model)
    # Rounded as they are read: half the memory, and the same bits as rounded when they are written.
    loaded = loading.load_reward_model(model, dtype=jnp.bfloat16 if dtype == "bfloat16" else None)
    config, parameters = writer.in_format(*loaded, head_format)
    reader.check_vocabulary(model, config, encoder.vocabulary_size)
    _, source = reader.read_config(files_of(model))
    names = writer.write_model(
        staging,
        config,
        parameters,
        pad_id=encoder.pad_id,
        end_id=encoder.end_id,
        # Only written if the source's config.json has no max_position_embeddings.
        max_length=int(recipe.get("max_tokens") or LENGTH_BUCKETS[-1]),
        source=source,
        dtype=dtype,
        max_shard_bytes=limit,
    )
    names += write_tokenizer(files_of(model), staging, encoder, sample_conversations())
    files.write_json(staging / RECIPE, _exported_recipe(recipe, model, staging))
    _write_card(staging, None)
    # The complete list: the next export replaces these files and refuses to touch any other.
    names = sorted([*names, RECIPE, "README.md"])
    _mark(staging, names)
    return names


def _check_pooling(encoder: Encoder, model: Path) -> None:
    """Raises UserError if a step can end with the padding token: consumers read the last token that is not padding."""
    example = encoder.trajectory(sample_conversations()[0], row="example")
    last = int(example.tokens[example.read_positions[-1]])
    if encoder.pad_id in (encoder.end_id, last):
        raise UserError(
            f"model {model}: pad_token is {encoder.decode([encoder.pad_id])!r}, which also ends a message, so "
            "consumers would read the wrong token, and no other special token is free; train with a tokenizer whose "
            "pad_token ends no message"
        )


def _exported_recipe(recipe: dict[str, Any], model: Path, staging: Path) -> dict[str, Any]:
    """The recipe without local paths, with the results of the run and the fingerprint of the exported tokenizer."""
    exported = recipe | {"base": base_name(recipe)}
    if "fingerprints" in recipe:
        # The template may be another one than in training, or have got its date: both change the fingerprint.
        encoder = Encoder.load(staging, reasoning=recipe.get("reasoning", "keep"))
        exported["fingerprints"] = recipe["fingerprints"] | {"tokenizer": encoder.fingerprint}
    results = run_results(model, recipe.get("label"))
    return exported if results is None else exported | {"results": results}


def base_name(recipe: dict[str, Any]) -> str:
    """The model that training started from: its Hub id, or the last part of a path, the rest of which is private."""
    base = Path(recipe.get("base") or "unknown")
    # Two parts of a relative path that does not exist are a Hub id.
    return base.name if base.exists() or base.is_absolute() or len(base.parts) != 2 else str(base)


def _verify(model: Path, staging: Path, trajectories: Path | None, dtype: str, template: str | None) -> dict[str, Any]:
    comparison = verification.verify(model, staging, trajectories, dtype=dtype, template=template)
    _write_card(staging, comparison)
    return comparison


def _write_card(staging: Path, verified: dict[str, Any] | None) -> None:
    recipe = files.read_json(staging / RECIPE)
    config, tokenizer = (files.read_json(staging / name) for name in ("config.json", "tokenizer_config.json"))
    files.write_atomic(staging / "README.md", model_card(recipe, config, tokenizer, verified))
