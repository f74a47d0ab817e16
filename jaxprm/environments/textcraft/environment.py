"""TextCraft: obtain a Minecraft item by getting and crafting, from the recipes listed in the prompt.

Prompts, actions and replies are AgentGym's, and so is the clean-up of actions in its client, so that results can be
compared. The replies differ where AgentGym's engine prints a Python object, replies None, or lets an inventory become
negative. With `instructions`, for policies that were not trained on TextCraft, the prompt begins with AgentGym's
instructions, and the reply to an action that failed says what was wrong with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxprm.environments.protocol import StepResult
from jaxprm.environments.textcraft import recipes
from jaxprm.environments.textcraft.actions import Command, parse
from jaxprm.environments.textcraft.demonstrations import demonstrate
from jaxprm.environments.textcraft.explanations import explain
from jaxprm.environments.textcraft.recipes import Recipe, RecipeBook, spoken
from jaxprm.errors import UserError

SPLITS = ("train", "validation", "test")
# AgentGym's wording, so that results can be compared.
INSTRUCTIONS = (
    "You are given few useful crafting recipes to craft items in Minecraft. Crafting commands are of the format "
    '"craft [target object] using [input ingredients]".\n'
    "Every round I will give you an observation, you have to respond an action based on the state and instruction. "
    'You can "get" an object (ingredients) from the inventory or the environment, look-up the game inventory by '
    '"inventory", or "craft" (target) using any of the crafting commands.\n'
    'Your output must strictly follow this format:"Thought:\nyour thoughts.\n\nAction:\nyour next action"\n\n'
    "Reminder: \n"
    '1. Always specify the quantity when using "get" and "craft" commands. - Example of get: get 1 lapis lazuli '
    "- Example1 of craft: craft 1 blue dye using 1 lapis lazuli "
    "- Example2 of craft: craft 1 golden carrot using 8 gold nugget, 1 carrot\n"
    '2. When using "get" command, do not specify whether the item comes from the inventory or the environment.\n'
    "3. You can use ONLY crafting commands provided, do not use your own crafting commands. However, if the crafting "
    'command uses a generic ingredient like "planks", you can use special types of the same ingredient e.g. "dark oak '
    'planks" in the command instead.\n\n'
)
MANY_ACTIONS = "Error: Only one 'Action' is allowed per response. Please adjust your response."


@dataclass(frozen=True, slots=True)
class CraftingEpisode:
    """What does not change during an episode: the id of the goal, and the recipes of the prompt in its order."""

    book: RecipeBook
    goal: str
    recipes: tuple[Recipe, ...]
    prompt: str


class CraftingState(NamedTuple):
    """State of an episode. Snapshots have an inventory of their own, which no later step changes."""

    episode: CraftingEpisode
    inventory: dict[str, int]
    rounds: int
    done: bool
    success: bool


class TextCraft:
    """The TextCraft environment.

    Args:
        seed: decides the distractors of a task and the order of its recipes, together with the task's id.
        max_rounds: steps after which an episode ends without success.
        distractors: largest number of recipes in a prompt that do not lead to the goal; (low, high) draws it per task.
        split: shares of the goal items of every depth for train, validation and test.
        split_seed: decides which goals are in which split.
        book: the recipes; None for Minecraft's.
        instructions: begin the prompt with AgentGym's instructions, and say in the reply why an action failed.

    Raises UserError for a value out of bounds.
    """

    fork = "clone"

    def __init__(
        self,
        seed: int = 0,
        max_rounds: int = 20,
        distractors: int | Sequence[int] = 10,
        split: Sequence[float] = (0.65, 0.10, 0.25),
        split_seed: int = 0,
        book: RecipeBook | None = None,
        instructions: bool = False,
    ) -> None:
        if max_rounds < 1:
            raise UserError(f"textcraft: max_rounds is {max_rounds}; it must be at least 1")
        if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
            raise UserError(f"textcraft: split is {tuple(split)}; give three shares that sum to 1")
        self.seed = seed
        self.max_rounds = max_rounds
        self.distractors = _bounds(distractors)
        self.instructions = instructions
        self.book = recipes.minecraft() if book is None else book
        self._tasks = _split(self.book, tuple(split), split_seed)
        self._episodes: dict[str, CraftingEpisode] = {}
        self._state: CraftingState | None = None

    def tasks(self, split: str) -> tuple[str, ...]:
        """Ids "textcraft/<index into book.goals>" of a split, in ascending order and so by depth."""
        if split not in self._tasks:
            raise UserError(f"textcraft: no split {split!r}; use one of {', '.join(SPLITS)}")
        return self._tasks[split]

    def describe(self, task: str) -> dict[str, str | int]:
        """The goal in words, and its depth: the number of crafts in a chain."""
        goal = self._goal(task)
        return {"goal": spoken(goal), "depth": self.book.depth(goal)}

    def reset(self, task: str) -> str:
        """Starts a task and returns the prompt, which is the same in every process."""
        episode = self._episodes.get(task)
        if episode is None:
            # Seeding with a string uses sha512 and does not depend on PYTHONHASHSEED.
            rng = random.Random(f"{task}:{self.seed}")
            episode = self._episodes[task] = self._make(self._goal(task), rng, self.distractors)
        return self._start(episode)

    def sample_episode(
        self,
        goal: str,
        rng: random.Random,
        distractors: int | Sequence[int] | None = None,
        book: RecipeBook | None = None,
    ) -> str:
        """Starts an episode for imitation that is not a task: drawn from `rng`, possibly from another book.

        Returns the prompt. All other methods then work as after reset. Raises UserError if the goal has no recipe.
        """
        if not (book or self.book).recipes_for(goal):
            raise UserError(f"textcraft: {goal!r} has no recipe; use one of the book's `goals`")
        bounds = self.distractors if distractors is None else _bounds(distractors)
        return self._start(self._make(goal, rng, bounds, book))

    def demonstration(self, rng: random.Random, **variety: Any) -> list[dict]:
        """An expert's episode as messages: see `demonstrate`."""
        return demonstrate(self, rng, **variety)

    def step(self, action: str) -> StepResult:
        """Executes the one `Action:` line of an assistant message.

        Raises RuntimeError before the first reset, or after the episode is done.
        """
        state = self._running()
        if state.done:
            raise RuntimeError("textcraft: step after the episode is done; call reset")
        command = parse(action)
        before = dict(state.inventory) if self.instructions else {}
        observation, obtained = self._execute(command, state.inventory)
        if self.instructions and obtained is None:
            observation += explain(command, before, state.episode.book, state.episode.recipes)
        success = obtained == state.episode.goal
        done = success or state.rounds + 1 >= self.max_rounds
        # The inventory was changed in place; snapshots have copies.
        self._state = CraftingState(state.episode, state.inventory, state.rounds + 1, done, success)
        return StepResult(observation, float(success), done)

    def outcome(self) -> float:
        """1 if the goal item was obtained, else 0."""
        return float(self._running().success)

    def snapshot(self) -> CraftingState:
        state = self._running()
        return state._replace(inventory=dict(state.inventory))

    def restore(self, state: CraftingState) -> None:
        self._state = state._replace(inventory=dict(state.inventory))

    def close(self) -> None:
        self._state = None

    @property
    def episode(self) -> CraftingEpisode:
        """The goal and the recipes of the prompt."""
        return self._running().episode

    @property
    def inventory(self) -> dict[str, int]:
        """A copy: item id -> count."""
        return dict(self._running().inventory)

    @property
    def rounds(self) -> int:
        return self._running().rounds

    def _running(self) -> CraftingState:
        if self._state is None:
            raise RuntimeError("textcraft: no episode; call reset first")
        return self._state

    def _start(self, episode: CraftingEpisode) -> str:
        self._state = CraftingState(episode, {}, 0, False, False)
        return episode.prompt

    def _goal(self, task: str) -> str:
        name, _, index = task.partition("/")
        if name != "textcraft" or not index.isdecimal() or int(index) >= len(self.book.goals):
            raise UserError(f"textcraft: no task {task!r}; ids are textcraft/0 to textcraft/{len(self.book.goals) - 1}")
        return self.book.goals[int(index)]

    def _make(
        self, goal: str, rng: random.Random, bounds: tuple[int, int], book: RecipeBook | None = None
    ) -> CraftingEpisode:
        book = self.book if book is None else book
        tree = {recipe.command: recipe for recipe in book.tree(goal)}
        others: dict[str, Recipe] = {}
        # As in AgentGym: for each ingredient of each recipe of the tree, up to ten recipes that use it, too.
        for recipe in tree.values():
            for part in recipe.ingredients:
                uses = book.uses(part.name)
                for other in rng.sample(uses, min(len(uses), 10)):
                    if other.command not in tree:
                        others[other.command] = other
        # No draw for a fixed number: randint would change the draws after it.
        limit = bounds[0] if bounds[0] == bounds[1] else rng.randint(*bounds)
        chosen = rng.sample([others[command] for command in sorted(others)], min(len(others), limit))
        shown = [tree[command] for command in sorted(tree)] + chosen
        rng.shuffle(shown)
        commands = "\n".join(recipe.command for recipe in shown)
        prompt = f"Crafting commands:\n{commands}\n\nGoal: craft {spoken(goal)}."
        return CraftingEpisode(book, goal, tuple(shown), (INSTRUCTIONS if self.instructions else "") + prompt)

    def _execute(self, command: Command, inventory: dict[str, int]) -> tuple[str, str | None]:
        """The reply and the item that was obtained, if any. Changes the inventory."""
        if command.kind == "craft":
            return self._craft(command, inventory)
        if command.kind == "get":
            return self._get(command, inventory)
        if command.kind == "inventory":
            if not inventory:
                return "Inventory: You are not carrying anything.", None
            return "Inventory: " + "".join(f"[{spoken(item)}] ({count}) " for item, count in inventory.items()), None
        if command.kind == "many":
            return MANY_ACTIONS, None
        if command.kind == "malformed":
            return f"Wrong item format: {command.text}", None
        return f"Could not execute {command.text}", None

    def _get(self, command: Command, inventory: dict[str, int]) -> tuple[str, str | None]:
        book = self._running().episode.book
        item = command.item
        if item not in book.item_ids or book.is_craftable(item):
            return f"Could not find {command.text}", None
        inventory[item] = inventory.get(item, 0) + command.count
        return f"Got {command.count} {command.text}", item

    def _craft(self, command: Command, inventory: dict[str, int]) -> tuple[str, str | None]:
        # Summed: for an item named twice, AgentGym's engine lets the inventory become negative.
        needed: dict[str, int] = {}
        for item, count in command.ingredients:
            needed[item] = needed.get(item, 0) + count
        # A tag is never in the inventory, so an action has to name an item of it.
        if any(item not in inventory or inventory[item] < count for item, count in needed.items()):
            return f"Could not find enough items to craft {command.item}", None
        recipe = self._running().episode.book.match(command.item, command.ingredients)
        if recipe is None:
            return f"Could not find a valid recipe for {command.item}", None
        for item, count in needed.items():
            inventory[item] -= count
            # Items without a count would be listed by `inventory`.
            if not inventory[item]:
                del inventory[item]
        inventory[recipe.output] = inventory.get(recipe.output, 0) + recipe.count
        return f"Crafted {recipe.count} {recipe.output}", recipe.output


def _bounds(distractors: int | Sequence[int]) -> tuple[int, int]:
    low, high = (distractors, distractors) if isinstance(distractors, int) else distractors
    if not 0 <= low <= high:
        raise UserError(f"textcraft: distractors is {distractors}; give a number >= 0, or (low, high) with low <= high")
    return low, high


def _split(book: RecipeBook, shares: tuple[float, ...], seed: int) -> dict[str, tuple[str, ...]]:
    """Tasks by split: the goals of each depth are divided in proportion to the shares."""
    by_split: dict[str, list[int]] = {name: [] for name in SPLITS}
    depths = [book.depth(goal) for goal in book.goals]
    for depth in sorted(set(depths)):
        indices = [index for index, other in enumerate(depths) if other == depth]
        random.Random(f"textcraft-split:{seed}:{depth}").shuffle(indices)
        first = round(shares[0] * len(indices))
        second = round((shares[0] + shares[1]) * len(indices))
        for name, part in zip(SPLITS, (indices[:first], indices[first:second], indices[second:]), strict=True):
            by_split[name] += part
    return {name: tuple(f"textcraft/{index}" for index in sorted(part)) for name, part in by_split.items()}
