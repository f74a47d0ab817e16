"""Conversations to token ids and the step table: the only encoder, for training, sampling and scoring.

The text is the truth: a conversation is rendered with the tokenizer's chat template, and the rendering is encoded. What
training relies on is verified for every trajectory, never assumed; see `Encoder.trajectory`.

A tokenizer encodes what lies between two special tokens independently of the rest. So a rendering is cut at its special
tokens, every piece is encoded once and remembered, and a conversation that grows, or many that share turns, cost only
what is new.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from data_pipeline.caching import ByteLRU
from data_pipeline.chat_template import (
    OWN,
    ChatTemplate,
    FrozenConversation,
    Messages,
    Tools,
    advice,
    as_messages,
    choose_template,
    freeze,
    load_tokenizer,
    write_tokenizer,
)
from data_pipeline.errors import DataError
from data_pipeline.packing import padding_id
from data_pipeline.trajectory import Message, check_steps, text_parts

_MAX_PIECE_BYTES = 64 << 20


class Encoded(NamedTuple):
    """A trajectory's tokens int32[T] and its step table, int32[S] each.

    `read_positions[i]` is the last token of the rendering that ends with step i, `state_positions[i]` the last token of
    the state before it, `action_starts[i]` the first token after the state, `message_indices[i]` the step's message.
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
    plain: list[str]


