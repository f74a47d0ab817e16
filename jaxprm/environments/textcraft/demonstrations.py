"""Expert episodes of TextCraft to imitate, on real recipes and on invented ones."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from jaxprm.environments.textcraft import planner
from jaxprm.environments.textcraft.recipes import PREFIX, Ingredient, Recipe, RecipeBook, spoken

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


_WORD = re.compile(r"[a-z]+")
# Words of commands, replies and thoughts: exchanged, they would garble what is not a name.
_FIXED = {"craft", "using", "get", "minecraft", "inventory", "needs", "ready", "a", "of", "on", "the"}


@lru_cache(maxsize=4)
def item_words(environment) -> tuple[str, ...]:
    """The words of the item names in the prompts of the training tasks."""
    recipes: set[Recipe] = set()
    for task in environment.tasks("train"):
        environment.reset(task)
        recipes.update(environment.episode.recipes)
    names = {name for recipe in recipes for name in (recipe.output, *(part.name for part in recipe.ingredients))}
    words = {word for name in names for word in _WORD.findall(spoken(name))}
    return tuple(sorted(words - _FIXED))


def exchange_words(messages: list[dict], words: tuple[str, ...], rng: random.Random) -> list[dict]:
    """The same episode with the words of item names permuted: a planks of oak may become a dust of ladder."""
    mapping = dict(zip(words, rng.sample(words, len(words)), strict=True))

    def renamed(text: str) -> str:
        return _WORD.sub(lambda match: mapping.get(match[0], match[0]), text)

    return [message | {"content": renamed(message["content"])} for message in messages]


def demonstrate(
    environment,
    rng: random.Random,
    *,
    rename: float = 0.75,
    mistakes: float = 0.3,
    mistake_rate: float = 0.15,
    distractors: tuple[int, int] = (0, 10),
    invented: float = 0.0,
) -> list[dict]:
    """One expert episode, as messages: of invented recipes, or of a training goal.

    invented: share of episodes with invented recipes; rename: share of the others with exchanged words; mistakes: share
    of episodes in which the agent is led astray with probability `mistake_rate` a turn. Mistaken turns carry
    `"step": False`.
    """
    messages: list[dict] = []
    # A mistake can end a short episode by luck: without an expert turn there is nothing to imitate.
    while all(message.get("step") is False for message in messages if message["role"] == "assistant"):
        astray = mistake_rate if rng.random() < mistakes else 0.0
        invents = invented > 0 and rng.random() < invented
        if invents:
            goal, book = invent(rng, item_words(environment), tuple(distractors))
        else:
            goal, book = rng.choice(training_goals(environment)), None
        prompt = environment.sample_episode(goal, rng, tuple(distractors), book)
        messages = _episode(environment, prompt, rng, astray)
    renames = not invents and rng.random() < rename
    return exchange_words(messages, item_words(environment), rng) if renames else messages


def next_message(environment) -> str:
    """The expert's message in the environment's present state."""
    episode = environment.episode
    return planner.plan(episode.goal, environment.inventory, episode.recipes).message


def _episode(environment, prompt: str, rng: random.Random, astray: float) -> list[dict]:
    messages = [{"role": "user", "content": prompt}]
    done = False
    while not done:
        expert = rng.random() >= astray
        action = next_message(environment) if expert else mistake(environment, rng)
        messages.append({"role": "assistant", "content": action} | ({} if expert else {"step": False}))
        observation, _, done = environment.step(action)
        if not done:
            messages.append({"role": "user", "content": observation})
    return messages


@lru_cache(maxsize=4)
def training_goals(environment) -> tuple[str, ...]:
    """The goal items of the training split."""
    return tuple(environment.book.goals[int(task.partition("/")[2])] for task in environment.tasks("train"))


def mistake(environment, rng: random.Random) -> str:
    """A plausible wrong turn: a recipe of the prompt that is not due, or an item of one."""
    recipe = rng.choice(environment.episode.recipes)
    if rng.random() < 0.5:
        return f"Thought: {planner.quoted([], ready=True)}\nAction: {recipe.command}"
    part = rng.choice(recipe.ingredients)
    amount = rng.choice([part.count, 1, 2])
    return f"Thought: {planner.quoted([recipe])}\nAction: get {amount} {spoken(part.name)}"
