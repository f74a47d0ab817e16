"""Expert episodes of TextCraft for imitation, with Minecraft's recipes and with invented ones."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from jaxprm.environments.textcraft import planner
from jaxprm.environments.textcraft.recipes import PREFIX, Ingredient, Recipe, RecipeBook, spoken

# Amounts and yields of invented recipes with their weights: about those of the training goals, rare ones more often.
AMOUNTS, AMOUNT_WEIGHTS = range(1, 10), (60, 12, 6, 8, 2, 4, 1, 3, 4)
YIELDS, YIELD_WEIGHTS = (1, 2, 3, 4, 6, 8, 16), (45, 10, 6, 28, 3, 6, 2)
# In turns; goals with longer plans are drawn again.
LONGEST_PLAN = 16
# Share of words that are two halves of different words.
MIXED_WORD_SHARE = 0.08


def invent(rng: random.Random, words: Sequence[str], distractors: tuple[int, int]) -> tuple[str, RecipeBook]:
    """Invents recipes; returns (goal, book) with a plan of at most LONGEST_PLAN turns in the book's order.

    Some words of item names are mixed from two words, because names of unseen goals also split into unknown tokens.

    Args:
        words: of item names.
        distractors: least and largest number of recipes that do not lead to the goal.
    """
    while True:
        inventor = _Inventor(rng, words)
        goal = inventor.craftable(rng.choices((1, 2, 3), (30, 45, 25))[0])
        tree = tuple(inventor.recipes)
        if planner.plan(goal, {}, tree).turns <= LONGEST_PLAN:
            inventor.add_distractors(rng.randint(*distractors))
            return goal, inventor.book()


class _Inventor:
    """Draws names and recipes. The order of its draws decides the policy's training data: keep it."""

    def __init__(self, rng: random.Random, words: Sequence[str]):
        self.rng, self.words = rng, words
        self.names: list[str] = []
        self.basic: list[str] = []
        self.recipes: list[Recipe] = []

    def name(self) -> str:
        """A new name. It often shares words with another: "oak log" and "oak planks" are easily confused."""
        rng = self.rng
        while True:
            parts = rng.sample(self.words, rng.choices((1, 2, 3), (30, 50, 20))[0])
            parts = [self.mixed_word() if rng.random() < MIXED_WORD_SHARE else part for part in parts]
            if self.names and rng.random() < 0.4:
                other = rng.choice(self.names).split("_")
                parts = rng.choice([[*other, parts[0]], [*other[:-1], parts[0]], [parts[0], *other[1:]]])[:4]
            if (name := "_".join(parts)) not in self.names:
                self.names.append(name)
                return name

    def mixed_word(self) -> str:
        first, second = self.rng.sample(self.words, 2)
        return first[: (len(first) + 1) // 2] + second[len(second) // 2 :]

    def craftable(self, depth: int) -> str:
        """A new item with one recipe, sometimes two, that needs a chain of at most `depth` crafts."""
        rng, name = self.rng, self.name()
        for _ in range(1 + (rng.random() < 0.12)):
            count = rng.choices((1, 2, 3, 4), (45, 35, 15, 5))[0]
            deep = rng.randrange(count)
            # A dict and not a set: the order of a set of strings differs between processes.
            parts: dict[str, None] = {}
            for index in range(count):
                crafted = depth > 1 and (index == deep or rng.random() < 0.2)
                parts[self.craftable(depth - 1) if crafted else self.basic_item()] = None
            self.add(name, parts)
        return PREFIX + name

    def basic_item(self) -> str:
        """An item without a recipe, sometimes one that is used already."""
        if self.basic and self.rng.random() < 0.25:
            return self.rng.choice(self.basic)
        self.basic.append(PREFIX + self.name())
        return self.basic[-1]

    def add(self, name: str, parts) -> None:
        rng = self.rng
        ingredients = tuple(Ingredient(part, rng.choices(AMOUNTS, AMOUNT_WEIGHTS)[0]) for part in parts)
        self.recipes.append(Recipe(PREFIX + name, rng.choices(YIELDS, YIELD_WEIGHTS)[0], ingredients))

    def add_distractors(self, count: int) -> None:
        """Recipes that do not lead to the goal, from ingredients that the goal needs."""
        # Sorted, because the choices below depend on the order.
        used = sorted({part.name for recipe in self.recipes for part in recipe.ingredients})
        for _ in range(count):
            parts = {self.rng.choice(used): None}
            if self.rng.random() < 0.5:
                parts[self.basic_item()] = None
            self.add(self.name(), parts)

    def book(self) -> RecipeBook:
        items = {part.name for recipe in self.recipes for part in recipe.ingredients}
        return RecipeBook(tuple(self.recipes), frozenset(items | {r.output for r in self.recipes}), frozenset(), {})


_WORD = re.compile(r"[a-z]+")
# Words of commands, replies and thoughts. They are not exchanged, because they also occur outside of names.
_FIXED = {"craft", "using", "get", "minecraft", "inventory", "needs", "ready", "a", "of", "on", "the"}


@lru_cache(maxsize=4)
def item_words(environment) -> tuple[str, ...]:
    """The words of the item names in the prompts of the training tasks."""
    recipes: set[Recipe] = set()
    for task in environment.tasks("train"):
        # The recipes of a prompt are known only within its episode.
        environment.reset(task)
        recipes.update(environment.episode.recipes)
    names = {name for recipe in recipes for name in (recipe.output, *(part.name for part in recipe.ingredients))}
    words = {word for name in names for word in _WORD.findall(spoken(name))}
    return tuple(sorted(words - _FIXED))


def exchange_words(messages: list[dict], words: tuple[str, ...], rng: random.Random) -> list[dict]:
    """The same episode with the words of item names permuted: "oak planks" may become "ladder dust"."""
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
    """An expert's episode as messages, of a training goal or of invented recipes.

    Args:
        rename: share of the episodes of training goals in which words of item names are exchanged.
        mistakes: share of episodes with mistakes, each turn with probability `mistake_rate`. Mistakes have
            `"step": False`, so that they are not imitated.
        distractors: least and largest number of recipes in the prompt that do not lead to the goal.
        invented: share of episodes with invented recipes.
    """
    messages: list[dict] = []
    # A mistake can happen to end a short episode. Without a turn of the expert there is nothing to imitate: draw again.
    while all(message.get("step") is False for message in messages if message["role"] == "assistant"):
        error_rate = mistake_rate if rng.random() < mistakes else 0.0
        invents = invented > 0 and rng.random() < invented
        if invents:
            goal, book = invent(rng, item_words(environment), tuple(distractors))
        else:
            goal, book = rng.choice(training_goals(environment)), None
        prompt = environment.sample_episode(goal, rng, tuple(distractors), book)
        messages = _episode(environment, prompt, rng, error_rate)
    renames = not invents and rng.random() < rename
    return exchange_words(messages, item_words(environment), rng) if renames else messages


def next_message(environment) -> str:
    """The expert's message in the current state of the environment."""
    episode = environment.episode
    return planner.plan(episode.goal, environment.inventory, episode.recipes).message


def _episode(environment, prompt: str, rng: random.Random, error_rate: float) -> list[dict]:
    messages = [{"role": "user", "content": prompt}]
    done = False
    while not done:
        expert = rng.random() >= error_rate
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
    """A plausible wrong message: crafts a random recipe of the prompt, or gets one of its ingredients."""
    recipe = rng.choice(environment.episode.recipes)
    if rng.random() < 0.5:
        return f"Thought: {planner.quoted([], ready=True)}\nAction: {recipe.command}"
    part = rng.choice(recipe.ingredients)
    amount = rng.choice([part.count, 1, 2])
    return f"Thought: {planner.quoted([recipe])}\nAction: get {amount} {spoken(part.name)}"
