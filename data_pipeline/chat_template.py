"""Chat templates: choosing one, rendering conversations with it, and the files of its tokenizer."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from transformers import PreTrainedTokenizerFast

from data_pipeline import template_sandbox, typed_json
from data_pipeline.caching import ByteLRU
from data_pipeline.conversations.reading import read_conversation
from data_pipeline.conversations.tool_calls import arguments_object
from data_pipeline.errors import DataError, one_line
from data_pipeline.template_sandbox import TemplateLimitError
from data_pipeline.trajectory import Message, text_parts

Messages = Sequence[Message | Mapping[str, Any]]
Tools = list[dict[str, Any]] | None

_MAX_RENDERING_BYTES = 64 << 20
# Conversations on which a template may exceed its bounds, before it is used for no more.
_MAX_EXCEEDED = 3
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Llama's templates print today's date unless one is passed. A rendering must not depend on the day.
DATE = "26 Jul 2024"
_CONSTANTS = {"date_string": DATE}
OWN = "own"
# All that readers of a tokenizer may look for. This package reads only the first three.
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
    """The special tokens of a shipped template, and the one among them that ends a message."""

    tokens: tuple[str, ...]
    end: str


SHIPPED = {
    "chatml": Shipped(("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Shipped(("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}


class _Token(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    """The fields of tokenizer_config.json that are read; files have others."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    unk_token: str | _Token | None = None
    sep_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    cls_token: str | _Token | None = None
    mask_token: str | _Token | None = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None


class FrozenMessage(NamedTuple):
    """A hashable message for the template. `extras` holds its other fields as JSON."""

    role: str
    content: str | None
    extras: bytes

    def for_template(self, reasoning: str = "reasoning_content") -> dict[str, Any]:
        """The message as the template takes it, with what the model thought under the name `reasoning`.

        Arguments of tool calls, JSON text for OpenAI, become objects. Text that is not the JSON of an object stays.
        """
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.extras:
            plain.update(msgspec.json.decode(self.extras))
            if reasoning != "reasoning_content" and "reasoning_content" in plain:
                plain[reasoning] = plain.pop("reasoning_content")
            for call in plain.get("tool_calls", ()):
                function = call.get("function", call)
                if isinstance(function.get("arguments"), str):
                    parsed = arguments_object(function["arguments"])
                    function["arguments"] = function["arguments"] if parsed is None else parsed
        return plain


FrozenConversation = tuple[FrozenMessage, ...]


