"""An expert for TextCraft: the next message in any state, with the chain of recipes as its thought.

The thought starts with the goal's recipe. Each further recipe makes the first item that the one before still lacks. The
action gets the first basic item that the last recipe lacks, or crafts the next recipe of the chain:

    Thought: 3 dark oak sign using 6 dark oak planks, 1 stick; 4 dark oak planks using 1 dark oak logs.
    Action: get 2 dark oak logs

    Thought: 3 dark oak sign using 6 dark oak planks, 1 stick; ready.
    Action: craft 4 dark oak planks using 1 dark oak logs

It reads only the goal, the inventory and the recipes in the prompt, so everything it does can be learned from the
conversation. It has no memory, so it recovers from any mistake, its own or a policy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxprm.environments.textcraft.recipes import Recipe, spoken

Parts = tuple[tuple[str, int], ...]


class ExpertPlan(NamedTuple):
    """The two lines of the next message. turns: actions of the plan from here on, this one included."""

    thought: str
    action: str
    turns: int

    @property
    def message(self) -> str:
        return f"Thought: {self.thought}\nAction: {self.action}"


class Option(NamedTuple):
    """A way to hold an amount of an item.

    parts: the recipe's ingredients, with an item for each tag. cost: in actions. left: the inventory afterwards.
    """

    recipe: Recipe
    parts: Parts
    cost: float
    left: dict[str, int]


def plan(goal: str, inventory: Mapping[str, int], recipes: Sequence[Recipe]) -> ExpertPlan:
    """Plans the next action.

    Args:
        goal: id of the item.
        inventory: item id -> count.
        recipes: those of the prompt, in its order; an item without a recipe is a basic one.

    Raises ValueError if no recipe of the prompt makes the goal.
    """
    costs = _Costs(recipes)
    held = {item: count for item, count in inventory.items() if count > 0}
    # The goal has to be crafted even if the inventory has it already.
    total = held.get(goal, 0) + 1
    option = costs.best(goal, total, held, frozenset())
    if option is None:
        raise ValueError(f"no recipe of the prompt leads to {goal!r}")
    turns = int(option.cost)
    chain: list[Recipe] = []
    item, path = goal, frozenset()
    while option is not None:
        chain.append(option.recipe)
        path |= {item}
        repeats = _repeats(option.recipe, item, total, held)
        missing = _first_missing(option.parts, repeats, held)
        if missing is None:
            recipe = option.recipe
            action = f"craft {recipe.count} {spoken(item)} using {_listed(option.parts)}"
            return ExpertPlan(quoted(chain[:-1], ready=True), action, turns)
        item, total = missing
        option = costs.best(item, total, held, path)
    return ExpertPlan(quoted(chain), f"get {total - held.get(item, 0)} {spoken(item)}", turns)


class _Costs:
    """Costs of subgoals in actions, by simulating what `plan` would do turn after turn."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self.by_item: dict[str, list[Recipe]] = {}
        self.by_tag: dict[str, dict[str, None]] = {}
        for recipe in recipes:
            self.by_item.setdefault(recipe.output, []).append(recipe)
            if recipe.tag is not None:
                self.by_tag.setdefault(recipe.tag, {})[recipe.output] = None

    def best(self, item: str, total: int, held: dict[str, int], path: frozenset[str]) -> Option | None:
        """The cheapest way to hold `total` of an item, the first in the prompt among equals; None for a basic item.

        path: the subgoals above this one, none of which may be an ingredient.
        """
        recipes = self.by_item.get(item)
        if not recipes:
            return None
        path = path | {item}
        options = [self._option(recipe, item, total, held, path) for recipe in recipes]
        return min(options, key=lambda option: option.cost)

    def _option(self, recipe: Recipe, item: str, total: int, held: dict[str, int], path: frozenset[str]) -> Option:
        left = dict(held)
        repeats = _repeats(recipe, item, total, held)
        parts = self._parts(recipe, repeats, held, path)
        if parts is None:
            return Option(recipe, (), math.inf, left)
        cost = 0.0
        # Making one ingredient may use up another one that was there, so the search starts from the first again.
        while (missing := _first_missing(parts, repeats, left)) is not None and cost < math.inf:
            cost += self._obtain(*missing, left, path)
        for name, count in parts:
            left[name] = left.get(name, 0) - repeats * count
        left[item] = left.get(item, 0) + repeats * recipe.count
        return Option(recipe, parts, cost + repeats, left)

    def _obtain(self, item: str, total: int, left: dict[str, int], path: frozenset[str]) -> float:
        """The cost of holding `total` of an item; changes `left` to the inventory after it."""
        if left.get(item, 0) >= total:
            return 0
        option = self.best(item, total, left, path)
        if option is None:
            left[item] = total
            return 1
        # In place, because it is the caller's inventory.
        left.clear()
        left.update(option.left)
        return option.cost

    def _parts(self, recipe: Recipe, repeats: int, held: dict[str, int], path: frozenset[str]) -> Parts | None:
        """The recipe's ingredients with an item for each tag, or None if it needs one of the subgoals above it."""
        parts = []
        for part in recipe.ingredients:
            name: str | None = part.name
            if part.is_tag:
                name = self._choose(part.name, repeats * part.count, held, path)
            if name is None or name in path:
                return None
            parts.append((name, part.count))
        return tuple(parts)

    def _choose(self, tag: str, total: int, held: dict[str, int], path: frozenset[str]) -> str | None:
        """The item of a tag with the lowest cost; among equals the one held most, then the first in the prompt."""
        items = [item for item in self.by_tag.get(tag, ()) if item not in path]
        # Each with a copy of the inventory: comparing items must use nothing up.
        costs = {item: (self._obtain(item, total, dict(held), path), -held.get(item, 0)) for item in items}
        return min(items, key=costs.__getitem__, default=None)


def _repeats(recipe: Recipe, item: str, total: int, held: Mapping[str, int]) -> int:
    # Rounded up.
    return -(-(total - held.get(item, 0)) // recipe.count)


def _first_missing(parts: Parts, repeats: int, held: Mapping[str, int]) -> tuple[str, int] | None:
    """The first ingredient that is short, and the amount that all repeats need."""
    return next(((name, repeats * count) for name, count in parts if held.get(name, 0) < repeats * count), None)


def quoted(chain: Sequence[Recipe], *, ready: bool = False) -> str:
    """A thought: recipes as in the prompt, then "ready" if the action crafts the next item of the chain.

    The thought has all numbers that the action follows from: a small model learns to copy a line of its prompt long
    before it learns to find a single number there.
    """
    recipes = [recipe.command.removeprefix("craft ") for recipe in chain]
    return "; ".join([*recipes, "ready"] if ready else recipes) + "."


def _listed(parts: Parts) -> str:
    return ", ".join(f"{count} {spoken(name)}" for name, count in parts)
