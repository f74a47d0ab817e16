"""A reward model exported as a Hugging Face directory with its tokenizer, complete or not at all."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.chat_template import DATE, Messages
from data_pipeline.encode import Encoder
from data_pipeline.output import backup_of, staged_directory, staging_of
from jaxprm import files
from jaxprm.artifacts.directory import RECIPE, files_of, find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.export import verify as verification
from jaxprm.export.model_card import model_card, run_results
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
    form: str = "sequence",
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD,
    template: str | None = None,
    verify: bool = False,
    trajectories: Path | None = None,
) -> dict[str, Any]:
    """Writes OUTPUT as a sequence or token classifier of its family, with tokenizer, chat template and model card.

    Everything is written next to OUTPUT and renamed into place, after `verify` if that is asked for: then transformers,
    in a process of its own, scores the conversations of `trajectories` (or a few made-up ones), and every step's value
    must be ours; see `jaxprm.export.verify.verify`. Killed at any moment, it leaves no OUTPUT or the one before.

    Args:
        model_dir: a reward model: a Hugging Face directory, a training's output or checkpoint.
        form: "sequence", one value for a conversation, or "token", one for each of its tokens.
        dtype, max_shard_size: of the weights, "float32" or "bfloat16", and of their files, such as "5GB".
        template: the chat template to export it with in the place of its own, as in Encoder.load.

    Returns {"model", "output", "files"} and, verified, what `verify` returns.

    Raises UserError for a model that cannot be exported, an output directory that holds anything but an earlier export,
    missing torch, and scores that differ.
    """
    limit = _check_options(form, dtype, max_shard_size)
    model, output = find_model(model_dir), Path(output)
    if verify and importlib.util.find_spec("torch") is None:
        raise UserError(f"export --verify compares with transformers' torch model, and torch is missing: {_TORCH}")
    if trajectories is not None and not verify:
        raise UserError("export: trajectories are only read to verify on; add --verify")
    _check_replaceable(output)
    for leftover in (staging_of(output), backup_of(output)):
        _check_leftover(leftover)
    with staged_directory(output, overwrite=True) as staging:
        names = _write(model, staging, form, dtype, limit, template)
        report = {"model": str(model), "output": str(output), "files": names}
        if verify:
            report |= _verified(model, staging, trajectories, dtype, template)
    return report


def _check_options(form: str, dtype: str, max_shard_size: str) -> int:
    """The largest size of a file, in bytes."""
    for name, value, supported in (("format", form, writer.FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value not in supported:
            raise UserError(f"export: {name} = {value!r} is not supported; supported: {', '.join(supported)}")
    return parse_size(max_shard_size)


def _check_replaceable(directory: Path) -> None:
    """An earlier export may be replaced, with nothing in it but what was written then; nothing else may."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"output {directory}: is a file; name a directory")
    held = {path.name for path in directory.iterdir()}
    if not held:
        return
    if MARKER not in held:
        raise UserError(f"output {directory}: is not empty and was not made by export; name another directory")
    others = sorted(held - set(_marked(directory)) - {MARKER})
    if others:
        raise UserError(f"output {directory}: holds {others[0]}, which export did not write; name another directory")


def _check_leftover(directory: Path) -> None:
    """Refuses a directory that would be removed as the leftover of a killed export, and is none."""
    if not directory.exists():
        return
    held = {path.name for path in directory.iterdir()}
    # The marker is the first file of an export, and comes by a rename itself.
    if held and not held & {MARKER, MARKER + ".tmp"}:
        raise UserError(f"{directory}: is in the way and was not made by export; move it")