class ChatTemplate:
    """A compiled chat template.

    Args:
      template: Jinja source, or several by name, of which "default" is used.
      arguments: variables of the template, such as `bos_token`.
      source: name of the tokenizer in error messages.
      advice: end of error messages: how to choose another template.

    Raises:
      DataError: the template is not valid Jinja.
    """

    def __init__(self, template: Any, arguments: Mapping[str, Any], *, source: str, advice: str = ""):
        self.text = default_template(template)
        self.source = source
        self._advice = advice
        # Templates call it differently; one that knows several names would print it twice.
        names = ("reasoning_content", "reasoning", "thinking")
        printed = [name for name in names if re.search(rf"\b{name}\b", self.text)]
        self.reasoning, self.prints_reasoning = (printed or names)[0], bool(printed)
        # `strftime_now` is how newer templates get the date.
        self._arguments = {**arguments, **_CONSTANTS, "strftime_now": _no_date}
        try:
            # `apply_chat_template` copies the conversation on every call: the same text at eight times the cost.
            self._compiled = template_sandbox.compile_template(self.text)
        except Exception as error:  # Also RecursionError, SyntaxError and others: the text may be anything.
            raise DataError(f"the chat template of {source} is not valid Jinja: {one_line(error)}") from None
        self._exceeded = 0
        self.bound_cache(_MAX_RENDERING_BYTES)

    def render(self, messages: FrozenConversation, tools: Tools, generation: bool, row: str) -> str:
        """The conversation as text; with `generation`, including the opening of the next assistant message.

        Raises DataError that names `row`, and the message at which the template fails.
        """
        encoded = msgspec.json.encode(tools) if tools else b""
        try:
            # Each costs seconds.
            if self._exceeded >= _MAX_EXCEEDED:
                raise TemplateLimitError(f"it exceeded its bounds on {self._exceeded} conversations already")
            return self._cached(messages, encoded, generation)
        except TemplateLimitError as error:
            self._exceeded = min(self._exceeded + 1, _MAX_EXCEEDED)
            raise DataError(
                f"{row}: the chat template of {self.source} exceeds a bound: {one_line(error)}{self._advice}"
            ) from None
        except Exception as error:  # Jinja and the template itself may raise anything.
            raise DataError(
                f"{row}: the chat template of {self.source} fails {self._where(messages, encoded, generation)}: "
                f"{one_line(error)}{self._advice}"
            ) from None

    def try_render(self, messages: list[dict[str, Any]], tools: Tools) -> str | None:
        """The rendering of messages as the template takes them; None if it fails."""
        # Cached: with markers in place of their texts, the candidates of a state are the same.
        return self._tried(msgspec.json.encode(messages), msgspec.json.encode(tools) if tools else b"")

    def _try_render(self, messages: bytes, tools: bytes) -> str | None:
        try:
            return self._rendered(msgspec.json.decode(messages), msgspec.json.decode(tools) if tools else None)
        except Exception:  # Jinja and the template itself may raise anything.
            return None

    def forget(self) -> None:
        """Drops the renderings that are kept in memory."""
        self._cached.clear()
        self._tried.clear()

    def bound_cache(self, max_bytes: int) -> None:
        """Drops the renderings, and keeps fewer or more of them from now on."""
        self._cached = ByteLRU(self._render, size=_rendering_bytes, max_bytes=max_bytes)
        self._tried = ByteLRU(self._try_render, size=_tried_bytes, max_bytes=max_bytes)

    def _where(self, messages: FrozenConversation, tools: bytes, generation: bool) -> str:
        """The place where rendering fails: after the longest beginning of the conversation that can be rendered."""
        for count in range(len(messages) - (not generation), 0, -1):
            with suppress(Exception):
                self._cached(messages[:count], tools, False)
                at = f"message {count} ({messages[count].role})" if count < len(messages) else "the reply to come"
                return f"at {at}"
        return f"at message 0 ({messages[0].role})" if messages else "without messages"

    def _render(self, messages: FrozenConversation, tools: bytes, generation: bool) -> str:
        plain = [message.for_template(self.reasoning) for message in messages]
        return self._rendered(plain, msgspec.json.decode(tools) if tools else None, generation)

    def _rendered(self, messages: list[dict[str, Any]], tools: Tools, generation: bool = False) -> str:
        return template_sandbox.render(
            self._compiled,
            {
                "messages": messages,
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": generation,
                **self._arguments,
            },
        )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a directory; never runs its code."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{directory}: not a tokenizer directory, tokenizer.json is missing")
    config = read_tokenizer_config(directory)
    # Not AutoTokenizer: only these three files decide the result, and no code of the directory is run.
    named = {name: _token_text(config[name]) for name in _TOKEN_NAMES if config.get(name)}
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **named)
    except BaseException as error:  # The tokenizers library raises no narrower class.
        # A panic of its Rust code is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{file}: cannot be read: {one_line(error)[:300]}") from None
    # The separate file has priority, as in transformers.
    own = _own_template(directory)
    tokenizer.chat_template = config.get("chat_template") if own is None else own
    return tokenizer


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory; empty if it is missing.

    Raises DataError if it is malformed, or if a field that this package reads has another type.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    fix = "copy or download the tokenizer's files again"
    config = typed_json.read(file, dict[str, Any], fix=fix)
    typed_json.convert(config, _TokenizerConfig, where=str(file), fix=fix)
    return config


def _own_template(directory: Path) -> str | None:
    """chat_template.jinja of a directory, None if it is missing. Raises DataError if it is not UTF-8."""
    file = directory / "chat_template.jinja"
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None


