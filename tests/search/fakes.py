"""Games written as trees, and policies and scorers that follow a script: every decision can be worked out by hand."""

from __future__ import annotations

import time

from jaxprm.environments import StepResult
from jaxprm.policies.protocol import Action, candidate_seed, prefix_hash


class Factory:
    """Makes environments and keeps them in `environments`."""

    def __init__(self, make):
        self._make, self.environments = make, []

    def __call__(self):
        self.environments.append(self._make())
        return self.environments[-1]

    @property
    def closes(self) -> list[int]:
        """How often each environment was closed."""
        return [environment.closes for environment in self.environments]


class TreeGame:
    """A game in which a nested dict is a state, its keys the actions, and a float the end of a path and its outcome.

    An action whose value is an Exception raises it. `executed` lists the paths in the order of their steps.
    """

    def __init__(self, games, fork="clone", max_rounds=20):
        self._games, self.fork, self.max_rounds = games, fork, max_rounds
        self.closes, self.executed, self._path, self._state = 0, [], (), None

    def tasks(self, split):
        return list(self._games)

    def reset(self, task):
        self._path, self._state = (), self._games[task]
        if isinstance(self._state, Exception):
            raise self._state
        return f"play {task}"

    def step(self, action):
        self._path = (*self._path, action)
        self.executed.append(self._path)
        self._state = self._state[action]
        if isinstance(self._state, Exception):
            raise self._state
        done = isinstance(self._state, float)
        return StepResult(f"at {'/'.join(self._path)}", self._state if done else 0.0, done)

    def outcome(self):
        return self._state if isinstance(self._state, float) else 0.25

    def snapshot(self):
        return self._path, self._state

    def restore(self, state):
        self._path, self._state = state

    def close(self):
        self.closes += 1


class Walk:
    """A walk from 0 that is done at +3 (outcome 1), at -3 (outcome 0) or after max_rounds (outcome position / 3)."""

    fork = "clone"

    def __init__(self, tasks=4, max_rounds=9):
        self._count, self.max_rounds, self.closes = tasks, max_rounds, 0
        self._history = []

    def tasks(self, split):
        return [f"walk/{split}/{index}" for index in range(self._count)]

    def describe(self, task):
        return {"goal": f"go up \u2028 {task}", "depth": 3}

    def reset(self, task):
        self._history, self._task = [], task
        return f"walk: {task}"

    def step(self, action):
        if action == "crash":
            raise OSError("the path is broken")
        self._history.append({"up": 1, "down": -1}.get(action, 0))
        position = sum(self._history)
        done = abs(position) == 3 or len(self._history) == self.max_rounds
        return StepResult(f"you are at {position}", 0.0, done)

    def outcome(self):
        return max(0.0, sum(self._history) / 3)

    def snapshot(self):
        return tuple(self._history)

    def restore(self, state):
        self._history = list(state)

    def close(self):
        self.closes += 1


def path_of(messages) -> tuple[str, ...]:
    """The actions taken in a conversation."""
    return tuple(message["content"] for message in messages if message["role"] == "assistant")


class _Policy:
    def __init__(self):
        self.calls, self.usage = [], {"encoded": 0, "generated": 0}

    def count_tokens(self, messages):
        return sum(1 + len(message["content"]) for message in messages)


class ScriptedPolicy(_Policy):
    """Draw i at a path is the script's i-th text there, modulo their number, of 3 tokens.

    Texts in `cut` stop at the token limit; those in `fail` are errors.
    """

    def __init__(self, script, cut=(), fail=()):
        super().__init__()
        self._script, self._cut, self._fail = script, cut, fail

    def propose(self, states, n, temperature):
        self.calls.append((len(states), n))
        return [[self._draw(state, index) for index in range(state.first, state.first + n)] for state in states]

    def _draw(self, state, index):
        texts = self._script(state.task, path_of(state.messages))
        text = texts[index % len(texts)]
        if text in self._fail:
            return Action("", 0, None, "error", f"no {text} today")
        return Action(text, 3, None, "length" if text in self._cut else "end")


class SeededPolicy(_Policy):
    """Draws depend on seed, task, conversation and number, like those of a language model."""

    def __init__(self, seed=0, texts=("up", "down", "wait"), delay=0.0, stop_after=None):
        super().__init__()
        self._seed, self._texts, self._delay, self._stop_after = seed, texts, delay, stop_after
        self.started = 0

    def propose(self, states, n, temperature):
        self.calls.append((len(states), n))
        if self._stop_after is not None and len(self.calls) > self._stop_after:
            raise KeyboardInterrupt
        time.sleep(self._delay)
        self.started += sum(len(state.messages) == 1 for state in states)
        return [[self._draw(state, state.first + index) for index in range(n)] for state in states]

    def _draw(self, state, index):
        first, second = candidate_seed(self._seed, state.task, prefix_hash(state.messages), index)
        text, stop = self._texts[first % len(self._texts)], "length" if second % 7 == 0 else "end"
        return Action(text, 1 + second % 5, None, stop)


class ScriptedScorer:
    """Promise of a path, from a dict or a function of the path."""

    def __init__(self, scores):
        self._scores, self.calls = scores.__getitem__ if isinstance(scores, dict) else scores, 0
        self.usage = {"encoded": 0}

    def score_actions(self, states, candidates):
        self.calls += 1
        return [
            [self._scores((*path_of(messages), text)) for text in texts]
            for messages, texts in zip(states, candidates, strict=True)
        ]
