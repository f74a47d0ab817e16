"""The expert of TextCraft: messages by hand, every task solved, and recovery from any state."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.environments.textcraft import TextCraft, recipes
from jaxprm.environments.textcraft.actions import parse
from jaxprm.environments.textcraft.demonstrations import next_message
from jaxprm.environments.textcraft.planner import plan
from jaxprm.environments.textcraft.recipes import Ingredient, Recipe, RecipeBook

BOOK = recipes.minecraft()


def ident(name):
    return "minecraft:" + name.replace(" ", "_")


def recipe(line, tags=(), tag=None):
    """The recipe in a line of a prompt; ingredients named in `tags` are tags."""
    command = parse(f"Action: {line}")
    count = int(line.split()[1])
    parts = tuple(Ingredient(name, n, is_tag=name in map(ident, tags)) for name, n in command.ingredients)
    parsed = Recipe(command.item, count, parts, tag and ident(tag))
    assert parsed.command == line
    return parsed


def answer(goal, held, *listed):
    return plan(ident(goal), {ident(name): count for name, count in held.items()}, listed).message


SIGN = (
    recipe("craft 4 oak planks using 1 oak logs", tag="planks"),
    recipe("craft 4 dark oak planks using 1 dark oak logs", tag="planks"),
    recipe("craft 3 dark oak sign using 6 dark oak planks, 1 stick"),
    recipe("craft 4 stick using 2 planks", tags=["planks"]),
)
SIGN_THOUGHT = "Thought: 3 dark oak sign using 6 dark oak planks, 1 stick"
NEEDS_LOGS = f"{SIGN_THOUGHT}; 4 dark oak planks using 1 dark oak logs."
PLANKS_READY = f"{SIGN_THOUGHT}; ready."


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, f"{NEEDS_LOGS}\nAction: get 2 dark oak logs"),
        ({"dark oak logs": 1}, f"{NEEDS_LOGS}\nAction: get 1 dark oak logs"),
        ({"dark oak logs": 2}, f"{PLANKS_READY}\nAction: craft 4 dark oak planks using 1 dark oak logs"),
        (
            {"dark oak planks": 4, "dark oak logs": 1},
            f"{PLANKS_READY}\nAction: craft 4 dark oak planks using 1 dark oak logs",
        ),
        (  # the item of a tag is the one held
            {"dark oak planks": 8},
            f"{SIGN_THOUGHT}; ready.\nAction: craft 4 stick using 2 dark oak planks",
        ),
        (
            {"dark oak planks": 6, "stick": 4},
            "Thought: ready.\nAction: craft 3 dark oak sign using 6 dark oak planks, 1 stick",
        ),
        (  # useless items do not matter
            {"oak logs": 7, "stick": 1, "bamboo": 3},
            f"{NEEDS_LOGS}\nAction: get 2 dark oak logs",
        ),
    ],
)
def test_messages_worked_out_by_hand(held, message):
    assert answer("dark oak sign", held, *SIGN) == message


def test_the_item_of_a_tag_is_the_cheapest_then_the_one_held_then_the_first():
    stick, oak, dark = SIGN[3], SIGN[0], SIGN[1]
    assert answer("stick", {}, dark, stick, oak).endswith("Action: get 1 dark oak logs")
    assert answer("stick", {}, oak, stick, dark).endswith("Action: get 1 oak logs")
    assert answer("stick", {"dark oak logs": 1}, oak, stick, dark).endswith("using 1 dark oak logs")
    both, mixed = {"oak planks": 2, "dark oak planks": 3}, {"oak planks": 1, "dark oak logs": 1}
    assert answer("stick", both, oak, stick, dark).endswith("using 2 dark oak planks")
    assert answer("stick", mixed, oak, stick, dark).endswith("craft 4 dark oak planks using 1 dark oak logs")
    assert answer("stick", mixed, oak, stick, dark).startswith("Thought: 4 stick using 2 planks; ready.")


def test_the_recipe_with_the_fewest_actions_is_chosen_and_the_first_among_equals():
    poppy, tulip, bush = (
        recipe(f"craft {n} red dye using 1 {name}") for n, name in ((1, "poppy"), (1, "red tulip"), (2, "rose bush"))
    )
    wool = recipe("craft 1 red wool using 2 red dye")
    assert "get 1 poppy" in answer("red dye", {}, poppy, tulip)
    assert "get 1 red tulip" in answer("red dye", {}, tulip, poppy)
    assert "get 1 rose bush" in answer("red wool", {}, poppy, tulip, wool, bush)
    assert "get 2 poppy" in answer("red wool", {}, poppy, tulip, wool)
    assert "craft 1 red dye using 1 red tulip" in answer("red wool", {"red tulip": 2}, poppy, tulip, wool)


def test_an_ingredient_used_up_by_another_is_made_again():
    lines = ("craft 1 box using 2 board, 1 peg", "craft 1 peg using 1 board", "craft 1 board using 1 log")
    listed = [recipe(line) for line in lines]
    held, actions = Counter(), []
    while True:
        step = plan(ident("box"), held, listed)
        actions.append(step.action)
        command = parse(f"Action: {step.action}")
        if command.kind == "get":
            held[command.item] += command.count
            continue
        for name, count in command.ingredients:
            held[name] -= count
            assert held[name] >= 0
        held[command.item] += 1
        if command.item == ident("box"):
            break
    box, peg, board = lines
    assert actions == ["get 2 log", board, board, peg, "get 1 log", board, box]


def test_a_goal_without_a_recipe_is_refused():
    with pytest.raises(ValueError, match="no recipe of the prompt leads to 'minecraft:anvil'"):
        plan("minecraft:anvil", {}, SIGN)


def test_a_cycle_in_the_prompt_does_not_trap_it():
    cycle = (recipe("craft 1 a using 1 b"), recipe("craft 1 b using 1 a"), recipe("craft 1 b using 3 c"))
    assert answer("a", {}, *cycle) == "Thought: 1 a using 1 b; 1 b using 3 c.\nAction: get 3 c"


def solve(env):
    """Plays to the end; every turn must bring the end nearer, and no action may fail."""
    expected = plan(env.episode.goal, env.inventory, env.episode.recipes).turns
    turns = 0
    while True:
        result = env.step(next_message(env))
        turns += 1
        assert result.observation.startswith(("Got ", "Crafted "))
        if result.done:
            return turns, expected
        left = plan(env.episode.goal, env.inventory, env.episode.recipes).turns
        assert left <= expected - turns


def test_every_task_is_solved_in_the_planned_number_of_turns():
    env = TextCraft(max_rounds=50)
    slow = []
    for index, goal in enumerate(BOOK.goals):
        env.reset(f"textcraft/{index}")
        turns, expected = solve(env)
        assert env.outcome() == 1.0 and turns == expected
        if turns > 20:
            slow.append(goal)
    # Nine netherite ingots, 27 + 4 iron ingots, 8 chiseled bricks, 6 wools dyed one by one: none of these fits in 20.
    colours = "black blue brown cyan gray light_blue light_gray lime orange purple".split()
    assert set(slow) == {ident(name) for name in ["anvil", "netherite_block", "lodestone"]} | {
        ident(f"{colour}_banner") for colour in colours
    }


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, 543), seed=st.integers(0, 10**6))
def test_it_recovers_from_any_state(index, seed):
    env, rng = TextCraft(max_rounds=200), random.Random(seed)
    env.reset(f"textcraft/{index}")
    names = sorted({p.name for r in env.episode.recipes for p in r.ingredients if not p.is_tag} - {env.episode.goal})
    inventory = {rng.choice(names): rng.randint(1, 9) for _ in range(rng.randrange(6)) if names}
    env.restore(env.snapshot()._replace(inventory=inventory))
    turns, expected = solve(env)
    assert env.outcome() == 1.0 and turns <= expected


def renamed_thought(thought, renamed):
    """The thought in other names; `renamed` maps its recipes, as they are written in it."""
    return "; ".join(renamed.get(quote, quote) for quote in thought.removesuffix(".").split("; ")) + "."


def test_a_renamed_prompt_gets_the_renamed_plan():
    shuffled = list(BOOK.names)
    random.Random(7).shuffle(shuffled)
    to = dict(zip(BOOK.names, shuffled, strict=True))
    other = BOOK.renamed(to)
    renamed = dict(zip(BOOK.recipes, other.recipes, strict=True))
    quotes = {a.command.removeprefix("craft "): b.command.removeprefix("craft ") for a, b in renamed.items()}
    env = TextCraft(distractors=4, max_rounds=50)
    for index in range(0, 544, 9):
        env.reset(f"textcraft/{index}")
        listed = env.episode.recipes
        while True:
            goal, held = env.episode.goal, env.inventory
            plain = plan(goal, held, listed)
            other_plan = plan(to[goal], {to[name]: n for name, n in held.items()}, [renamed[r] for r in listed])
            before, after = parse(f"Action: {plain.action}"), parse(f"Action: {other_plan.action}")
            assert (to[before.item], before.count, before.kind) == (after.item, after.count, after.kind)
            assert plain.turns == other_plan.turns
            assert [(to[name], n) for name, n in before.ingredients] == list(after.ingredients)
            assert renamed_thought(plain.thought, quotes) == other_plan.thought
            if env.step(plain.message).done:
                break


def test_the_thought_leads_from_the_goal_to_the_action():
    env = TextCraft(max_rounds=50)
    for index in range(0, 544, 5):
        env.reset(f"textcraft/{index}")
        quoted = {r.command.removeprefix("craft "): r for r in env.episode.recipes}
        while True:
            step = plan(env.episode.goal, env.inventory, env.episode.recipes)
            quotes = step.thought.removesuffix(".").split("; ")
            command = parse(f"Action: {step.action}")
            if ready := quotes[-1] == "ready":
                quotes.pop()
            chain = [quoted[quote] for quote in quotes]
            items = [*(r.output for r in chain), command.item]
            assert (items[0], "craft" if ready else "get") == (env.episode.goal, command.kind)
            for above, below in zip(chain, items[1:], strict=True):
                parts = {part.name for part in above.ingredients}
                assert below in parts or BOOK.item_tags[below] in parts
            if env.step(step.message).done:
                break


def test_it_needs_no_more_than_the_prompt(monkeypatch):
    env = TextCraft()
    env.reset("textcraft/300")

    def refuse(*_):
        raise AssertionError("the planner looked into the book")

    monkeypatch.setattr(RecipeBook, "recipes_for", refuse)
    monkeypatch.setattr(RecipeBook, "match", refuse)
    assert next_message(env).startswith("Thought: ")
