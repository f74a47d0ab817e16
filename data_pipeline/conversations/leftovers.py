"""What a conversation holds beyond its messages: refused by name where it is scored, kept and counted on import."""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_pipeline.errors import DataError

# Bounded, because descriptions contain field names and a file may have endlessly many.
_MAX_NOTES = 100
OTHER = "other fields, kept in meta"


class Leftovers:
    """Counts of changes by description, and the fields of messages that have no place in a trajectory."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.fields: dict[int, dict[str, Any]] = {}

    def note(self, description: str, count: int = 1) -> None:
        """Adds to the count of a change."""
        add_note(self.counts, description, count)

    def unknown(self, index: int, where: str, key: str, value: Any) -> None:
        """Keeps a field of message `index` that is not part of a conversation, and counts it."""
        self.fields.setdefault(index, {})[key] = value
        add_note(self.counts, f"message field `{key:.40}`, kept in meta", 1, OTHER)


class Refusing(Leftovers):
    """Raises DataError for the first field that is neither known nor null."""

    def unknown(self, index: int, where: str, key: str, value: Any) -> None:
        raise DataError(f"{where}: unknown field `{key:.40}`; remove it, or put its text into content")


def add_note(counts: Counter[str], description: str, count: int, other: str = OTHER) -> None:
    """Adds to a count; descriptions beyond a hundred are counted together."""
    counts[description if description in counts or len(counts) < _MAX_NOTES else other] += count


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, empty, or an object or list of such values. SDKs write all fields."""
    if isinstance(value, dict):
        return all(map(is_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_nothing, value))
    return value is None or value == ""
