"""Errors about the user's data."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.terminal import escape


class DataError(ValueError):
    """Bad input data. The message is one line that names the file, the row and the fix."""

    def __init__(self, message: object = ""):
        super().__init__(escape(str(message)))


class SplitError(DataError):
    """A task in two splits. The fault is in the split of the files, so leaving bad rows out does not fix it."""


def one_line(error: BaseException) -> str:
    """The message of an error without line ends, which the messages of other libraries may have, or else its class."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object) -> str:
    """A value for a message: on one line, printable, cut at 80 characters."""
    return cut(repr(value))


def cut(text: str) -> str:
    """A text for a message: at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "..."


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
