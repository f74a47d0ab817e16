"""Errors about the user's data."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters but tab and line feed, and those that change the direction of text: a name in a file must not
# move the cursor of a terminal.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters as escapes, such as \\x1b."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


class DataError(ValueError):
    """Bad input data. The message is one line that names the file, the row and the fix."""

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


class SplitError(DataError):
    """A task in two splits. The fault is in the split of the files, so leaving bad rows out does not fix it."""


def one_line(error: Exception) -> str:
    """The message of an error without line ends, which the messages of other libraries may have."""
    return " ".join(str(error).split())


MOST_LISTED = 20


def listed(errors: Sequence[object], *, total: int | None = None) -> list[str]:
    """Lines that report bad rows: their number, the first MOST_LISTED errors, and how many more there are.

    Args:
      total: number of bad rows, if `errors` holds only the first of them.
    """
    total = len(errors) if total is None else total
    if not total:
        return []
    lines = [f"{total} bad rows:" if total > 1 else "1 bad row:"]
    lines += [f"  {' '.join(str(error).split())}" for error in errors[:MOST_LISTED]]
    return lines + ([f"  ... and {total - MOST_LISTED} more"] if total > MOST_LISTED else [])