def _marked(directory: Path) -> list[str]:
    """The files that the export in `directory` says it wrote; none for one that was killed before it could say."""
    try:
        return json.loads((directory / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return []


def _mark(directory: Path, names: list[str]) -> None:
    files.write_json(directory / MARKER, {"format": 1, "files": names})


def _write(model: Path, beside: Path, form: str, dtype: str, limit: int, template: str | None) -> list[str]:
    """All files of the export; returns their names."""
    # First of all, so that what a kill leaves behind is known to be ours.
    _mark(beside, [])
    encoder, recipe = loading.load_encoder(model, template), read_recipe(model)
    _check_pooling(encoder, model)
    # Rounded as they are read: half the memory, and the same bits as rounded when they are written.
    loaded = loading.load_reward_model(model, half=dtype == "bfloat16")
    config, parameters = writer.in_format(*loaded, form)
    reader.check_vocabulary(model, config, encoder.vocabulary_size)
    _, source = reader.read_config(files_of(model))
    names = writer.write_model(
        beside,
        config,
        parameters,
        pad_id=encoder.pad_id,
        end_id=encoder.end_id,
        max_length=int(recipe.get("max_tokens") or LENGTH_BUCKETS[-1]),
        source=source,
        dtype=dtype,
        max_shard_bytes=limit,
    )
    names += write_tokenizer(files_of(model), beside, encoder, sample_conversations())
    files.write_json(beside / RECIPE, _exported_recipe(recipe, model, beside))
    _write_card(beside, None)
    names = sorted([*names, RECIPE, "README.md"])
    _mark(beside, names)
    return names


def _exported_recipe(recipe: dict[str, Any], model: Path, beside: Path) -> dict[str, Any]:
    """The recipe without anybody's paths, with the run's results and the tokenizer as it was exported."""
    exported = recipe | {"base": base_name(recipe)}
    if "fingerprints" in recipe:
        exported["fingerprints"] = recipe["fingerprints"] | {"tokenizer": Encoder.load(beside).fingerprint}
    results = run_results(model, recipe.get("label"))
    return exported if results is None else exported | {"results": results}


def _verified(model: Path, beside: Path, trajectories: Path | None, dtype: str, template: str | None) -> dict[str, Any]:
    found = verification.verify(model, beside, trajectories, dtype=dtype, template=template)
    _write_card(beside, found)
    return found


def _write_card(beside: Path, verified: dict[str, Any] | None) -> None:
    recipe = files.read_json(beside / RECIPE)
    config, tokenizer = (files.read_json(beside / name) for name in ("config.json", "tokenizer_config.json"))
    files.write_atomic(beside / "README.md", model_card(recipe, config, tokenizer, verified))


def _check_pooling(encoder: Encoder, model: Path) -> None:
    """Consumers read the last token that is not padding: a step must not end with padding."""
    one = encoder.trajectory(sample_conversations()[0], row="example")
    last = int(one.tokens[one.read_positions[-1]])
    if encoder.pad_id in (encoder.end_id, last):
        raise UserError(
            f"model {model}: pad_token is {encoder.decode([encoder.pad_id])!r}, which also ends a message, so others "
            "would read the wrong token, and no other special token is free; train with a tokenizer whose pad_token is "
            "a token of its own"
        )


def base_name(recipe: dict[str, Any]) -> str:
    """What the model was made from: a name on the Hub, or the last part of a path, which is nobody else's business."""
    base = Path(recipe.get("base") or "unknown")
    return base.name if base.exists() or base.is_absolute() or len(base.parts) != 2 else str(base)


_TEMPLATE = "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"
# Some consumers want the last three.
_COPIED = ("tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt")
# A tokenizer that declares a class of its own is not rebuilt; the class named here is transformers' plain one, no code.
_AS_IT_IS = {"auto_map": {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]}}


def write_tokenizer(source: Path, target: Path, encoder: Encoder, conversations: Sequence[Messages]) -> list[str]:
    """Writes the tokenizer of `source` into `target`, which has its config.json, and returns the names of the files.

    encoder: the one of `source`; conversations: to try it on.

    Raises UserError where AutoTokenizer, in no way we know, gives the encoder's tokens.
    """
    names = [name for name in _COPIED if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / _SPECIAL).is_file():  # transformers 4 believes it more than the settings
        names.append(_SPECIAL)
        files.write_json(target / _SPECIAL, files.read_json(source / _SPECIAL) | _ends(encoder))
    files.write_atomic(target / _TEMPLATE, dated(encoder.template))
    settings = _settings(source, encoder)
    for extra in ({}, _AS_IT_IS):
        files.write_json(target / "tokenizer_config.json", settings | extra)
        if _same_tokens(target, encoder, conversations):
            return [*names, _TEMPLATE, "tokenizer_config.json"]
    raise UserError(
        f"model {source}: transformers' AutoTokenizer does not give the tokens it was trained on; "
        "train with a tokenizer that transformers reads as it is, such as imitate makes"
    )


def dated(template: str) -> str:
    """The template with the date it was trained with: Llama's print today's, unless they are told another."""
    pinned = f"{{%- set date_string = '{DATE}' -%}}\n"
    reads_it = re.search(r"\b(date_string|strftime_now)\b", template)
    return pinned + template if reads_it and not template.startswith(pinned) else template


def _settings(source: Path, encoder: Encoder) -> dict[str, Any]:
    """The tokenizer's own settings, under the class that every version of transformers knows."""
    path = source / "tokenizer_config.json"
    settings = files.read_json(path) if path.is_file() else {}
    for name in ("backend", "auto_map", "chat_template"):
        settings.pop(name, None)
    # Named or not, Qwen2's class wants an unknown token, and would add one of its own.
    ours = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | _ends(encoder)
    return {"unk_token": None} | settings | ours


def _ends(encoder: Encoder) -> dict[str, str]:
    return {"pad_token": encoder.decode([encoder.pad_id]), "eos_token": encoder.decode([encoder.end_id])}


def _same_tokens(directory: Path, encoder: Encoder, conversations: Sequence[Messages]) -> bool:
    """Others load the tokenizer by AutoTokenizer, which rebuilds that of a Qwen2 model by Qwen2's rules."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if len(theirs) != encoder.vocabulary_size or theirs.pad_token_id != encoder.pad_id:
        return False
    for messages in conversations:
        text = theirs.apply_chat_template(messages, tokenize=False)
        ours = encoder.trajectory(messages, row="example").tokens.tolist()
        if theirs(text, add_special_tokens=False)["input_ids"] != ours:
            return False
    return True
