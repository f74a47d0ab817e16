"""The trajectory format: an agent episode in OpenAI's chat format, as a row of a file.

An assistant message is a step (one decision), unless it has `"step": false`. An assistant message whose content is a
list of text parts (mathematics) has one step per part. Everything indexed by step (`rewards`, `step_labels`, scores)
follows the order of `steps(messages)`.

A row in exactly this form is decoded at once. Any other is first brought into it: messages as SDKs write them, an
outcome that is true or false, an id that is an integer, labels by message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from data_pipeline import json_values
from data_pipeline.conversations.reading import labels_by_message, read_conversation
from data_pipeline.errors import DataError
from data_pipeline.source import count_texts, read_texts

Row = TypeVar("Row")


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A chat message; `content` may be null only if there are `tool_calls` or `reasoning_content`.

    `reasoning_content` is what the model thought before the content, if its API tells.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    step: bool = True
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        # msgspec turns a ValueError raised here into a ValidationError with the path of the field.
        if self.content is None and not self.tool_calls and not self.reasoning_content:
            raise ValueError(f"a message of role {self.role} has neither content nor tool_calls")
        for index, call in enumerate(self.tool_calls or ()):
            function = call.get("function")
            if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
                raise ValueError(f"tool call {index} names no function")
        # Called for its checks.
        text_parts(self.content)

    @property
    def is_step(self) -> bool:
        """Whether the message is a decision of the policy."""
        return self.role == "assistant" and self.step


class Trajectory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An episode. Training needs an `outcome` in [0, 1]; `rewards`, if present, replace it in the targets."""

    id: str
    messages: list[Message]
    environment: str | None = None
    task: str | None = None
    split: str | None = None
    tools: list[dict[str, Any]] | None = None
    outcome: float | None = None
    success: bool | None = None
    rewards: list[float] | None = None
    step_labels: list[float | None] | None = None
    ended: Literal["done", "max_rounds", "error"] | None = None
    policy: dict[str, Any] | None = None
    meta: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id is empty")
        if not self.messages:
            raise ValueError("messages is empty")
        if self.outcome is not None and not 0.0 <= self.outcome <= 1.0:
            raise ValueError(f"outcome {self.outcome} is outside [0, 1]")
        count = len(steps(self.messages))
        for field in ("rewards", "step_labels"):
            values = getattr(self, field)
            if values is not None and len(values) != count:
                raise ValueError(f"{field} has {len(values)} values, the messages have {count} steps")

    @property
    def task_id(self) -> str:
        """The task's name or, without one, a hash of the prompt: the messages before the first step."""
        if self.task is not None:
            return self.task
        decisions = steps(self.messages)
        prompt = self.messages[: decisions[0].message] if decisions else self.messages
        # With the tools: the same question with other tools is another task.
        return "prompt/" + hashlib.sha256(msgspec.json.encode([prompt, self.tools])).hexdigest()[:16]


class Step(NamedTuple):
    """Position of a step: the index of its message, and of its part if the content is a list of parts."""

    message: int
    part: int | None


def steps(messages: Sequence[Message]) -> list[Step]:
    """The steps of a conversation, in order."""
    table: list[Step] = []
    for index, message in enumerate(messages):
        if not message.is_step:
            continue
        if isinstance(message.content, list):
            table.extend(Step(index, part) for part in range(len(message.content)))
        else:
            table.append(Step(index, None))
    return table


def check_steps(messages: Sequence[Message], row: str) -> list[Step]:
    """The steps of a conversation. Raises DataError unless there is at least one, and a message before the first."""
    table = steps(messages)
    if not table:
        raise DataError(f"{row}: no assistant message is a step, so there is nothing to train on or to score")
    if table[0].message == 0:
        raise DataError(f"{row}: message 0 is a step; a state must come before the first step, as a user message")
    return table


