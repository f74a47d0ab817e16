"""TextCraft's actions: from an assistant message to a command, as AgentGym's client and server parse it together."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from jaxprm.environments.textcraft.recipes import identifier

_ACTION = re.compile(r"Action:\s*(.*?)(?=\n|$)", re.DOTALL)
_UNKNOWN_CHARACTERS = re.compile(r"[^A-Za-z0-9, ]+")
# Nine digits are more than any task needs. Longer numbers are not parsed.
_GET = re.compile(r"get ([0-9]{1,9}) (.*)")
_CRAFT = re.compile(r"craft (.*) using (.*)")
_COUNTED = re.compile(r"([0-9]{1,9}) (.*)")


class Command(NamedTuple):
    """A parsed action. text: the cleaned action, or the part of it that the reply repeats. Items are ids."""

    kind: Literal["get", "craft", "inventory", "unknown", "many", "malformed"]
    text: str
    item: str = ""
    count: int = 0
    ingredients: tuple[tuple[str, int], ...] = ()


@lru_cache(maxsize=1 << 16)
def parse(message: str) -> Command:
    """Parses an assistant message as AgentGym's client and server do together."""
    actions = _ACTION.findall(message)
    if len(actions) > 1:
        return Command("many", "")
    text = " ".join(_UNKNOWN_CHARACTERS.sub("", actions[0] if actions else "").split())
    if text.lower() == "look":
        text = "inventory"
    if match := _CRAFT.match(text):
        return _parse_craft(match[1], match[2])
    if match := _GET.match(text):
        return Command("get", match[2], identifier(match[2]), int(match[1]))
    return Command("inventory" if text.startswith("inventory") else "unknown", text)


def _parse_craft(output: str, inputs: str) -> Command:
    counted = _COUNTED.match(output)
    ingredients = []
    for part in inputs.split(","):
        match = _COUNTED.match(part.strip())
        if not match:
            return Command("malformed", part.strip())
        ingredients.append((identifier(match[2]), int(match[1])))
    # AgentGym ignores the amount before the output.
    return Command("craft", "", identifier(counted[2] if counted else output), 0, tuple(ingredients))
