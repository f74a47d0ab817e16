"""Step labels of a row: by step, by message, or as the first wrong step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.conversations.kinds import kind_of
from data_pipeline.conversations.reading import labels_by_message
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Parsed


def step_labels(value: Any, parsed: Parsed, name: str) -> list[float | None]:
    """One label or None for each step.

    Args:
      value: a list of them; an object from the index of a message, in the row's own list, to its label; or the index of
        the first wrong step, counting steps from 0, and -1 for none. Steps after it get no label.

    Raises DataError that begins with `name` for any other value.
    """
    count = _steps(parsed.messages)
    if isinstance(value, Mapping):
        value = labels_by_message(value, parsed.messages, parsed.origins, name)
    if is_first_error(value):
        if not -1 <= value < count:
            raise DataError(f"{name} = {value}: a first wrong step is in [0, {count - 1}], or -1 for none")
        return [1.0] * count if value < 0 else [*[1.0] * value, 0.0, *[None] * (count - value - 1)]
    if not isinstance(value, list):
        raise DataError(
            f"{name} is {kind_of(value)}; give a list with a number or null for each step, an object from the index "
            "of a message to its label, or the index of the first wrong step"
        )
    if len(value) != count:
        raise DataError(f"{name} has {len(value)} values, the messages have {count} steps")
    return [_label(label, f"{name}[{index}]") for index, label in enumerate(value)]


def is_first_error(value: Any) -> bool:
    """Whether labels are given as the index of the first wrong step."""
    return isinstance(value, int) and not isinstance(value, bool)


def moved(value: Any, origins: Sequence[int]) -> dict[str, Any] | None:
    """Labels by message in a field that stays as it is, by the messages' new indices; None if it holds none.

    A system prompt that becomes the first message would shift every label by one.
    """
    if not isinstance(value, dict) or not value or not all(_is_label(label) for label in value.values()):
        return None
    # The last message of an entry: the text after the results of tools.
    places = {str(origin): index for index, origin in enumerate(origins)}
    if list(origins) == list(range(len(origins))) or not value.keys() <= places.keys():
        return None
    return {str(places[key]): label for key, label in value.items()}


def _is_label(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _label(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        raise DataError(f"{name} is {kind_of(value)}; a label is true, false, a number or null")
    if not math.isfinite(value) or abs(value) > 1e30:
        raise DataError(f"{name} = {value if math.isnan(value) else 'a number beyond 1e30'}: a label is a number")
    return float(value)


def _steps(messages: Sequence[Mapping[str, Any]]) -> int:
    decisions = [message for message in messages if message["role"] == "assistant" and message.get("step", True)]
    return sum(len(message["content"]) if isinstance(message["content"], list) else 1 for message in decisions)
