"""Errors about the user's data."""

from __future__ import annotations

from collections.abc import Sequence


class DataError(ValueError):
    """Bad input data. The message is one line that names the file, the row and the fix."""


class SplitError(DataError):
    """A task in two splits. That is a fault of the whole file: leaving bad rows out does not mend it."""


def listed(errors: Sequence[object], *, most: int = 20) -> list[str]:
    """The lines that tell of bad rows: their number, the first `most` of them, how many more there are."""
    if not errors:
        return []
    lines = [f"{len(errors)} bad rows:" if len(errors) > 1 else "1 bad row:"]
    lines += [f"  {' '.join(str(error).split())}" for error in errors[:most]]
    return lines + ([f"  ... and {len(errors) - most} more"] if len(errors) > most else [])
