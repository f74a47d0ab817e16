"""Minecraft's recipes: their number, their meaning as in AgentGym, and renamed books."""

import json
import random
from collections import Counter

import pytest

from jaxprm.environments.textcraft import recipes
from jaxprm.environments.textcraft.recipes import Ingredient
from jaxprm.errors import UserError


@pytest.fixture(scope="module")
def book():
    return recipes.minecraft()


def shapeless(output, *ingredients, **more):
    return {"type": "minecraft:crafting_shapeless", "ingredients": list(ingredients), "result": output, **more}


def item(name):
    return {"item": f"minecraft:{name}"}


def tag(name):
    return {"tag": f"minecraft:{name}"}


def load(folder, **files):
    for name, recipe in files.items():
        (folder / f"{name}.json").write_text(json.dumps(recipe))
    return recipes.load(folder)


def commands(book):
    return [recipe.command for recipe in book.recipes]


def test_minecraft_has_agentgyms_goals(book):
    assert len(book.goals) == len(set(book.goals)) == 544
    assert Counter(map(book.depth, book.goals)) == {1: 125, 2: 291, 3: 117, 4: 11}
    depths = [book.depth(goal) for goal in book.goals]
    assert depths == sorted(depths)
    # Within a depth, in the order of file names: acacia_boat and andesite are deeper, beacon is not.
    assert book.goals[:3] == ("minecraft:acacia_planks", "minecraft:acacia_wood", "minecraft:beacon")


def test_hand_checked_recipes(book):
    def lines(goal):
        return [recipe.command for recipe in book.recipes_for(goal)]

    assert lines("minecraft:oak_sign") == ["craft 3 oak sign using 6 oak planks, 1 stick"]
    assert lines("minecraft:stick") == ["craft 4 stick using 2 planks", "craft 1 stick using 2 bamboo"]
    assert book.depth("minecraft:oak_logs") == 0
    assert book.depth("minecraft:oak_sign") == 2  # bamboo -> stick -> sign
    assert "minecraft:planks" in book.tags and "minecraft:oak_logs" in book.item_ids


def test_shaped_recipe_counts_its_pattern(tmp_path):
    key = {"#": item("oak_planks"), "X": [item("stick"), item("bamboo")]}
    shaped = {"type": "minecraft:crafting_shaped", "pattern": ["###", "###", " X "], "key": key}
    book = load(tmp_path, sign={**shaped, "result": {"item": "minecraft:oak_sign", "count": 3}})
    assert commands(book) == ["craft 3 oak sign using 6 oak planks, 1 stick"]
    assert book.item_ids == {"minecraft:oak_planks", "minecraft:stick", "minecraft:oak_sign"}  # of a list, the first


def test_shapeless_recipe_sums_equal_ingredients(tmp_path):
    book = load(tmp_path, a=shapeless({"item": "minecraft:dye"}, item("rose"), item("ink"), item("rose")))
    assert commands(book) == ["craft 1 dye using 2 rose, 1 ink"]


def test_other_types_and_blocks_taken_apart_are_left_out(tmp_path):
    smelting = {"type": "minecraft:smelting", "ingredient": item("ore"), "result": "minecraft:coal"}
    apart = shapeless({"item": "minecraft:iron", "count": 9}, item("iron_block"))
    book = load(tmp_path, a=smelting, b=apart)
    assert book.recipes == ()
    assert book.item_ids == {"minecraft:iron", "minecraft:iron_block"}  # basic items like any other


def test_of_a_cycle_the_later_file_is_left_out(tmp_path):
    up, back = shapeless("minecraft:nugget", item("ingot")), shapeless("minecraft:ingot", item("nugget"))
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    assert commands(load(tmp_path / "first", a=up, b=back)) == ["craft 1 nugget using 1 ingot"]
    assert commands(load(tmp_path / "second", b=up, a=back)) == ["craft 1 ingot using 1 nugget"]


