"""A trained reward model as a Hugging Face directory that others can load, and the proof that their scores are ours."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chat_template import as_messages, freeze
from data_pipeline.encode import Encoder
from data_pipeline.trajectory import Message, read_numbered, steps
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.model import huggingface
from jaxprm.model_card import model_card
from jaxprm.scoring import loading

MARKER = ".jaxprm-export"
# An old tokenizer keeps its template in tokenizer_config.json, and some consumers want the last four.
_TOKENIZER_EXTRAS = (
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
# A tokenizer that declares a class of its own is not rebuilt; the class named here is transformers' plain one, no code.
_AS_IT_IS = {"auto_map": {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]}}
_TORCH = "pip install torch==2.13.0 (PyTorch's own index has a CPU build, which is enough)"


def export(model_dir: Path, output: Path, *, verify: bool = False, trajectories: Path | None = None) -> dict[str, Any]:
    """Writes OUTPUT as `Qwen2ForSequenceClassification` with tokenizer, chat template and model card.

    Everything is written beside OUTPUT and renamed into place, after `verify` if that is asked for: then transformers,
    in a process of its own, scores the conversations of `trajectories` (or a few made-up ones), and every step's value
    must be ours within 1e-5 * max(1, rms).

    Returns {"model", "output", "files"} and, verified, {"trajectories", "read_positions", "largest_difference",
    "bound", "rms", "transformers", "torch"}.

    Raises UserError for a model that cannot be exported, an output directory that holds anything but an earlier export,
    missing torch, and scores that differ.
    """
    model, output = loading.find_model(model_dir), Path(output)
    if verify and importlib.util.find_spec("torch") is None:
        raise UserError(f"export --verify compares with transformers' torch model, and torch is missing: {_TORCH}")
    if trajectories is not None and not verify:
        raise UserError("export: trajectories are only read to verify on; add --verify")
    _check_replaceable(output)
    beside, old = (output.with_name(f".{output.name}.{name}") for name in ("partial", "old"))
    for leftover in (beside, old):
        _remove_leftover(leftover)
    try:
        beside.mkdir(parents=True)
        made = {"model": str(model), "output": str(output), "files": _write(model, beside)}
        if verify:
            made |= _verify(model, beside, trajectories)
            _write_card(beside, made)
        _put_in_place(beside, output, old)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return made


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


def _remove_leftover(directory: Path) -> None:
    """Removes what a killed export left beside its output, and nothing else."""
    if not directory.exists():
        return
    held = {path.name for path in directory.iterdir()}
    # The marker is the first file of an export, and comes by a rename itself.
    if held and not held & {MARKER, MARKER + ".tmp"}:
        raise UserError(f"{directory}: is in the way and was not made by export; move it")
    shutil.rmtree(directory)


def _marked(directory: Path) -> list[str]:
    """The files that the export in `directory` says it wrote; none for one that was killed before it could say."""
    try:
        return json.loads((directory / MARKER).read_text())["files"]
    except (ValueError, KeyError):
        return []


def _write(model: Path, beside: Path) -> list[str]:
    """All files of the export; returns their names."""
    config, parameters = huggingface.load_reward_model(model)
    encoder = Encoder.load(model)
    _check_pooling(encoder, model)
    _, source = huggingface.read_config(model)
    recipe = loading.read_recipe(model)
    length = int(source.get("max_position_embeddings") or recipe.get("max_tokens") or 0)
    copied = ["tokenizer.json", *(name for name in _TOKENIZER_EXTRAS if (model / name).is_file())]
    names = ["README.md", "config.json", loading.WEIGHTS, loading.RECIPE, "tokenizer_config.json", *copied]
    # First of all, so that what a kill leaves behind is known to be ours.
    files.write_json(beside / MARKER, {"format": 1, "files": sorted(names)})
    huggingface.write_model(
        beside, config, parameters, pad_id=encoder.pad_id, end_id=encoder.end_id, max_length=length
    )
    for name in copied:
        shutil.copyfile(model / name, beside / name)
    _write_tokenizer_config(beside, encoder, model)
    files.write_json(beside / loading.RECIPE, recipe | {"base": base_name(recipe)})
    _write_card(beside, None)
    return sorted(names)


def _write_card(beside: Path, verified: dict[str, Any] | None) -> None:
    recipe = files.read_json(beside / loading.RECIPE)
    config, tokenizer = (files.read_json(beside / name) for name in ("config.json", "tokenizer_config.json"))
    files.write_atomic(beside / "README.md", model_card(recipe, config, tokenizer, verified))


def _check_pooling(encoder: Encoder, model: Path) -> None:
    """Consumers read the last token that is not padding: a step must not end with padding."""
    conversation = _synthetic()[0]
    one = encoder.trajectory(conversation, row="example")
    last = int(one.tokens[one.read_positions[-1]])
    if encoder.pad_id in (encoder.end_id, last):
        raise UserError(
            f"model {model}: pad_token is {encoder.decode([encoder.pad_id])!r}, which also ends a message, so others "
            "would read the wrong token; train with a tokenizer whose pad_token is a token of its own"
        )


def _tokenizer_config(model: Path, encoder: Encoder) -> dict[str, Any]:
    """The tokenizer's own settings, under the class that every version of transformers knows."""
    path = model / "tokenizer_config.json"
    settings = files.read_json(path) if path.is_file() else {}
    settings.pop("backend", None)
    # Named or not, Qwen2's class wants an unknown token, and would add one of its own.
    return {"unk_token": None} | settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": encoder.decode([encoder.pad_id]),
        "eos_token": encoder.decode([encoder.end_id]),
        "clean_up_tokenization_spaces": False,
    }