def write_tokenizer(template: str, end: str, base: Path, directory: Path) -> None:
    """Copies a tokenizer's files from `base` to `directory`, with the template and the end token it is used with.

    Files are copied unchanged if both are the tokenizer's own.
    """
    for name in FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    config = read_tokenizer_config(base)
    own_text = _own_template(base) or config.get("chat_template")
    token = config.get("eos_token")
    is_own = own_text is not None and default_template(own_text) == template
    if not is_own or (token and _token_text(token)) != end:
        # Readers differ in which of the two places they prefer, so only one keeps a template.
        config.pop("chat_template", None)
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        described = json.dumps(config | {"eos_token": end}, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(described, encoding="utf-8")


def read_template(template: str | PathLike[str] | None) -> str | None:
    """Source of a shipped template by its name, or of a file; None for the tokenizer's own (None or "own").

    Raises DataError if there is no such template.
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


def fingerprint_text(template: str) -> str:
    """The text of a template that its fingerprint is computed from.

    The shipped templates print reasoning and names since, and everything else as before: shards and models of the
    earlier ones stay valid.
    """
    for name in SHIPPED:
        if template == read_template(name):
            folder = resources.files("data_pipeline") / "templates" / "fingerprints"
            return (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return template


def choose_template(tokenizer: PreTrainedTokenizerFast, template: str | PathLike[str] | None, *, source: str) -> None:
    """Sets the template of a tokenizer: None or "own", the name of a shipped one, or a file.

    A shipped template also sets the token that ends a message.

    Raises DataError if the template is missing, or needs special tokens that the tokenizer lacks.
    """
    text = read_template(template)
    if text is None:
        return
    tokenizer.chat_template = text
    # A file may be of any format: it is used with the end token that the tokenizer has.
    shipped = SHIPPED.get(str(template))
    if shipped is not None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if missing := [token for token in shipped.tokens if token not in special]:
            raise DataError(f"{source}: template {template} needs the special token {missing[0]}, which is missing")
        tokenizer.eos_token = shipped.end


def default_template(template: Any) -> str:
    """The template of a tokenizer; of several by name, the default one."""
    if isinstance(template, str):
        return template
    named = template if isinstance(template, Mapping) else {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise DataError(f"none of the chat templates {', '.join(map(repr, named))} is named 'default'; name one so")
    return named["default"]


def advice(special: Collection[str]) -> str:
    """End of error messages about a template: which other templates fit a tokenizer with these special tokens."""
    fitting = [name for name, shipped in SHIPPED.items() if set(shipped.tokens) <= set(special)]
    choice = " or ".join([*fitting, "FILE"])
    return f"; choose one that prints every message as it is with --chat-template {choice} (docs/your-trajectories.md)"


def as_messages(messages: Messages, row: str) -> list[Message]:
    """Messages of a conversation, parsed where they are dictionaries, in any form that `read_conversation` reads.

    Raises DataError that names `row` and the message.
    """
    return as_conversation(messages, row)[0]


def as_conversation(messages: Messages, row: str) -> tuple[list[Message], list[int]]:
    """As `as_messages`, and for each message the index of the one it comes from."""
    try:
        checked = [
            message if isinstance(message, Message) else msgspec.convert(message, Message) for message in messages
        ]
        return checked, list(range(len(checked)))
    except msgspec.ValidationError:
        pass
    try:
        plain, origins = read_conversation([_plain(message) for message in messages])
        return msgspec.convert(plain, list[Message]), origins
    except DataError as error:
        raise DataError(f"{row}: {error}") from None
    except msgspec.ValidationError as error:
        raise DataError(f"{row}: messages: {error}") from None


def _plain(message: Message | Mapping[str, Any]) -> Any:
    if isinstance(message, Message):
        return msgspec.to_builtins(message)
    return dict(message) if isinstance(message, Mapping) else message


def freeze(message: Message, *, reasoning: bool = True) -> FrozenMessage:
    """The message in hashable form, with or without its reasoning; parts of its content are joined to a text."""
    content = message.content
    if isinstance(content, list):
        content = "".join(text_parts(content))
    others = {name: getattr(message, name) for name in ("tool_calls", "name", "tool_call_id", "reasoning_content")}
    others = {name: value for name, value in others.items() if value is not None}
    if not reasoning and others.pop("reasoning_content", None) is not None and content is None:
        content = ""
    return FrozenMessage(message.role, content, msgspec.json.encode(others) if others else b"")


def _rendering_bytes(arguments: tuple[FrozenConversation, bytes, bool], text: str) -> int:
    # The messages that a text was rendered from take about as much as the text.
    messages, tools, _ = arguments
    return 2 * sys.getsizeof(text) + len(tools) + 256 * (1 + len(messages))


def _tried_bytes(arguments: tuple[bytes, bytes], text: str | None) -> int:
    return sum(map(len, arguments)) + sys.getsizeof(text) + 256


def _no_date(form: str) -> str:
    raise DataError("it prints today's date, and a rendering must not depend on the day")


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