def test_a_longer_cycle_is_cut_too(tmp_path):
    book = load(
        tmp_path,
        a=shapeless("minecraft:x", item("y")),
        b=shapeless("minecraft:w", item("x")),
        c=shapeless("minecraft:y", item("w")),
    )
    assert commands(book) == ["craft 1 x using 1 y", "craft 1 w using 1 x"]


def test_groups_are_tags_and_tags_without_craftable_items_are_items(tmp_path):
    book = load(
        tmp_path,
        oak=shapeless({"item": "minecraft:oak_planks", "count": 4}, tag("oak_logs"), group="planks"),
        stick=shapeless("minecraft:stick", tag("planks")),
    )
    assert book.tags == {"minecraft:planks"}
    assert book.item_tags == {"minecraft:oak_planks": "minecraft:planks"}
    assert "minecraft:oak_logs" in book.item_ids
    assert [recipe.output for recipe in book.recipes_for("minecraft:planks")] == ["minecraft:oak_planks"]
    assert book.recipes_for("minecraft:stick")[0].ingredients == (Ingredient("minecraft:planks", 1, is_tag=True),)
    assert book.depth("minecraft:stick") == 2


def test_match_takes_an_item_of_the_tag_with_the_exact_count(book):
    def fits(*parts):
        recipe = book.match("minecraft:stick", [(f"minecraft:{name}", count) for name, count in parts])
        return recipe and recipe.command

    assert fits(("birch_planks", 2)) == "craft 4 stick using 2 planks"
    assert fits(("bamboo", 2)) == "craft 1 stick using 2 bamboo"
    assert fits(("birch_planks", 4)) is fits(("birch_planks", 1), ("oak_planks", 1)) is None
    assert fits(("birch_planks", 2), ("bamboo", 1)) is fits() is fits(("birch_logs", 2)) is None


def test_match_ignores_the_order_of_ingredients(book):
    parts = [("minecraft:stick", 1), ("minecraft:oak_planks", 6)]
    assert book.match("minecraft:oak_sign", parts) == book.match("minecraft:oak_sign", parts[::-1])
    assert book.match("minecraft:oak_sign", parts) is not None


def test_tree_has_every_recipe_on_any_way_to_the_goal(book):
    lines = {recipe.command for recipe in book.tree("minecraft:stick")}
    planks = {recipe.command for recipe in book.recipes_for("minecraft:planks")}
    assert len(planks) == 8
    assert lines == planks | {"craft 4 stick using 2 planks", "craft 1 stick using 2 bamboo"}


def test_renamed_book_is_the_same_book_under_other_names(book):
    shuffled = list(book.names)
    random.Random(0).shuffle(shuffled)
    to = dict(zip(book.names, shuffled, strict=True))
    other = book.renamed(to)
    assert [book.depth(goal) for goal in book.goals] == [other.depth(goal) for goal in other.goals]
    assert other.goals == tuple(to[goal] for goal in book.goals)
    assert other.item_ids == {to[name] for name in book.item_ids}
    assert other.tags == {to[name] for name in book.tags}
    back = other.renamed({new: old for old, new in to.items()})
    assert back == book
    assert other != book


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"minecraft:nothing_of_the_kind": "minecraft:a"}, "is not an id of this book"),
        ({"minecraft:stick": "minecraft:bamboo"}, "two ids one name"),
        ({"minecraft:stick": "minecraft:Stick"}, "must be minecraft:"),
        ({"minecraft:stick": "minecraft:a,b"}, "must be minecraft:"),
        ({"minecraft:stick": "minecraft:not_using_it"}, "without the word 'using'"),
    ],
)
def test_renaming_refuses_ids_that_no_action_could_name(book, mapping, message):
    with pytest.raises(UserError, match=message) as caught:
        book.renamed(mapping)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "bad.json").write_text('{"type": "minecraft:crafting_shapeless"}')
    with pytest.raises(UserError, match="bad.json: not a Minecraft recipe"):
        recipes.load(tmp_path)
