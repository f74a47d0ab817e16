"""Recipes that exist in no game, to learn reading from: any shape, any amounts, names of borrowed words."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxprm.environments import planner
from jaxprm.environments.recipes import PREFIX, Ingredient, Recipe, RecipeBook

# About as in the recipes of the training goals, the rare ones less rare.
AMOUNTS, AMOUNT_WEIGHTS = range(1, 10), (60, 12, 6, 8, 2, 4, 1, 3, 4)
YIELDS, YIELD_WEIGHTS = (1, 2, 3, 4, 6, 8, 16), (45, 10, 6, 28, 3, 6, 2)
LONGEST_PLAN = 16
STRANGE_SHARE = 0.08


def invent(rng: random.Random, words: Sequence[str], distractors: tuple[int, int]) -> tuple[str, RecipeBook]:
    """(goal, book) with a plan of at most LONGEST_PLAN turns; item names are made of `words`.

    distractors: the fewest and the most recipes that lead elsewhere.

    Some words are strange, two halves that never met: those of unseen goals, too, come in unknown pieces.
    """
    while True:
        inventor = _Inventor(rng, words)
        goal = inventor.craftable(rng.choices((1, 2, 3), (30, 45, 25))[0])
        tree = tuple(inventor.recipes)
        if planner.plan(goal, {}, tree).turns <= LONGEST_PLAN:
            inventor.add_distractors(rng.randint(*distractors))
            return goal, inventor.book()


class _Inventor:
    def __init__(self, rng: random.Random, words: Sequence[str]):
        self.rng, self.words = rng, words
        self.names: list[str] = []
        self.found: list[str] = []
        self.recipes: list[Recipe] = []

    def name(self) -> str:
        """A new name; often kin to another, as "oak log" and "oak planks" are, since such are easy to mix up."""
        rng = self.rng
        while True:
            parts = rng.sample(self.words, rng.choices((1, 2, 3), (30, 50, 20))[0])
            parts = [self.strange() if rng.random() < STRANGE_SHARE else part for part in parts]
            if self.names and rng.random() < 0.4:
                kin = rng.choice(self.names).split("_")
                parts = rng.choice([[*kin, parts[0]], [*kin[:-1], parts[0]], [parts[0], *kin[1:]]])[:4]
            if (name := "_".join(parts)) not in self.names:
                self.names.append(name)
                return name

    def strange(self) -> str:
        first, second = self.rng.sample(self.words, 2)
        return first[: (len(first) + 1) // 2] + second[len(second) // 2 :]

    def craftable(self, depth: int) -> str:
        """A new item with a recipe, sometimes two, that needs at most `depth` crafts one after another."""
        rng, name = self.rng, self.name()
        for _ in range(1 + (rng.random() < 0.12)):
            count = rng.choices((1, 2, 3, 4), (45, 35, 15, 5))[0]
            deep = rng.randrange(count)
            parts: dict[str, None] = {}
            for index in range(count):
                crafted = depth > 1 and (index == deep or rng.random() < 0.2)
                parts[self.craftable(depth - 1) if crafted else self.found_item()] = None
            self.add(name, parts)
        return PREFIX + name

    def found_item(self) -> str:
        if self.found and self.rng.random() < 0.25:
            return self.rng.choice(self.found)
        self.found.append(PREFIX + self.name())
        return self.found[-1]

    def add(self, name: str, parts) -> None:
        rng = self.rng
        ingredients = tuple(Ingredient(part, rng.choices(AMOUNTS, AMOUNT_WEIGHTS)[0]) for part in parts)
        self.recipes.append(Recipe(PREFIX + name, rng.choices(YIELDS, YIELD_WEIGHTS)[0], ingredients))

    def add_distractors(self, count: int) -> None:
        """Recipes that lead elsewhere, from ingredients that are needed."""
        used = sorted({part.name for recipe in self.recipes for part in recipe.ingredients})
        for _ in range(count):
            parts = {self.rng.choice(used): None}
            if self.rng.random() < 0.5:
                parts[self.found_item()] = None
            self.add(self.name(), parts)

    def book(self) -> RecipeBook:
        items = {part.name for recipe in self.recipes for part in recipe.ingredients}
        return RecipeBook(tuple(self.recipes), frozenset(items | {r.output for r in self.recipes}), frozenset(), {})
