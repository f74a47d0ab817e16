"""The tokenizer of an export: files from which transformers' AutoTokenizer gives the tokens of training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline import typed_json
from data_pipeline.chat_template import DATE, Messages, read_tokenizer_config
from data_pipeline.encode import Encoder
from data_pipeline.errors import one_line, shown
from jaxprm import files
from jaxprm.errors import UserError

_TEMPLATE = "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"
# Some consumers want the last three.
_COPIED = ("tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt")
# AutoTokenizer rebuilds the tokenizer of some families by their own rules, unless it declares a class. The class named
# here is transformers' plain one, so no code is loaded.
_PLAIN_CLASS = {"auto_map": {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]}}


def write_tokenizer(
    source: Path, target: Path, encoder: Encoder, conversations: Sequence[Messages], *, source_name: str | None = None
) -> list[str]:
    """Writes the tokenizer of `source` into `target`, which has its config.json; returns the names of the files.

    Args:
        encoder: that of `source`.
        conversations: on which AutoTokenizer must give the encoder's tokens.
        source_name: of `source` in an error.

    Raises:
        UserError: AutoTokenizer gives other tokens, with and without a declared class.
    """
    names = [name for name in _COPIED if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / _SPECIAL).is_file():  # in transformers 4 it overrides tokenizer_config.json
        names.append(_SPECIAL)
        special = typed_json.read(source / _SPECIAL, dict[str, Any], fix="copy or download it again", error=UserError)
        files.write_json(target / _SPECIAL, special | _special_tokens(encoder))
    files.write_atomic(target / _TEMPLATE, pin_date(encoder.template))
    settings = _settings(source, encoder)
    # A class is declared only where it is needed: an auto_map looks as if code had to be trusted.
    for declaration in ({}, _PLAIN_CLASS):
        files.write_json(target / "tokenizer_config.json", settings | declaration)
        if _same_tokens(source, target, encoder, conversations):
            return [*names, _TEMPLATE, "tokenizer_config.json"]
    raise UserError(
        f"model {source_name or source}: transformers' AutoTokenizer does not give the tokens it was trained on; "
        "train with a tokenizer that transformers reads without changes, such as imitate makes"
    )


def pin_date(template: str) -> str:
    """The template with the date of training. Llama's templates print today's date unless they are given another."""
    pinned = f"{{%- set date_string = '{DATE}' -%}}\n"
    reads_it = re.search(r"\b(date_string|strftime_now)\b", template)
    return pinned + template if reads_it and not template.startswith(pinned) else template


def _settings(source: Path, encoder: Encoder) -> dict[str, Any]:
    """The source's tokenizer_config.json, with a class that every version of transformers knows."""
    settings = read_tokenizer_config(source)
    # An auto_map names code of the source's repository; the template is written as a file.
    for name in ("backend", "auto_map", "chat_template"):
        settings.pop(name, None)
    # Clean-up, the default of transformers 4, removes spaces before punctuation from decoded text.
    ours = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # Whatever class is named, Qwen2's rules want an unknown token and would add one.
    return {"unk_token": None} | settings | ours | _special_tokens(encoder)


def _special_tokens(encoder: Encoder) -> dict[str, str]:
    return {"pad_token": encoder.decode([encoder.pad_id]), "eos_token": encoder.decode([encoder.end_id])}


def _same_tokens(source: Path, directory: Path, encoder: Encoder, conversations: Sequence[Messages]) -> bool:
    """Whether AutoTokenizer gives the encoder's tokens, padding and vocabulary size.

    Raises UserError if it cannot read the files, which have all fields of those in `source`.
    """
    try:
        return _encodes_equally(directory, encoder, conversations)
    except Exception as error:  # transformers raises anything for a field of a wrong type
        raise UserError(
            f"model {source}: transformers cannot read its config.json or its tokenizer's files "
            f"({type(error).__name__}: {shown(one_line(error)[:300])}); correct the field, or remove it"
        ) from error


def _encodes_equally(directory: Path, encoder: Encoder, conversations: Sequence[Messages]) -> bool:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if len(theirs) != encoder.vocabulary_size or theirs.pad_token_id != encoder.pad_id:
        return False
    for messages in conversations:
        # First, because our rendering has bounds on its time and memory.
        ours = encoder.trajectory(messages, row="example").tokens.tolist()
        text = theirs.apply_chat_template(messages, tokenize=False)
        if theirs(text, add_special_tokens=False)["input_ids"] != ours:
            return False
    return True