class Encoder:
    """Encodes conversations with one tokenizer and its chat template.

    Args:
      tokenizer: a fast tokenizer with a chat template and an end-of-sequence token. `pad_id` is its pad token, or
        another special token where it has none or where that one ends messages.
      source: what to call it in error messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, source: str = "the tokenizer"):
        if not tokenizer.chat_template:
            raise DataError(f"{source} has no chat template; add chat_template.jinja beside tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError(f"{source} needs a pad_token and an eos_token; set both in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.source = source
        self.end_id: int = tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._piece = ByteLRU(self._encode_piece, size=_piece_bytes, max_bytes=_MAX_PIECE_BYTES)
        self._prepare_specials()
        self._advice = advice(self._special_ids)
        self._template = ChatTemplate(
            tokenizer.chat_template, tokenizer.special_tokens_map, source=source, advice=self._advice
        )
        self.pad_id = self._padding()
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        self._fingerprint = hashlib.sha256(f"{canonical}\0{self._template.text}".encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | PathLike[str], template: str | PathLike[str] | None = None) -> Encoder:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a directory, and nothing else.

        template: the chat template to use in place of the directory's own: the name of one that ships with the package
        (chat_template.SHIPPED) or a file; None or "own" for its own.
        """
        tokenizer = load_tokenizer(Path(directory))
        choose_template(tokenizer, template, source=str(directory))
        named = "" if template in (None, OWN) else f" (template {template})"
        return cls(tokenizer, source=f"{directory}{named}")

    def write_tokenizer(self, base: Path, directory: Path) -> None:
        """Writes the tokenizer's files, read from `base`, with the template and the tokens that this encoder uses."""
        write_tokenizer(self.template, self.tokenizer.eos_token, base, directory)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to: they open, close or pad messages."""
        return frozenset(self._special_ids.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json and the chat template; saving and loading do not change it."""
        return self._fingerprint

    @property
    def template(self) -> str:
        """The chat template, the default one where the tokenizer has several."""
        return self._template.text

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokenizer)

    def render(self, messages: Messages, *, tools: Tools = None, generation: bool = False) -> str:
        """The conversation as text; with `generation`, up to where the next assistant message begins."""
        conversation = self._conversation(as_messages(messages, "conversation"), "conversation")
        return self._template.render(conversation, tools, generation, "conversation")

    def prompt(self, messages: Messages, *, tools: Tools = None, row: str = "prompt") -> list[int]:
        """Token ids of the state before the next assistant message.

        Raises DataError for a special token in the text of a message, and where the template fails.
        """
        conversation = self._conversation(as_messages(messages, row), row)
        return self._cut(self._template.render(conversation, tools, True, row)).ids

    def rendered(self, text: str) -> list[int]:
        """Token ids of a conversation that is text already: special tokens are read out of it, and none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included, nothing cleaned up."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def special_in(self, text: str) -> str | None:
        """The first special token that `text` spells out, or None. Such a text cannot be the content of a message."""
        found = self._specials.search(text)
        return found.group() if found else None

    def trajectory(self, messages: Messages, *, row: str, tools: Tools = None) -> Encoded:
        """Tokens and step table of a conversation, verified.

        Verified is, and otherwise DataError names row, template and message: the rendering up to every step is a prefix
        of the whole, in text and in tokens; the ids are the tokenizer's own for the whole text and decode to it; every
        message is in the text as it was given, and no special token was read out of it; every step has a read position
        of its own. The steps of a list of parts are read at the last token of their part, the last of them at the end
        of the message.
        """
        messages = as_messages(messages, row)
        table = check_steps(messages, row)
        conversation = self._conversation(messages, row)
        whole = self._cut(self._template.render(conversation, tools, False, row))
        self._verify_text(whole, conversation, row)
        self._verify_tools(whole, conversation, tools, row)
        reads: list[int] = []
        states: list[int] = []
        for index in dict.fromkeys(step.message for step in table):
            before = self._state_position(whole, conversation[:index], tools, row)
            ends = self._read_positions(whole, conversation[: index + 1], messages[index], tools, row)
            starts = [before, *ends[:-1]]
            reads.extend(ends)
            states.extend(starts)
            if any(end <= start for start, end in zip(starts, ends, strict=True)):
                raise DataError(f"{row}: a step of message {index} adds no token; every step needs one of its own")
        state_positions = np.asarray(states, np.int32)
        return Encoded(
            tokens=np.asarray(whole.ids, np.int32),
            read_positions=np.asarray(reads, np.int32),
            state_positions=state_positions,
            action_starts=state_positions + 1,
            message_indices=np.asarray([step.message for step in table], np.int32),
        )

    def _state_position(self, whole: _Pieces, before: FrozenConversation, tools: Tools, row: str) -> int:
        """Last token of the rendering that asks for the message after `before`, or of `before` if that is no prefix."""
        for generation in (True, False):
            rendering = self._template.render(before, tools, generation, row)
            position = self._position(whole, rendering)
            if position is not None:
                return position
        raise self._rewritten(whole, rendering, len(before) - 1, row)

    def _read_positions(
        self, whole: _Pieces, upto: FrozenConversation, message: Message, tools: Tools, row: str
    ) -> list[int]:
        """Where the steps of the last message of `upto` are read: at the ends of its parts, the last at its own end."""
        index = len(upto) - 1
        rendering = self._template.render(upto, tools, False, row)
        end = self._position(whole, rendering)
        if end is None:
            raise self._rewritten(whole, rendering, index, row)
        parts = text_parts(message.content) if isinstance(message.content, list) else []
        if len(parts) < 2:
            return [end]
        text = "".join(parts)
        at = rendering.rfind(text.strip()) - (len(text) - len(text.lstrip()))
        ends = []
        for number, part in enumerate(parts[:-1]):
            at += len(part)
            position = self._position(whole, rendering[:at])
            if position is None:
                raise DataError(
                    f"{row}: part {number} of message {index} ends inside a token ({part[-12:]!r}); "
                    "end every part with a newline"
                )
            ends.append(position)
        return [*ends, end]

    def _verify_text(self, whole: _Pieces, conversation: FrozenConversation, row: str) -> None:
        if self._backend.encode_batch_fast([whole.text], add_special_tokens=False)[0].ids != whole.ids:
            raise DataError(f"{row}: {self.source} encodes the conversation otherwise than its turns one by one")
        decoded = self.decode(whole.ids)
        if decoded != whole.text:
            raise DataError(f"{row}: decoding the token ids does not give the text: {_differ(whole.text, decoded)}")
        current = 0
        for index, message in enumerate(conversation):
            for forms in message.visible_texts():
                while current < len(whole.plain) and not any(form in whole.plain[current] for form in forms):
                    current += 1
                if current == len(whole.plain):
                    raise DataError(
                        f"{row}: the chat template of {self.source} changes, moves or drops message {index} "
                        f"({message.role}: {_short(forms[0])}){self._advice}"
                    )

    def _verify_tools(self, whole: _Pieces, conversation: FrozenConversation, tools: Tools, row: str) -> None:
        if tools and self._template.render(conversation, None, False, row) == whole.text:
            raise DataError(f"{row}: the chat template of {self.source} leaves out the tools{self._advice}")

    def _rewritten(self, whole: _Pieces, rendering: str, index: int, row: str) -> DataError:
        if whole.text.startswith(rendering):
            reason = f"the rendering up to message {index} ends inside a token of the whole"
        else:
            reason = f"the rendering up to message {index} is no prefix of the whole: {_differ(rendering, whole.text)}"
        return DataError(f"{row}: the chat template of {self.source} rewrites earlier turns; {reason}{self._advice}")

    def _position(self, whole: _Pieces, prefix: str) -> int | None:
        """Index of the last token of `prefix`, None where it is no prefix of the text in characters and in tokens."""
        if not whole.text.startswith(prefix):
            return None
        piece = bisect_right(whole.starts, len(prefix)) - 1
        start, offset = whole.starts[piece], whole.offsets[piece]
        if start == len(prefix):
            return offset - 1
        head = self._piece(prefix[start:], piece == 0)
        return offset + len(head) - 1 if whole.ids[offset : offset + len(head)] == list(head) else None

    def _cut(self, text: str) -> _Pieces:
        pieces = _Pieces(text, [], [0], [0], [])
        for number, part in enumerate(self._specials.split(text) if self._separable else [text]):
            if not part:
                continue
            if number % 2:  # the separators
                pieces.ids.append(self._special_ids[part])
            else:
                pieces.ids.extend(self._piece(part, not pieces.ids))
                pieces.plain.append(part)
            pieces.starts.append(pieces.starts[-1] + len(part))
            pieces.offsets.append(len(pieces.ids))
        return pieces

    def _encode_piece(self, text: str, first: bool) -> tuple[int, ...]:
        """Ids of a text between special tokens. Some tokenizers treat the start of a text unlike its inside."""
        if first:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        return tuple(self._backend.encode(self._anchor + text, add_special_tokens=False).ids[1:])

    def _padding(self) -> int:
        tokenizer, declared = self.tokenizer, self.tokenizer.pad_token_id
        used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        found = padding_id(self._special_ids, declared=declared, used=used, template=self._template.text)
        if found is None and declared is None:
            raise DataError(f"{self.source} needs a pad_token and an eos_token; set both in tokenizer_config.json")
        return declared if found is None else found

    def _prepare_specials(self) -> None:
        tokens = {id: token for id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = {token.content: id for id, token in tokens.items()}
        # longest first, as the tokenizer matches them
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._anchor = longest_first[0]
        # a token that takes in the spaces around it, or is looked for in normalized text, does not cut the text cleanly
        self._separable = not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized for token in tokens.values()
        )

    def _conversation(self, messages: Sequence[Message], row: str) -> FrozenConversation:
        conversation = tuple(map(freeze, messages))
        for index, message in enumerate(conversation):
            found = self.special_in(message.raw_text())
            if found:
                raise DataError(
                    f"{row}: message {index} ({message.role}) has the special token {found} in its text; "
                    "special tokens are never read out of text: remove or rewrite it"
                )
        return conversation


def _piece_bytes(arguments: tuple[str, bool], ids: tuple[int, ...]) -> int:
    """An integer of a tuple takes 36 bytes with its place."""
    return sys.getsizeof(arguments[0]) + 36 * len(ids) + 256


def _differ(one: str, other: str) -> str:
    """Where two texts part, with what follows there in each."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"at character {at}, {one[at : at + 20]!r} against {other[at : at + 20]!r}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:27] + "...")
