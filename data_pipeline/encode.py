"""Conversations to token ids and their step table. Training, sampling and scoring all use this encoder.

A conversation is rendered as text with the tokenizer's chat template, and the text is encoded. Every property that
training relies on is verified for every trajectory; see `Encoder.trajectory`.

A tokenizer encodes the text between two special tokens independently of the text around them. So a rendering is cut at
its special tokens, and every piece is encoded once and cached: a conversation that grows, and conversations that share
turns, cost only their new pieces.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerFast

from data_pipeline.caching import ByteLRU
from data_pipeline.chat_template import (
    OWN,
    ChatTemplate,
    FrozenConversation,
    FrozenMessage,
    Messages,
    Tools,
    advice,
    as_messages,
    choose_template,
    fingerprint_text,
    freeze,
    load_tokenizer,
    write_tokenizer,
)
from data_pipeline.conversations.tools import read_tool
from data_pipeline.errors import DataError
from data_pipeline.packing import padding_id
from data_pipeline.special_text import SpecialText
from data_pipeline.template_checks import first_loss
from data_pipeline.trajectory import Message, check_steps, text_parts

_MAX_PIECE_BYTES = 64 << 20
Reasoning = Literal["keep", "drop"]
SpecialTokens = Literal["error", "break"]
_TOOL = {"type": "function", "function": {"name": "look", "description": ".", "parameters": {}}}
_PROBES: tuple[tuple[tuple[str, ...], Tools], ...] = (
    (("user", "assistant", "user"), None),
    (("system", "user", "assistant", "user"), None),
    (("user", "assistant", "tool"), [_TOOL]),
)


class Encoded(NamedTuple):
    """A trajectory's tokens, int32 [T], and its step table, int32 [S] each.

    `read_positions[i]` is the last token of the rendering that ends with step i, where its promise is read.
    `state_positions[i]` is the last token of the state before step i, `action_starts[i]` the first token after it, and
    `message_indices[i]` the message of the step.
    """

    tokens: np.ndarray
    read_positions: np.ndarray
    state_positions: np.ndarray
    action_starts: np.ndarray
    message_indices: np.ndarray


class _Pieces(NamedTuple):
    """A text cut at its special tokens: piece k is text[starts[k]:starts[k + 1]] and ids[offsets[k]:offsets[k + 1]]."""

    text: str
    ids: list[int]
    starts: list[int]
    offsets: list[int]


class Changes(NamedTuple):
    """Messages of a conversation that are encoded without their reasoning, or with special tokens broken up."""

    reasoning_dropped: int
    special_tokens_broken: int


class Encoder:
    """Encodes conversations with one tokenizer and its chat template.

    Args:
      reasoning: "keep" encodes what the model thought, "drop" leaves it out.
      special_tokens: "error" refuses text with special tokens, "break" writes a space into each.
      tokenizer: a fast tokenizer with a chat template and an end-of-sequence token. `pad_id` is its pad token or, if
        that is missing or also ends messages, another special token.
      source: name of the tokenizer in error messages.

    Raises:
      DataError: the tokenizer lacks one of these, or its template is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        source: str = "the tokenizer",
        reasoning: Reasoning = "keep",
        special_tokens: SpecialTokens = "error",
    ):
        if not tokenizer.chat_template:
            raise DataError(f"{source} has no chat template; add chat_template.jinja next to tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError(f"{source} needs a pad_token and an eos_token; set both in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.source, self.reasoning, self.special_tokens = source, reasoning, special_tokens
        self.end_id: int = tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        # tokenizer.json may switch truncation and padding on.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bound_pieces(_MAX_PIECE_BYTES)
        self._prepare_specials()
        self._advice = advice(self._special_ids)
        self._template = ChatTemplate(
            tokenizer.chat_template, tokenizer.special_tokens_map, source=source, advice=self._advice
        )
        self.pad_id = self._padding()
        # Sorted keys: saving and loading a tokenizer may reorder its JSON.
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        digest = hashlib.sha256(f"{canonical}\0{fingerprint_text(self._template.text)}".encode())
        self._fingerprints = {"keep": digest.hexdigest()}
        digest.update(b"\0reasoning=drop")
        self._fingerprints["drop"] = digest.hexdigest()

    @classmethod
    def load(
        cls,
        directory: str | PathLike[str],
        template: str | PathLike[str] | None = None,
        *,
        reasoning: Reasoning = "keep",
        special_tokens: SpecialTokens = "error",
    ) -> Encoder:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a directory, and no other file.

        Args:
          template: chat template to use: the name of a shipped one (chat_template.SHIPPED), a file, or None or "own"
            for the directory's own.
          reasoning, special_tokens: as in Encoder.

        Raises:
          DataError: a file is missing or malformed, or the template does not fit the tokenizer.
        """
        tokenizer = load_tokenizer(Path(directory))
        choose_template(tokenizer, template, source=str(directory))
        named = "" if template in (None, OWN) else f" (template {template})"
        return cls(tokenizer, source=f"{directory}{named}", reasoning=reasoning, special_tokens=special_tokens)

    def write_tokenizer(self, base: Path, directory: Path) -> None:
        """Copies the tokenizer's files from `base` to `directory`, with this encoder's template and end token."""
        write_tokenizer(self.template, self.tokenizer.eos_token, base, directory)

    @property
    def choices(self) -> dict[str, str]:
        """What this encoder does to messages, beyond the defaults: recorded with what is made of them."""
        choices = {"reasoning": self.reasoning, "special_tokens": self.special_tokens}
        return {name: value for name, value in choices.items() if value not in ("keep", "error")}

    def template_tools(self, tools: Tools, *, row: str) -> Tools:
        """The tools as the chat template takes them, after the choices of this encoder."""
        return self._tools(tools, row)

    def template_messages(self, messages: Messages, *, row: str) -> list[dict[str, Any]]:
        """The messages as the chat template takes them, after the choices of this encoder."""
        conversation = self._conversation(as_messages(messages, row), row)
        return [message.for_template(self._template.reasoning) for message in conversation]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which open, close or pad messages. The text of a message never encodes to them."""
        return frozenset(self._special_ids.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json, the chat template and whether reasoning is dropped. It survives saving."""
        return self.fingerprint_with(self.reasoning)

    def fingerprint_with(self, reasoning: str) -> str:
        """The fingerprint of this encoder with another choice of `reasoning`."""
        return self._fingerprints[reasoning]

    @property
    def prints_reasoning(self) -> bool:
        """Whether the chat template has a place for what the model thought."""
        return self._template.prints_reasoning

    @property
    def template(self) -> str:
        """Source of the chat template; of several, the default one."""
        return self._template.text

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.tokenizer)

    @functools.cached_property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token if the template begins every conversation with it, else None."""
        bos = self.tokenizer.bos_token
        if bos is None or not self.render([{"role": "user", "content": "x"}]).startswith(bos):
            return None
        return self.tokenizer.bos_token_id

    def render(self, messages: Messages, *, tools: Tools = None, generation: bool = False) -> str:
        """The conversation as text; with `generation`, including the opening of the next assistant message."""
        conversation = self._conversation(as_messages(messages, "conversation"), "conversation")
        return self._template.render(conversation, self._tools(tools, "conversation"), generation, "conversation")

    def prompt(self, messages: Messages, *, tools: Tools = None, row: str = "prompt") -> list[int]:
        """Token ids of the state before the next assistant message.

        Raises DataError if a message has a special token in its text, or if the template fails.
        """
        conversation = self._conversation(as_messages(messages, row), row)
        return self._cut(self._template.render(conversation, self._tools(tools, row), True, row)).ids

    def rendered(self, text: str) -> list[int]:
        """Token ids of a rendered conversation. Special tokens in the text are recognised, and none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def forget(self) -> None:
        """Drops the renderings and encoded texts that are kept in memory."""
        self._piece.clear()
        self._template.forget()

    def bound_caches(self, *, renderings: int, texts: int) -> None:
        """Empties both caches, and bounds them to so many bytes."""
        self._template.bound_cache(renderings)
        self._bound_pieces(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of token ids, with special tokens."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def special_in(self, text: str) -> str | None:
        """The first special token that `text` contains, or None. Such a text cannot be the content of a message."""
        return self._special_text.find(text)

    def changes(self, messages: Messages) -> Changes:
        """How many messages are encoded otherwise than they are, by the choices of this encoder."""
        checked = as_messages(messages, "conversation")
        dropped = [message for message in checked if message.reasoning_content] if self.reasoning == "drop" else []
        frozen = [freeze(message, reasoning=self.reasoning == "keep") for message in checked]
        return Changes(
            len(dropped), sum(self._special_text.find(message.for_template()) is not None for message in frozen)
        )

    def trajectory(self, messages: Messages, *, row: str, tools: Tools = None) -> Encoded:
        """Tokens and step table of a conversation, verified.

        The steps of a list of parts are read at the last token of their part, the last step at the end of the message.

        Raises:
          DataError: names row, template and message, if one of these does not hold:
            - the rendering up to every step is a prefix of the full rendering, in text and in tokens;
            - the ids are those of the tokenizer for the full text, and decode to it;
            - every text of a message (content, reasoning, name, calls) is in the rendering unchanged and in its place;
            - no text contains a special token;
            - every step has a read position different from the others.
        """
        messages = as_messages(messages, row)
        table = check_steps(messages, row)
        conversation, tools = self._conversation(messages, row), self._tools(tools, row)
        pieces = self._cut(self._template.render(conversation, tools, False, row))
        self._verify_text(pieces, conversation, tools, row)
        self._verify_tools(pieces, conversation, tools, row)
        reads: list[int] = []
        states: list[int] = []
        # Every message once, in order: its parts share a rendering.
        for index in dict.fromkeys(step.message for step in table):
            before = self._state_position(pieces, conversation[:index], tools, row)
            ends = self._read_positions(pieces, conversation[: index + 1], messages[index], tools, row)
            starts = [before, *ends[:-1]]
            reads.extend(ends)
            states.extend(starts)
            if any(end <= start for start, end in zip(starts, ends, strict=True)):
                raise DataError(f"{row}: a step of message {index} adds no token; every step needs at least one")
        state_positions = np.asarray(states, np.int32)
        return Encoded(
            tokens=np.asarray(pieces.ids, np.int32),
            read_positions=np.asarray(reads, np.int32),
            state_positions=state_positions,
            action_starts=state_positions + 1,
            message_indices=np.asarray([step.message for step in table], np.int32),
        )

    def _state_position(self, pieces: _Pieces, before: FrozenConversation, tools: Tools, row: str) -> int:
        """Last token of `before`, with the opening of the next message or, if that is no prefix, without it."""
        for generation in (True, False):
            rendering = self._template.render(before, tools, generation, row)
            position = self._position(pieces, rendering)
            if position is not None:
                return position
        raise self._rewritten(pieces, rendering, len(before) - 1, row)

    def _read_positions(
        self, pieces: _Pieces, upto: FrozenConversation, message: Message, tools: Tools, row: str
    ) -> list[int]:
        """Read positions of the last message's steps: the ends of its parts, and of the message for the last."""
        index = len(upto) - 1
        rendering = self._template.render(upto, tools, False, row)
        end = self._position(pieces, rendering)
        if end is None:
            raise self._rewritten(pieces, rendering, index, row)
        parts = text_parts(message.content) if isinstance(message.content, list) else []
        if len(parts) < 2:
            return [end]
        text = "".join(parts)
        # Templates may strip the spaces around a message, so the text is looked for without them.
        # The last occurrence: an earlier message may have the same text.
        at = rendering.rfind(text.strip()) - (len(text) - len(text.lstrip()))
        ends = []
        for number, part in enumerate(parts[:-1]):
            at += len(part)
            position = self._position(pieces, rendering[:at])
            if position is None:
                raise DataError(
                    f"{row}: part {number} of message {index} ends inside a token ({part[-12:]!r}); "
                    "end every part with a newline"
                )
            ends.append(position)
        return [*ends, end]

    def _verify_text(self, pieces: _Pieces, conversation: FrozenConversation, tools: Tools, row: str) -> None:
        # Cutting at special tokens is an assumption about the tokenizer, so its ids of the full text must be the same.
        if self._backend.encode_batch_fast([pieces.text], add_special_tokens=False)[0].ids != pieces.ids:
            raise DataError(f"{row}: {self.source} encodes the full conversation differently from its turns")
        decoded = self.decode(pieces.ids)
        if decoded != pieces.text:
            raise DataError(f"{row}: decoding the token ids does not give the text: {_differ(pieces.text, decoded)}")
        plain = [message.for_template(self._template.reasoning) for message in conversation]
        special = [match.span() for match in self._specials.finditer(pieces.text)]
        loss = first_loss(plain, pieces.text, lambda marked: self._template.try_render(marked, tools), special)
        if loss is not None:
            field, role = loss.field, conversation[loss.field.message].role
            what = "changes, moves or drops" if field.what == "content" else f"leaves out, or changes, {field.what} in"
            shown = f"{role}: {_short(field.forms[0])}"
            advice = self._advice
            if field.what == "the reasoning":
                advice = f"; leave it out with --reasoning drop, or {advice.removeprefix('; ')}"
            raise DataError(
                f"{row}: the chat template of {self.source} {what} message {field.message} ({shown}){advice}"
            )

    def _verify_tools(self, pieces: _Pieces, conversation: FrozenConversation, tools: Tools, row: str) -> None:
        if tools and self._template.render(conversation, None, False, row) == pieces.text:
            raise DataError(f"{row}: the chat template of {self.source} leaves out the tools{self._advice}")

    def _rewritten(self, pieces: _Pieces, rendering: str, index: int, row: str) -> DataError:
        if pieces.text.startswith(rendering):
            reason = f"the rendering up to message {index} ends inside a token of the full one"
        else:
            difference = _differ(rendering, pieces.text)
            reason = f"the rendering up to message {index} is no prefix of the full one: {difference}"
        return DataError(f"{row}: the chat template of {self.source} rewrites earlier turns; {reason}{self._advice}")

    def _position(self, pieces: _Pieces, prefix: str) -> int | None:
        """Index of the last token of `prefix`; None unless it is a prefix of the text, in characters and in tokens."""
        if not pieces.text.startswith(prefix):
            return None
        piece = bisect_right(pieces.starts, len(prefix)) - 1
        start, offset = pieces.starts[piece], pieces.offsets[piece]
        if start == len(prefix):
            return offset - 1
        # The prefix ends within a piece. Unless it encodes to that piece's first ids, a token reaches past its end.
        head = self._piece(prefix[start:], piece == 0)
        return offset + len(head) - 1 if pieces.ids[offset : offset + len(head)] == list(head) else None

    def _cut(self, text: str) -> _Pieces:
        pieces = _Pieces(text, [], [0], [0])
        for number, part in enumerate(self._specials.split(text) if self._separable else [text]):
            if not part:
                continue
            if number % 2:  # re.split puts the separators, here the special tokens, at odd indices.
                pieces.ids.append(self._special_ids[part])
            else:
                pieces.ids.extend(self._piece(part, not pieces.ids))
            pieces.starts.append(pieces.starts[-1] + len(part))
            pieces.offsets.append(len(pieces.ids))
        return pieces

    def _encode_piece(self, text: str, first: bool) -> tuple[int, ...]:
        """Ids of a text between special tokens."""
        # Some tokenizers treat the start of a text differently, so an inner piece is encoded after a special token.
        if first:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        return tuple(self._backend.encode(self._anchor + text, add_special_tokens=False).ids[1:])

    def _bound_pieces(self, max_bytes: int) -> None:
        self._piece = ByteLRU(self._encode_piece, size=_piece_bytes, max_bytes=max_bytes)

    def _padding(self) -> int:
        tokenizer, declared = self.tokenizer, self.tokenizer.pad_token_id
        used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id} | self._rendered_specials()
        free = padding_id(self._special_ids, declared=declared, used=used, template=self._template.text)
        if free is None and declared is None:
            raise DataError(f"{self.source} needs a pad_token and an eos_token; set both in tokenizer_config.json")
        return declared if free is None else free

    def _rendered_specials(self) -> set[int]:
        """Special tokens in renderings of short conversations: a template may put them together, '<|' + role + '|>'."""
        ids: set[int] = set()
        for roles, tools in _PROBES:
            conversation = tuple(freeze(Message(role=role, content=".")) for role in roles)
            # A template may refuse a role, an order or tools.
            with suppress(DataError):
                text = self._template.render(conversation, tools, True, "probe")
                ids.update(self._special_ids[token] for token in self._specials.findall(text))
        return ids

    def _prepare_specials(self) -> None:
        tokens = {id: token for id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = {token.content: id for id, token in tokens.items()}
        # Longest first, as the tokenizer matches them.
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._anchor = longest_first[0]
        self._special_text = SpecialText(self._special_ids)
        # Tokens that absorb the spaces around them, or match in normalized text, are no clean cuts.
        self._separable = not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized for token in tokens.values()
        )

    def _conversation(self, messages: Sequence[Message], row: str) -> FrozenConversation:
        conversation = [freeze(message, reasoning=self.reasoning == "keep") for message in messages]
        for index, message in enumerate(conversation):
            special = self._special_text.find(message.for_template() if message.extras else message.content)
            if special and self.special_tokens == "break":
                conversation[index] = message = self._broken(message)
                special = self._special_text.find(message.for_template())
            if special:
                raise DataError(
                    f"{row}: message {index} ({message.role}) has the special token {special} in its text; remove or "
                    "rewrite it, or break it up with --special-tokens break, because text must not encode to special "
                    "tokens"
                )
        return tuple(conversation)

    def _broken(self, message: FrozenMessage) -> FrozenMessage:
        extras = message.extras and msgspec.json.encode(self._special_text.broken(msgspec.json.decode(message.extras)))
        return FrozenMessage(message.role, self._special_text.broken(message.content), extras)

    def _tools(self, tools: Tools, row: str) -> Tools:
        """The tools as the template takes them, without special tokens in their descriptions."""
        # Anthropic's form; others are passed on as they are, as in training.
        if tools and any("input_schema" in tool for tool in tools):
            tools = [read_tool(tool, f"{row}: tools[{index}]") for index, tool in enumerate(tools)]
        if not tools or not (special := self._special_text.find(tools)):
            return tools
        if self.special_tokens == "break":
            return self._special_text.broken(tools)
        raise DataError(
            f"{row}: a tool has the special token {special} in its description; rewrite it, or break it up with "
            "--special-tokens break"
        )


def _piece_bytes(arguments: tuple[str, bool], ids: tuple[int, ...]) -> int:
    # An integer in a tuple takes 36 bytes, its slot included.
    return sys.getsizeof(arguments[0]) + 36 * len(ids) + 256


def _differ(left: str, right: str) -> str:
    """The first difference of two texts, as text."""
    at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return f"at character {at}, {left[at : at + 20]!r} against {right[at : at + 20]!r}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:27] + "...")