def _write_tokenizer_config(beside: Path, encoder: Encoder, model: Path) -> None:
    """Settings with which AutoTokenizer gives the tokens the model was trained on. UserError where none do."""
    settings = _tokenizer_config(model, encoder)
    for extra in ({}, _AS_IT_IS):
        files.write_json(beside / "tokenizer_config.json", settings | extra)
        if _same_tokens(beside, encoder):
            return
    raise UserError(
        f"model {model}: transformers' AutoTokenizer does not give the tokens it was trained on; "
        "train with a tokenizer that transformers reads as it is, such as imitate makes"
    )


def _same_tokens(directory: Path, encoder: Encoder) -> bool:
    """Others load the tokenizer by AutoTokenizer, which rebuilds that of a qwen2 model by Qwen2's rules."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if len(theirs) != encoder.vocabulary_size:
        return False
    for messages in _synthetic():
        text = theirs.apply_chat_template(messages, tokenize=False)
        ours = encoder.trajectory(messages, row="example").tokens.tolist()
        if theirs(text, add_special_tokens=False)["input_ids"] != ours:
            return False
    return True


def base_name(recipe: dict[str, Any]) -> str:
    """What the model was made from: a name on the Hub, or the last part of a path, which is nobody else's business."""
    base = Path(recipe.get("base") or "unknown")
    return base.name if base.exists() or base.is_absolute() or len(base.parts) != 2 else str(base)


def _put_in_place(beside: Path, output: Path, old: Path) -> None:
    """Swaps the export in; what was there before is gone only when the new one is in its place."""
    if not output.exists():
        beside.rename(output)
        return
    output.rename(old)
    try:
        beside.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old)


def _verify(model: Path, exported: Path, path: Path | None) -> dict[str, Any]:
    """Our scores of the model as it was trained against transformers' scores of what was exported."""
    conversations = _synthetic() if path is None else None
    names, messages, tools = [], [], []
    if conversations is None:
        for where, trajectory in read_numbered(path):
            if not steps(trajectory.messages):
                continue  # an episode that failed before its first action has no value to compare
            names.append(where)
            messages.append(trajectory.messages)
            tools.append(trajectory.tools)
    else:
        names = [f"made-up conversation {index}" for index in range(len(conversations))]
        messages, tools = [as_messages(one, "made up") for one in conversations], [None] * len(conversations)
    if not names:
        raise UserError(f"{path}: no trajectory to verify on")
    scorer = loading.load_scorer(model)
    encoded = [
        scorer.encoder.trajectory(one, row=name, tools=tool)
        for one, name, tool in zip(messages, names, tools, strict=True)
    ]
    ours = scorer.score_encoded(encoded, names)
    cases = [
        {
            "name": name,
            "messages": [freeze(message).for_template() for message in one],
            "tools": tool,
            "tokens": table.tokens.tolist(),
            "read_positions": table.read_positions.tolist(),
        }
        for name, one, tool, table in zip(names, messages, tools, encoded, strict=True)
    ]
    reply = _their_scores(exported, cases)
    return _compare(names, ours, reply)


def _their_scores(exported: Path, cases: Sequence[dict]) -> dict[str, Any]:
    """Runs export_check.py, which knows transformers and nothing of ours."""
    script = Path(__file__).with_name("export_check.py")
    with tempfile.TemporaryDirectory(prefix="jaxprm-verify-") as scratch:
        question, answer = Path(scratch) / "cases.json", Path(scratch) / "values.json"
        question.write_text(json.dumps(cases), encoding="utf-8")
        # -P: the script's directory is full of modules with everyday names.
        command = [sys.executable, "-P", str(script), str(exported.absolute()), str(question), str(answer)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not answer.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise UserError(f"export --verify: transformers does not read the export: {reason[0]}")
        return json.loads(answer.read_text())


def _compare(names: Sequence[str], ours: Sequence[np.ndarray], reply: dict[str, Any]) -> dict[str, Any]:
    theirs = [np.asarray(values, np.float64) for values in reply["values"]]
    reference = np.concatenate(theirs)
    rms = float(np.sqrt(np.mean(reference**2)))
    bound = 1e-5 * max(1.0, rms)
    worst = [float(np.abs(own - other).max()) for own, other in zip(ours, theirs, strict=True)]
    largest = float(np.max(worst))
    if not largest <= bound:  # a NaN is no success either
        raise UserError(
            f"export --verify: scores differ by {largest:.2e} in {names[int(np.argmax(worst))]}, bound {bound:.2e}; "
            "nothing was exported"
        )
    return {
        "trajectories": len(ours),
        "read_positions": len(reference),
        "largest_difference": largest,
        "bound": bound,
        "rms": rms,
        "transformers": reply["transformers"],
        "torch": reply["torch"],
    }


def _synthetic() -> list[list[dict | Message]]:
    """Conversations of different lengths, to verify on where the user gives none."""
    conversations = []
    for turns in (1, 2, 5, 9):
        messages = [{"role": "user", "content": f"Craft {turns} oak planks. You have {turns + 3} oak logs."}]
        for turn in range(turns):
            if turn:
                messages.append({"role": "user", "content": f"Got {turn} oak log. Inventory: [oak log] ({turn})"})
            messages.append({"role": "assistant", "content": f"I'd need {turns - turn}:\n\nget {turn + 1}0 oak-log"})
        conversations.append(messages)
    return conversations
