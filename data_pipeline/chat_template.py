"""A tokenizer's files, the choice of its chat template, and conversations rendered with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from data_pipeline.caching import ByteLRU
from data_pipeline.errors import DataError
from data_pipeline.trajectory import Message, text_parts

Messages = Sequence[Message | Mapping[str, Any]]
Tools = list[dict[str, Any]] | None

_MAX_RENDERING_BYTES = 64 << 20
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Llama's templates print today's date unless given one; a rendering must not depend on the day it is made.
DATE = "26 Jul 2024"
_CONSTANTS = {"date_string": DATE}


class FrozenMessage(NamedTuple):
    """A message as the template sees it, hashable: `extras` are its other fields as JSON."""

    role: str
    content: str | None
    extras: bytes

    def raw_text(self) -> str:
        """All text of the message that somebody else wrote."""
        return (self.content or "") + self.extras.decode()

    def visible_texts(self) -> list[tuple[str, ...]]:
        """What a faithful rendering holds, each in one of the forms given: the content, the names of called tools.

        Spaces around the content may be cut. Some templates print what a tool returned as a JSON string.
        """
        texts: list[tuple[str, ...]] = []
        if self.content:
            text = self.content.strip()
            texts.append((text, msgspec.json.encode(text).decode()[1:-1]) if self.role == "tool" else (text,))
        if self.extras:
            calls = msgspec.json.decode(self.extras).get("tool_calls", ())
            texts.extend((call.get("function", call).get("name", ""),) for call in calls)
        return texts

    def for_template(self) -> dict[str, Any]:
        """The dictionary the template is given. Arguments of tool calls, JSON text for OpenAI, become objects."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.extras:
            plain.update(msgspec.json.decode(self.extras))
            for call in plain.get("tool_calls", ()):
                function = call.get("function", call)
                if isinstance(function.get("arguments"), str):
                    function["arguments"] = msgspec.json.decode(function["arguments"])
        return plain


FrozenConversation = tuple[FrozenMessage, ...]


class ChatTemplate:
    """A compiled chat template.

    Rendering calls transformers' compiled template itself: `apply_chat_template` copies the whole conversation on every
    call, eight times the cost, and the text is the same.

    Args:
      template: Jinja source, or several by name, of which "default" is used.
      arguments: names the template may refer to, such as `bos_token`.
      source: the tokenizer's name in error messages.
      advice: what to do about a template that does not work, for the end of an error message.
    """

    def __init__(self, template: Any, arguments: Mapping[str, Any], *, source: str, advice: str = ""):
        self.text = default_template(template)
        self.source = source
        self._advice = advice
        self._arguments = {**arguments, **_CONSTANTS, "strftime_now": _no_date}
        try:
            self._compiled = _compile_jinja_template(self.text)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template of {source} is not valid Jinja: {one_line(error)}") from None
        self._cached = ByteLRU(self._render, size=_rendering_bytes, max_bytes=_MAX_RENDERING_BYTES)

    def render(self, messages: FrozenConversation, tools: Tools, generation: bool, row: str) -> str:
        """The conversation as text; with `generation`, up to where the next assistant message begins."""
        encoded = msgspec.json.encode(tools) if tools else b""
        try:
            return self._cached(messages, encoded, generation)
        except Exception as error:  # a template is somebody else's program
            raise DataError(
                f"{row}: the chat template of {self.source} fails {self._where(messages, encoded, generation)}: "
                f"{one_line(error)}{self._advice}"
            ) from None

    def _where(self, messages: FrozenConversation, tools: bytes, generation: bool) -> str:
        """Where rendering fails: at the message after the longest part of the conversation that can be rendered."""
        for count in range(len(messages) - (not generation), 0, -1):
            with suppress(Exception):
                self._cached(messages[:count], tools, False)
                at = f"message {count} ({messages[count].role})" if count < len(messages) else "the reply to come"
                return f"at {at}"
        return f"at message 0 ({messages[0].role})" if messages else "without messages"

    def _render(self, messages: FrozenConversation, tools: bytes, generation: bool) -> str:
        return self._compiled.render(
            messages=[message.for_template() for message in messages],
            tools=msgspec.json.decode(tools) if tools else None,
            documents=None,
            add_generation_prompt=generation,
            **self._arguments,
        )


def _rendering_bytes(arguments: tuple[FrozenConversation, bytes, bool], text: str) -> int:
    """The text, and about as much for the messages that it was made of."""
    messages, tools, _ = arguments
    return 2 * sys.getsizeof(text) + len(tools) + 256 * (1 + len(messages))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja; other files and code are left alone."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{directory}: not a tokenizer directory, there is no tokenizer.json in it")
    config = read_tokenizer_config(directory)
    named = {name: _token_text(config[name]) for name in _TOKEN_NAMES if config.get(name)}
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **named)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise DataError(f"{file}: cannot be read: {one_line(error)}") from None
    template = directory / "chat_template.jinja"
    tokenizer.chat_template = (
        template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    )
    return tokenizer


def as_messages(messages: Messages, row: str) -> list[Message]:
    """Messages given as dictionaries, checked; DataError names `row` and the message."""
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Message):
            try:
                message = msgspec.convert(message, Message)
            except msgspec.ValidationError as error:
                raise DataError(f"{row}: message {index}: {error}") from None
        checked.append(message)
    return checked


def freeze(message: Message) -> FrozenMessage:
    """Parts are joined: a step that is one part of a message is text of that message."""
    content = message.content
    if isinstance(content, list):
        content = "".join(text_parts(content))
    others = {name: getattr(message, name) for name in ("tool_calls", "name", "tool_call_id")}
    others = {name: value for name, value in others.items() if value is not None}
    return FrozenMessage(message.role, content, msgspec.json.encode(others) if others else b"")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _no_date(form: str) -> str:
    raise DataError("it prints today's date, and a rendering must not depend on the day it is made")


def default_template(template: Any) -> str:
    """The one that is used of a tokenizer's template, or templates by name."""
    if isinstance(template, str):
        return template
    named = template if isinstance(template, Mapping) else {entry["name"]: entry["template"] for entry in template}
    return named["default"]


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory; nothing where there is none."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None


OWN = "own"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


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


def choose_template(tokenizer: PreTrainedTokenizerFast, template: str | PathLike[str] | None, *, source: str) -> None:
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
