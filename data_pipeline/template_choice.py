"""Which chat template a tokenizer is used with: its own, one that ships with the package, or a user's file.

The stock templates of some models rewrite earlier turns, or print the date. Those that ship keep every rendering a
prefix of the next.
"""

from __future__ import annotations

import json
import shutil
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from data_pipeline.chat_template import read_tokenizer_config
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
# For tokenizers that name no padding: tokens that Llama 3 and Qwen keep for it, or for nothing.
_PADDING = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>")


def choose(tokenizer: PreTrainedTokenizerFast, template: str | PathLike[str] | None, *, source: str) -> None:
    """Gives a tokenizer the template `template`: None or "own", the name of a shipped one, or a file.

    A shipped template also says which token ends a message. A tokenizer without a pad_token gets one that its model
    never writes, if it has any.

    Raises DataError for a template that is not there, or that needs special tokens which the tokenizer has not.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if template is not None and str(template) in SHIPPED:
        shipped = SHIPPED[str(template)]
        if missing := [token for token in shipped.tokens if token not in special]:
            raise DataError(f"{source}: template {template} needs the special token {missing[0]}, which is not there")
        path = resources.files("data_pipeline") / "templates" / f"{template}.jinja"
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.eos_token = shipped.end
    elif template is not None and str(template) != OWN:
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise DataError(
                f"template {template}: cannot be read ({reason}); name a file, or one of {', '.join([OWN, *SHIPPED])}"
            ) from None
    if tokenizer.pad_token is None:
        free = [token for token in _PADDING if token in special and token != tokenizer.eos_token]
        tokenizer.pad_token = free[0] if free else None


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, template: str, base: Path, directory: Path) -> None:
    """Copies the tokenizer's files from `base` to `directory`, with the template and the tokens it is used with.

    template: the text that was rendered with.
    """
    for name in FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    config = read_tokenizer_config(base)
    changed = {
        name: getattr(tokenizer, name)
        for name in ("eos_token", "pad_token")
        if _text(config.get(name)) != getattr(tokenizer, name)
    }
    own = base / "chat_template.jinja"
    own_text = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if own_text == template and not changed:
        return
    config.pop("chat_template", None)  # readers differ in which of the two places they look at first
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    described = json.dumps(config | changed, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(described, encoding="utf-8")


def _text(token) -> str | None:
    return token["content"] if isinstance(token, dict) else token
