"""The tokenizer of an exported model: transformers makes of its files the tokens the model was trained on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.chat_template import DATE, Messages
from data_pipeline.encode import Encoder
from jaxprm import files
from jaxprm.errors import UserError

_TEMPLATE = "chat_template.jinja"
# Some consumers want the last four.
_COPIED = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
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
    return {"unk_token": None} | settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": encoder.decode([encoder.pad_id]),
        "eos_token": encoder.decode([encoder.end_id]),
        "clean_up_tokenization_spaces": False,
    }


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
