"""Fields of a row by dotted path, and checks of their values: outcomes, success, names."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from data_pipeline.conversations.kinds import kind_of
from data_pipeline.errors import DataError

_PART = re.compile(r"(?:^|\.)([^.\[\]]+)|\[(-?\d+)\]")
_MISSING = object()


class Path(NamedTuple):
    """Path to a value: `info.reward`, `metrics[0].score`, `labels[-1]`. A field with that very name has priority."""

    text: str
    parts: tuple[str | int, ...]

    @classmethod
    def parse(cls, text: str) -> Path:
        """Parses a path. Raises DataError if the text is malformed."""
        parts: list[str | int] = []
        at = 0
        while at < len(text):
            part = _PART.match(text, at)
            if part is None:
                break
            parts.append(part[1] if part[1] is not None else int(part[2]))
            at = part.end()
        if at < len(text) or not parts or isinstance(parts[0], int):
            raise DataError(f"field {text!r}: not a path; write it as info.reward or metrics[0].score")
        return cls(text, tuple(parts))

    def find(self, row: dict[str, Any]) -> Any:
        """The value in a row, or None if it is missing."""
        # A name may itself contain dots.
        if self.text in row:
            return row[self.text]
        value: Any = row
        for part in self.parts:
            if isinstance(part, str):
                value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
            else:
                inside = isinstance(value, list) and -len(value) <= part < len(value)
                value = value[part] if inside else _MISSING
            if value is _MISSING:
                return None
        return value

    def without(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row without this value, unless the value is inside a list; then the row itself."""
        if self.text in row:
            return {key: value for key, value in row.items() if key != self.text}
        first, *others = self.parts
        inner = row.get(first) if isinstance(first, str) else None
        if not others or not isinstance(inner, dict):
            return row
        return row | {first: Path(".".join(map(str, others)), tuple(others)).without(inner)}

    @property
    def parent(self) -> Path | None:
        """The path of the object that holds the value; None if that is the row itself."""
        head, dot, _ = self.text.rpartition(".")
        return Path.parse(head) if dot else None

    @property
    def key(self) -> str | None:
        """The name of the row's field if the path is a single name, else None."""
        return self.text if len(self.parts) == 1 else None


class Scale(NamedTuple):
    """Linear scale of outcomes, from `low` (0) to `high` (1)."""

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Scale:
        """Parses "LOW,HIGH". Raises DataError unless both are finite and LOW < HIGH."""
        try:
            low, high = map(float, text.split(","))
        except ValueError:
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DataError(f"outcome scale {text!r}: write it as LOW,HIGH with LOW < HIGH, such as 0,100")
        return cls(low, high)


def outcome(value: Any, name: str, scale: Scale) -> float:
    """The outcome in [0, 1] for true, false or a number on `scale`. Raises DataError with the value and the bound."""
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)):
        raise DataError(f"{name} is {kind_of(value)}; an outcome is a number, true or false")
    if not scale.low <= value <= scale.high:  # also true of NaN
        raise DataError(
            f"{name} = {_shown(value)} is outside [{scale.low:g}, {scale.high:g}]; name the range with --outcome-scale "
            "LOW,HIGH"
        )
    return min(1.0, max(0.0, (value - scale.low) / (scale.high - scale.low)))


def success(value: Any, name: str) -> bool:
    """The value of true, false, 1 or 0. Raises DataError for anything else."""
    if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
        return bool(value)
    shown = f"= {_shown(value)}" if isinstance(value, (int, float)) else f"is {kind_of(value)}"
    raise DataError(f"{name} {shown}; success is true or false, or 1 or 0")


def name(value: Any, field: str) -> str:
    """The name for a text that is not empty, or an integer. Raises DataError for anything else."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return _shown(value)
    kind = "an empty text" if value == "" else kind_of(value)
    raise DataError(f"{field} is {kind}; a name is a text or an integer")


def _shown(value: float) -> str:
    """A number as text, shortened."""
    try:
        text = str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."
