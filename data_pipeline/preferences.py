"""Preference pairs: a state, the better action in it, and worse ones, as a line of JSON Lines (docs/formats.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import msgspec

from data_pipeline import json_values
from data_pipeline.conversations.reading import read_conversation
from data_pipeline.errors import DataError
from data_pipeline.source import read_texts
from data_pipeline.trajectory import (
    Message,
    Trajectory,
    converted,
    parse_line,
    read_numbered,
    text_parts,
    with_text_ids,
)


class Preference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A state and actions in it: `chosen` is better than each of `rejected`. An action is one step."""

    id: str
    messages: list[Message]
    chosen: Message
    rejected: list[Message] | Message
    environment: str | None = None
    task: str | None = None
    split: str | None = None
    tools: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id is empty")
        if not self.messages:
            raise ValueError("messages is empty")
        if not self.worse:
            raise ValueError("rejected is empty")
        for name, action in (("chosen", self.chosen), *(("rejected", action) for action in self.worse)):
            if not action.is_step:
                raise ValueError(f"{name} is a message of role {action.role} that is no step")

    @property
    def worse(self) -> list[Message]:
        """The rejected actions; a single message is a list of one."""
        return [self.rejected] if isinstance(self.rejected, Message) else self.rejected

    @property
    def actions(self) -> list[Message]:
        """The chosen action, then the rejected ones; text parts are joined."""
        return [_joined(action) for action in (self.chosen, *self.worse)]

    @property
    def state(self) -> list[Message]:
        """The messages before the actions. None of them is a step: only the actions are compared."""
        return [
            msgspec.structs.replace(message, step=False) if message.is_step else message for message in self.messages
        ]

    @property
    def task_id(self) -> str:
        """The task's name or, without one, a hash of the state."""
        if self.task is not None:
            return self.task
        return "prompt/" + hashlib.sha256(msgspec.json.encode([self.messages, self.tools])).hexdigest()[:16]


class _Probe(msgspec.Struct):
    chosen: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decoder, _probe = msgspec.json.Decoder(Preference), msgspec.json.Decoder(_Probe)


def parse_preference(line: bytes | str, *, where: str) -> Preference:
    """Parses a line of JSON, in the form of a preference or with messages as SDKs write them.

    Raises DataError("<where>: what is wrong - at `$.field`").
    """
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    try:
        return _from_row(json_values.decode(line))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _from_row(row: Any) -> Preference:
    """The preference of a decoded row. Raises DataError without a place."""
    if isinstance(row, dict):
        row = with_text_ids(row)
        if isinstance(row.get("messages"), list):
            row["messages"] = read_conversation(row["messages"]).messages
        for name in ("chosen", "rejected"):
            value = row.get(name)
            if isinstance(value, list) and name == "rejected":
                row[name] = [_action(action, f"{name}[{index}]") for index, action in enumerate(value)]
            elif isinstance(value, dict):
                row[name] = _action(value, name)
    return converted(row, Preference)


def _action(value: Any, name: str) -> dict[str, Any]:
    try:
        messages = read_conversation([value]).messages
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if len(messages) != 1:
        raise DataError(f"{name} is not one message but {len(messages)}")
    return messages[0]


def is_preference(line: bytes) -> bool:
    """Whether a line of JSON is an object with a field `chosen`."""
    if b'"chosen"' not in line:
        return False
    try:
        return _probe.decode(line).chosen is not msgspec.UNSET
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    try:
        row = json_values.decode(line)  # with NaN, or half a surrogate pair
    except DataError:
        return False
    return isinstance(row, dict) and "chosen" in row


def parse_row(line: bytes, *, where: str) -> Trajectory | Preference:
    """A line of JSON as a preference if it has `chosen`, else as a trajectory. Raises DataError for a bad one."""
    return parse_preference(line, where=where) if is_preference(line) else parse_line(line, where=where)


def read_rows(
    path: str | PathLike[str], *, skip_bad: bool | Callable[[DataError], None] = False
) -> Iterator[tuple[str, Trajectory | Preference]]:
    """The rows of a file, trajectories and preferences, as pairs of "path:line" and row.

    skip_bad: as for `trajectory.read`.
    """
    return read_numbered(path, skip_bad=skip_bad, parse=parse_row)


def holds_preferences(path: str | PathLike[str]) -> bool:
    """Whether a row of a file is a preference. Raises DataError if the file cannot be read."""
    return any(isinstance(text, bytes) and is_preference(text) for _, _, text, _ in read_texts(path))


def to_line(row: Trajectory | Preference) -> str:
    """The row as a line of JSON without its newline; fields with default values are left out."""
    return msgspec.json.encode(row).decode()


def _joined(action: Message) -> Message:
    if not isinstance(action.content, list):
        return action
    return msgspec.structs.replace(action, content="".join(text_parts(action.content)))
