"""Why an action failed, in words, for policies that have not learned TextCraft's rules by imitation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxprm.environments.textcraft.actions import Command
from jaxprm.environments.textcraft.recipes import Recipe, RecipeBook, spoken

FORMS = "'get COUNT ITEM', 'craft COUNT ITEM using COUNT ITEM, COUNT ITEM' or 'inventory'"


def explain(command: Command, inventory: Mapping[str, int], book: RecipeBook, recipes: Sequence[Recipe]) -> str:
    """The sentence that follows the reply to a failed action; empty if the reply says it all.

    It uses only what the prompt shows: the recipes that it lists, and the items of their groups.

    Args:
        inventory: item id -> count, when the action was taken.
        recipes: those of the prompt.
    """
    if command.kind == "unknown":
        if not command.text:
            return f". The response has no line 'Action: ...'. Write 'Action:' and then {FORMS}."
        return f". An action is {FORMS}."
    if command.kind == "malformed":
        return ". Name a count and an item for every ingredient, separated by commas, such as '1 stick, 2 oak planks'."
    if command.kind == "get":
        return _explain_get(command, book, recipes)
    if command.kind == "craft":
        return _explain_craft(command, inventory, book, recipes)
    return ""


def _explain_get(command: Command, book: RecipeBook, recipes: Sequence[Recipe]) -> str:
    if command.item in book.tags:
        return f". It is a group of items; name one of them, such as {_example(command.item, book)}."
    if book.is_craftable(command.item):
        return f". It has to be crafted{_ways(command.item, recipes)}."
    if "," in command.text:
        return ". Get one item in one action."
    return ". There is no such item; use the names in the crafting commands."


def _explain_craft(command: Command, inventory: Mapping[str, int], book: RecipeBook, recipes: Sequence[Recipe]) -> str:
    needed: dict[str, int] = {}
    for item, count in command.ingredients:
        needed[item] = needed.get(item, 0) + count
    for item, count in needed.items():
        if item in book.tags:
            return f". {spoken(item)} is a group of items; name one of them, such as {_example(item, book)}."
        if inventory.get(item, 0) < count:
            return f". You have {inventory.get(item, 0)} of {count} {spoken(item)}."
    return f". It is crafted otherwise{_ways(command.item, recipes)}."


def _ways(item: str, recipes: Sequence[Recipe]) -> str:
    commands = [recipe.command for recipe in recipes if item in (recipe.output, recipe.tag)]
    return ": " + " or ".join(commands) if commands else ", and no crafting command above makes it"


def _example(tag: str, book: RecipeBook) -> str:
    # Sorted, since the order of a set differs between processes.
    members = sorted(item for item, group in book.item_tags.items() if group == tag)
    return spoken(members[0]) if members else "the one that a crafting command makes"
