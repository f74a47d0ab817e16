"""Demonstrations of TextCraft: experts' turns, marked mistakes, exchanged words, no held-out goal."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm import config
from jaxprm.environments.textcraft import TextCraft
from jaxprm.environments.textcraft.demonstrations import (
    LONGEST_PLAN,
    exchange_words,
    invent,
    item_words,
    next_message,
    training_goals,
)
from jaxprm.environments.textcraft.planner import plan
from jaxprm.environments.textcraft.recipes import spoken
from jaxprm.errors import UserError
from jaxprm.training.imitate import imitate

ENV = TextCraft(distractors=4)
seeds = st.integers(0, 10**6)


def demonstration(seed, **variety):
    return ENV.demonstration(random.Random(seed), **variety)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_an_episode_is_a_conversation_of_one_action_a_turn(seed):
    messages = demonstration(seed)
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert all(re.fullmatch(r"Thought: .+\nAction: .+", m["content"]) for m in messages[1::2])
    assert any(m.get("step", True) for m in messages[1::2])


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_invented_goals_have_short_plans_and_the_expert_reaches_them(seed):
    rng = random.Random(seed)
    goal, book = invent(rng, item_words(ENV), (0, 6))
    assert plan(goal, {}, book.recipes).turns <= LONGEST_PLAN
    prompt = ENV.sample_episode(goal, rng, (0, 6), book)
    done = False
    while not done:
        _, _, done = ENV.step(next_message(ENV))
    # The order of the prompt decides among recipes of equal cost, so an episode may take a few turns more.
    assert ENV.outcome() == 1.0
    assert prompt.endswith(f"Goal: craft {spoken(goal)}.")


def test_exactly_the_mistakes_are_marked():
    calm = [demonstration(seed, mistakes=0.0) for seed in range(20)]
    assert not any(m.get("step") is False for episode in calm for m in episode)
    wild = [demonstration(seed, mistakes=1.0, mistake_rate=0.5) for seed in range(20)]
    marked = [m.get("step") is False for episode in wild for m in episode[1::2]]
    assert 0.25 < sum(marked) / len(marked) < 0.75


@pytest.mark.parametrize("invented", [0.0, 1.0])
def test_equal_seeds_give_equal_episodes_and_others_differ(invented):
    assert demonstration(3, invented=invented) == demonstration(3, invented=invented)
    assert len({demonstration(seed, invented=invented)[0]["content"] for seed in range(20)}) == 20


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_exchanged_words_are_a_renaming_of_the_same_episode(seed):
    words = item_words(ENV)
    plain = demonstration(seed, rename=0.0, invented=0.0, mistakes=0.0)
    renamed = exchange_words(plain, words, random.Random(seed))
    forth, back = {}, {}
    for before, after in zip(plain, renamed, strict=True):
        a, b = (re.findall(r"[a-z]+|[^a-z]+", m["content"]) for m in (before, after))
        assert len(a) == len(b)
        for word, new in zip(a, b, strict=True):
            assert forth.setdefault(word, new) == new and back.setdefault(new, word) == word
            assert word == new or word in words
    assert renamed != plain


def test_demonstrations_show_goals_of_the_training_split_only():
    goals = {spoken(goal) for goal in training_goals(ENV)}
    held_out = {spoken(ENV.book.goals[int(task.partition("/")[2])]) for task in ENV.tasks("test")}
    shown = {
        re.search(r"Goal: craft (.*)\.", demonstration(seed, rename=0.0, invented=0.0)[0]["content"])[1]
        for seed in range(200)
    }
    assert shown <= goals and not shown & held_out


def test_environments_without_an_expert_cannot_be_imitated(tmp_path, monkeypatch):
    (tmp_path / "silent.py").write_text(SILENT)
    monkeypatch.syspath_prepend(tmp_path)
    experiment = config.Experiment(name="x", environment=config.EnvironmentConfig(name="silent:Silent"))
    with pytest.raises(UserError, match="demonstration"):
        imitate(experiment, tmp_path)


SILENT = """
class Silent:
    fork, max_rounds = "none", 1
    def tasks(self, split): return [split]
    def reset(self, task): return task
    def step(self, action): return "", 0.0, True
    def outcome(self): return 0.0
    def close(self): pass
"""
