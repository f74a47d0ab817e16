"""The exceptions a user is meant to read, and secrets struck out of messages and configs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# The exit status of work that was taken away and that the same command goes on with (EX_TEMPFAIL of sysexits.h).
RESUMABLE = 75


class UserError(ValueError):
    """A mistake a user can mend. The message is one line: what, where, the value, the bound, the fix.

    The command line prints it without a traceback and exits with status 2.
    """


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Interrupted(Exception):
    """The machine is being taken away, or a part of it is gone. The message is one line; what was done is kept.

    The command line prints it and exits with status 75: the same command goes on where it stopped.
    """


# The forms of the keys in use, with a run of letters and digits too long for the names of models and files.
_VALUES = re.compile(
    r"(?:^|[^A-Za-z0-9])(?:sk|pk|rk|gsk|xai|nvapi|pplx|fw|r8|hf|gh[pousr])[-_](?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{20}"
    r"|AIza[A-Za-z0-9_-]{30,}|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}|(?i:\bbearer\s+\S{8,})"
    r"|[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s@]*@"
)
_FIELDS = re.compile(
    r"(?i)(?:^|[_-])(?:api[_-]?key|authorization|password|secret|bearer|(?:access|api|auth)[_-]?token)$"
)


def secret_field(plain: Any) -> str | None:
    """The first field of a plain config that holds what looks like a secret, or None.

    A value gives itself away anywhere; the name of a field does so under `policy` only, since what an environment calls
    a password may be part of its game.
    """
    for field, value in _texts(plain, ""):
        named = field.startswith("policy.") and _FIELDS.search(field.rpartition(".")[2])
        if value and (named or _VALUES.search(value)):
            return field
    return None


def redact(text: str, secret: str | None) -> str:
    """The text without the secret, should anybody have repeated it."""
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
