"""Which chat template a tokenizer is used with: its own, one that ships with the package, or a user's file.

The stock templates of some models rewrite earlier turns, or print the date. Those that ship keep every rendering a
prefix of the next.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from data_pipeline.chat_template import default_template, read_tokenizer_config
from data_pipeline.errors import DataError

OWN = "own"
FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


class Shipped(NamedTuple):
    """The special tokens that a shipped template writes, and the one of them that ends a message."""

    tokens: tuple[str, ...]
    end: str


SHIPPED = {
    "chatml": Shipped(("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Shipped(("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}


def read_template(template: str | PathLike[str] | None) -> str | None:
    """The text of a template that is not the tokenizer's own: of a shipped one, by its name, or of a file.

    Raises DataError where there is no such template.
    """
    if template is None or str(template) == OWN:
        return None
    if str(template) in SHIPPED:
        return (resources.files("data_pipeline") / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(
            f"template {template}: cannot be read ({reason}); name a file, or one of {', '.join([OWN, *SHIPPED])}"
        ) from None


def choose(tokenizer: PreTrainedTokenizerFast, template: str | PathLike[str] | None, *, source: str) -> None:
    """Gives a tokenizer the template `template`: None or "own", the name of a shipped one, or a file.

    A shipped template also says which token ends a message.

    Raises DataError for a template that is not there, or that needs special tokens which the tokenizer has not.
    """
    text = read_template(template)
    if text is None:
        return
    tokenizer.chat_template = text
    shipped = SHIPPED.get(str(template))
    if shipped is not None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if missing := [token for token in shipped.tokens if token not in special]:
            raise DataError(f"{source}: template {template} needs the special token {missing[0]}, which is not there")
        tokenizer.eos_token = shipped.end


def advice(special: Collection[str]) -> str:
    """What to do about a template that does not work, for the end of an error: one for this tokenizer's tokens."""
    fitting = [name for name, shipped in SHIPPED.items() if set(shipped.tokens) <= set(special)]
    choice = " or ".join([*fitting, "FILE"])
    return f"; choose one that prints every message as it is with --chat-template {choice} (docs/your-trajectories.md)"


def write_tokenizer(template: str, end: str, base: Path, directory: Path) -> None:
    """Copies a tokenizer's files from `base` to `directory`, with the template and the end of messages it is used with.

    Nothing is rewritten where both are its own.
    """
    for name in FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    config = read_tokenizer_config(base)
    own = base / "chat_template.jinja"
    own_text = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    is_own = own_text is not None and default_template(own_text) == template
    if not is_own or _text(config.get("eos_token")) != end:
        config.pop("chat_template", None)  # readers differ in which of the two places they look at first
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        described = json.dumps(config | {"eos_token": end}, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(described, encoding="utf-8")


def _text(token) -> str | None:
    return token["content"] if isinstance(token, dict) else token
