"""Code blocks, command lines and links of the pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


class Block(NamedTuple):
    """A fenced block: its language, the word after it (usually a file name), its text."""

    language: str
    name: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page of docs/, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [Block(*match) for match in re.findall(r"^```(\w+)(?: +(\S+))?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def files(page: str) -> dict[str, str]:
    """The blocks of a page that are files, by name."""
    return {block.name: block.text for block in blocks(page) if "." in block.name}


def shell(page: str) -> list[list[str]]:
    """The arguments after `python` of every command in the `sh` blocks of a page."""
    texts = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh"]
    lines = [line for text in texts for line in text.splitlines()]
    assert all(line.startswith("python ") for line in lines), lines
    return [shlex.split(line)[1:] for line in lines]


def command_lines(text: str, module: str) -> list[list[str]]:
    """The arguments of every `python -m MODULE ...` in a text, in blocks, in prose and in tables.

    Brackets around optional arguments and dots after repeatable ones are removed.
    """
    commands = re.findall(rf"python -m {re.escape(module)} +([^`\n|]+)", text.replace("\\\n", " "))
    plain = [re.sub(r"[][]|(?<= )\.\.\.|#.*", "", _outside_quotes(line)) for line in commands]
    return [shlex.split(line) for line in plain]


def _outside_quotes(line: str) -> str:
    """The line with the brackets of quoted values replaced, so that they are not removed."""
    return re.sub(r"'[^']*'", lambda match: match[0].replace("[", "\x01").replace("]", "\x02"), line)


def shown(argument: str) -> str:
    return argument.replace("\x01", "[").replace("\x02", "]")
