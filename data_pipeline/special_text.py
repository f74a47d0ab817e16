"""Special tokens in the text of messages: found, and broken up so that they are text.

Text must not encode to special tokens: a tool that prints `<|im_end|>` would end its own message. They are looked for
in what a template may print, also behind JSON escapes in the arguments of a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import msgspec

from data_pipeline.conversations.tool_calls import arguments_object


class SpecialText:
    """Finds and breaks special tokens of one tokenizer in texts and JSON values."""

    def __init__(self, tokens: Collection[str]):
        # Longest first, as the tokenizer matches them.
        self._pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def find(self, value: Any) -> str | None:
        """The first special token in a text, or in the texts of a JSON value; None without one."""
        for text in _texts(value):
            if match := self._pattern.search(text):
                return match.group()
        return None

    def broken(self, value: Any) -> Any:
        """The value with a space after the first character of every special token in it.

        A token of one character cannot be broken and stays.
        """
        return _mapped(value, self._break)

    def _break(self, text: str) -> str:
        if (plain := arguments_object(text)) is not None and self._pattern.search(text) is None:
            # The token is behind an escape: written again, it can be seen.
            return msgspec.json.encode(_mapped(plain, self._break)).decode() if self.find(plain) else text
        # Breaking a token may complete another one, but never endlessly: every round adds a space inside one.
        for _ in range(8):
            text, count = self._pattern.subn(lambda match: _split(match.group()), text)
            if not count:
                break
        return text


def _split(token: str) -> str:
    return f"{token[0]} {token[1:]}" if len(token) > 1 else token


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        # Templates print the values of arguments, whose JSON may hide a token behind an escape.
        if "\\" in value and (plain := arguments_object(value)) is not None:
            yield from _texts(plain)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value
