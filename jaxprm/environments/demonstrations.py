"""Expert episodes of TextCraft to imitate, free and endlessly varied.

Three things keep a small policy from learning recipes by heart instead of reading them in its prompt: invented recipes,
of any shape and any amounts; real ones whose item names exchange their words, anew for every episode; and distractors
and an order drawn anew. Some episodes contain mistakes, marked `"step": false` so that nobody imitates them: the expert
shows how to go on.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache

from jaxprm.environments import planner
from jaxprm.environments.invented import invent
from jaxprm.environments.recipes import Recipe, spoken

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
    environment, rng: random.Random, *, rename: float = 0.75, mistakes: float = 0.3, mistake_rate: float = 0.15,
    distractors: tuple[int, int] = (0, 10), invented: float = 0.0,
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


def _episode(environment, prompt: str, rng: random.Random, astray: float) -> list[dict]:
    messages = [{"role": "user", "content": prompt}]
    done = False
    while not done:
        expert = rng.random() >= astray
        action = planner.next_message(environment) if expert else mistake(environment, rng)
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
