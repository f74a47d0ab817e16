"""The exceptions a user is meant to read, and secrets struck out of messages and configs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import printable

# Exit status of interrupted work that the same command resumes (EX_TEMPFAIL of sysexits.h).
RESUMABLE = 75


class UserError(ValueError):
    """A mistake that a user can fix. The message is one line: what, where, the value, the bound, the fix.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


def shown(value: object) -> str:
    """A value for a message: on one line, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Interrupted(Exception):
    """The machine is being taken away, or a process of the run is gone. The message is one line; finished work is kept.

    The command line prints it and exits with status 75: the same command resumes.
    """


# Forms of the API keys in use. 20 letters and digits in a row are too many for the name of a model or a file.
_VALUES = re.compile(
    r"(?:^|[^A-Za-z0-9])(?:sk|pk|rk|gsk|xai|nvapi|pplx|fw|r8|hf|gh[pousr])[-_](?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{20}"
    r"|AIza[A-Za-z0-9_-]{30,}|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}|(?i:\bbearer\s+\S{8,})"
    r"|[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s@]*@"
)
_FIELDS = re.compile(
    r"(?i)(?:^|[_-])(?:api[_-]?key|authorization|password|secret|bearer|(?:access|api|auth)[_-]?token)$"
)


def secret_field(plain: Any) -> str | None:
    """The first field of a plain config that holds something like a secret, or None.

    A value is checked in every field. The name of a field is checked only under `policy`, because an environment may
    have a password in its game.
    """
    for field, value in _texts(plain, ""):
        named = field.startswith("policy.") and _FIELDS.search(field.rpartition(".")[2])
        if value and (named or _VALUES.search(value)):
            return field
    return None


def redact(text: str, secret: str | None) -> str:
    """The text with every occurrence of the secret replaced. Servers and libraries repeat keys in their errors."""
    return text.replace(secret, "[key]") if secret else text


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(value, f"{where}.{name}" if where else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{where}[{index}]")
