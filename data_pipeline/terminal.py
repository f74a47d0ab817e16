"""Text from files, users and servers on a terminal and on a page: shown, and never obeyed.

Such text may hold escape sequences, which move the cursor, rename the window or hide lines, and marks of writing
direction, which show a text in another order than it has.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Controls but line feed and tab; marks of direction; separators of lines; invisible characters; and halves of surrogate
# pairs, which no encoding has. The joiners U+200C and U+200D stay: scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# What progress bars write: a return to the beginning of the line, and moves between lines.
_MOVES = re.compile(r"(?:\n|\x1b\[A|\r)+")


def escape(text: str) -> str:
    r"""The text with every unsafe character as Python would write it, such as \x1b or \u202e."""
    return _UNSAFE.sub(_escaped, text)


@contextmanager
def safe_output() -> Iterator[None]:
    """Within the block, everything that is printed to stdout and stderr is escaped, whoever prints it."""
    before = sys.stdout, sys.stderr
    make_output_safe()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def make_output_safe() -> None:
    """As `safe_output`, until the process ends: tracebacks too."""
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)


def _safe(stream: Any) -> Any:
    # None for a program without a terminal.
    return stream if stream is None or isinstance(stream, _SafeStream) else _SafeStream(stream)


class _SafeStream:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        # Bars write their moves alone, and their lines after a return; a text between others cannot pass for one.
        if not _MOVES.fullmatch(text):
            moves = "\r" if text.startswith("\r") else ""
            text = moves + escape(text[len(moves) :])
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            # A terminal in another encoding: a message that is cut short would be worse.
            return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
