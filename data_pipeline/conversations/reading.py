"""The messages of a trajectory from those of an agent, wherever messages are accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.conversations import chat, responses
from data_pipeline.conversations.leftovers import Leftovers, Refusing
from data_pipeline.errors import DataError


class Conversation(NamedTuple):
    """Messages in the form of a trajectory. `origins` has, for each, the index of the entry it comes from."""

    messages: list[dict[str, Any]]
    origins: list[int]


def read_conversation(
    entries: Sequence[Any],
    leftovers: Leftovers | None = None,
    *,
    roles: Mapping[str, str] = chat.ROLES,
    join: bool = False,
) -> Conversation:
    """Messages of OpenAI's or Anthropic's API, or items of the Responses API, as messages of a trajectory.

    Args:
      leftovers: collects what has no place in a trajectory. Without it, such a field is an error.
      roles, join: as in chat.read_message.

    Raises DataError that names the message and what is wrong with it.
    """
    leftovers = Refusing() if leftovers is None else leftovers
    items = list(entries)
    firsts = list(range(len(items)))
    if responses.is_items(items):
        items, firsts = responses.to_messages(items)
    messages: list[dict[str, Any]] = []
    origins: list[int] = []
    for index, first in zip(range(len(items)), firsts, strict=True):
        read = chat.read_message(items[index], first, leftovers, roles=roles, join=join)
        messages += read
        origins += [first] * len(read)
    return Conversation(messages, origins)


def labels_by_message(
    value: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], origins: Sequence[int], name: str
) -> list[Any]:
    """Labels by step from an object of labels by the index of a message in the agent's own list.

    Raises DataError for a key that is not the index of a step.
    """
    labels: list[Any] = []
    steps = {}
    for message, origin in zip(messages, origins, strict=True):
        if message.get("role") == "assistant" and message.get("step", True):
            if isinstance(message.get("content"), list) and len(message["content"]) > 1:
                raise DataError(f"{name} is keyed by message, but a message holds several steps; give a list")
            steps[str(origin)] = len(labels)
            labels.append(None)
    for key, label in value.items():
        if key not in steps:
            raise DataError(
                f"{name} labels message {key!r:.40}, which is not a step; steps are messages [{', '.join(steps)}]"
            )
        labels[steps[key]] = label
    return labels