def text_parts(content: str | list[dict[str, Any]] | None) -> list[str]:
    """The texts of a message's content. Raises ValueError if a part is not text."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not content:
        raise ValueError("content is an empty list of parts")
    for index, part in enumerate(content):
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str) or not part["text"]:
            raise ValueError(f'content part {index} is not {{"type": "text", "text": "..."}} with some text')
    return [part["text"] for part in content]


class Parsed(NamedTuple):
    """A trajectory, and for each message its index in the row, where one message may hold several results of tools."""

    trajectory: Trajectory
    origins: Sequence[int]


_decoder = msgspec.json.Decoder(Trajectory)


def parse_line(line: bytes | str, *, where: str) -> Trajectory:
    """Parses a row, in the form of a trajectory or as SDKs write it.

    Raises DataError("<where>: what is wrong - at `$.field`").
    """
    return parse_with_origins(line, where=where).trajectory


def parse_with_origins(line: bytes | str, *, where: str) -> Parsed:
    """As `parse_line`, with the row's own index of each message."""
    try:
        trajectory = _decoder.decode(line)
        return Parsed(trajectory, range(len(trajectory.messages)))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    try:
        return _from_row(json_values.decode(line))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _from_row(row: Any) -> Parsed:
    """The trajectory of a decoded row. Raises DataError without a place."""
    origins: Sequence[int] = ()
    if isinstance(row, dict):
        row = with_text_ids(row)
        if isinstance(row.get("outcome"), bool):
            row["outcome"] = float(row["outcome"])
        if isinstance(row.get("messages"), list):
            messages, origins = read_conversation(row["messages"])
            if isinstance(row.get("step_labels"), dict):
                row["step_labels"] = labels_by_message(row["step_labels"], messages, origins, "step_labels")
            row["messages"] = messages
        _check_finite(row)
    return Parsed(converted(row, Trajectory), origins)


def with_text_ids(row: dict[str, Any]) -> dict[str, Any]:
    """A decoded row without nulls, with `id` and `task` as texts where they are integers."""
    row = {key: value for key, value in row.items() if value is not None}
    for name in ("id", "task"):
        if isinstance(row.get(name), int) and not isinstance(row[name], bool):
            row[name] = str(row[name])
    return row


def converted(row: Any, kind: type[Row]) -> Row:
    """The row of this kind of a decoded one. Raises DataError without a place."""
    try:
        value: Any = msgspec.convert(row, kind)
        # Numbers that are not finite are null in JSON, and so they are here.
        result: Row = msgspec.structs.replace(value, meta=msgspec.json.decode(msgspec.json.encode(value.meta)))
    except msgspec.MsgspecError as error:
        raise DataError(str(error)) from None
    except RecursionError:  # msgspec bounds the depth of nesting by Python's own limit.
        raise DataError("nested too deeply") from None
    return result


def _check_finite(row: dict[str, Any]) -> None:
    for field in ("outcome", "rewards", "step_labels"):
        value = row.get(field)
        for index, number in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(number, float) and not math.isfinite(number):
                at = f"[{index}]" if isinstance(value, list) else ""
                raise DataError(f"{field}{at} is {number}; it must be a number - at `$.{field}{at}`")


def read(path: str | PathLike[str], *, skip_bad: bool | Callable[[DataError], None] = False) -> Iterator[Trajectory]:
    """The trajectories of a file in any form that `source.read_texts` reads.

    Args:
      skip_bad: False to raise the first bad row's DataError("path:line: ..."), True to leave bad rows out, or a
        function that is called with the error of each bad row, which is then left out.
    """
    for _, trajectory in read_numbered(path, skip_bad=skip_bad):
        yield trajectory


def read_numbered(
    path: str | PathLike[str],
    *,
    skip_bad: bool | Callable[[DataError], None] = False,
    parse: Callable[..., Any] = parse_line,
) -> Iterator[tuple[str, Any]]:
    """As `read`, as pairs of "path:line" and trajectory, or what else `parse` makes of a row."""
    for where, _, text, _ in read_texts(path):
        try:
            if isinstance(text, DataError):
                raise text
            trajectory = parse(text, where=where)
        except DataError as error:
            if not skip_bad:
                raise
            if callable(skip_bad):
                skip_bad(error)
            continue
        yield where, trajectory


def count_rows(path: str | PathLike[str]) -> int:
    """Number of rows. Raises DataError if the file cannot be read or is empty."""
    return count_texts(path)


def to_line(trajectory: Trajectory) -> str:
    """The trajectory as a line of JSON without its newline; fields with default values are left out."""
    return msgspec.json.encode(trajectory).decode()


def numbered(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of an open file that are not blank, as pairs of line number (from 1) and line."""
    return ((number, line) for number, line in enumerate(file, start=1) if line.strip())
