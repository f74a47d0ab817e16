"""The Python surface: a reward model in a user's own program.

model = jaxprm.load("runs/demo/reward_models/agentprm/seed-0")
model.score([messages])[0]["steps"]                      # promise and progress of every step of a conversation
model.score_actions(messages, ["get 2 oak log", ...])    # of what the agent could say next
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data_pipeline.chat_template import as_messages
from data_pipeline.trajectory import Message, Trajectory
from jaxprm import config as config_lib
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.scoring.scorer import PreparedConversation, Scorer

Conversation = Sequence[Message | Mapping[str, Any]]


class ActionScore(NamedTuple):
    """promise: the expected outcome after the action; progress: how much better that is than before it.

    Progress is None for the first step of a conversation, and for a model whose targets do not define it.
    """

    promise: float
    progress: float | None


class Question(NamedTuple):
    """Candidates of one conversation, encoded; and its last step, whose promise theirs are compared with."""

    candidates: PreparedConversation
    last: PreparedConversation | None

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that is to be computed; 0 where all is remembered."""
        return max(self.candidates.longest, self.last.longest if self.last else 0)


class Model:
    """A reward model. Not thread-safe: give each thread its own.

    recipe: what reward_model.json says of it, `value_range` among it.
    """

    def __init__(self, scorer: Scorer, recipe: dict[str, Any]):
        self.recipe = recipe
        self._scorer = scorer
        self._progress = loading.defines_progress(recipe)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far: `encoded`, and those found in the cache, encoded again and padded; see docs/search.md."""
        return self._scorer.usage

    def score(self, trajectories: Sequence[Trajectory | Mapping[str, Any] | Conversation]) -> list[dict[str, Any]]:
        """{"steps": [{"message", "promise", "progress"}], "score"} for each trajectory, in one jitted pass each.

        A trajectory is a Trajectory, a dictionary with "messages" (and perhaps "tools"), or a list of messages.
        "message" is the index of the step's message; the score is the promise of the last step.

        Raises UserError or DataError, naming the trajectory, for one that cannot be scored.
        """
        if isinstance(trajectories, (Trajectory, Mapping)) or any(_is_message(one) for one in trajectories):
            raise UserError("score takes a list of trajectories; put a single one into a list: score([messages])")
        names, encoded = [], []
        for index, trajectory in enumerate(trajectories):
            messages, tools, name = _parts(trajectory, f"trajectory {index}")
            names.append(name)
            encoded.append(self._scorer.encoder.trajectory(messages, row=name, tools=tools))
        return [
            loading.step_table(one.message_indices, promises, progress=self._progress)
            for one, promises in zip(encoded, self._scorer.score_encoded(encoded, names), strict=True)
        ]

    def score_actions(
        self, messages: Conversation, candidates: Sequence[str | Mapping[str, Any]], tools: list[dict] | None = None
    ) -> list[ActionScore]:
        """Promise and progress of each candidate for the next assistant turn.

        messages: the conversation so far; candidates: texts, or assistant messages with "content" or "tool_calls".
        Equal to the last step of `score([[*messages, candidate]])`, but the conversation is encoded once, and only
        what is new since the last call.

        Raises UserError or DataError for a conversation or a candidate that cannot be encoded.
        """
        return self.answer([self.question(messages, candidates, tools)])[0]

    def question(
        self, messages: Conversation, candidates: Sequence[str | Mapping[str, Any]], tools: list[dict] | None = None
    ) -> Question:
        """What `score_actions` would compute, encoded, to be computed with others in one `answer`.

        Raises as `score_actions`, but for what is too long to be scored: see `Question.longest`.
        """
        if isinstance(candidates, (str, Mapping)):
            raise UserError("score_actions takes a list of candidates; put a single one into a list")
        history = _plain(messages, "messages")
        actions = [_action(candidate, f"candidate {index}") for index, candidate in enumerate(candidates)]
        last = self._last_step(history, tools) if self._progress and actions else None
        return Question(self._scorer.prepare(history, actions, tools), last)

    def answer(self, questions: Sequence[Question]) -> list[list[ActionScore]]:
        """Scores of the candidates of several conversations, all computed at once.

        Raises UserError where one is longer than can be scored.
        """
        # The last steps first: what follows them then finds their conversations in the cache.
        before = iter(self._scorer.score_prepared([one.last for one in questions if one.last]))
        promises = self._scorer.score_prepared([one.candidates for one in questions])
        lasts = [next(before)[0] if one.last else None for one in questions]
        return [_scores(found, last) for found, last in zip(promises, lasts, strict=True)]

    def _last_step(self, history: list[dict], tools: list[dict] | None) -> PreparedConversation | None:
        """The last step taken; in an agent's loop it was a candidate once, and its promise is remembered."""
        steps = [index for index, one in enumerate(history) if one["role"] == "assistant" and one.get("step", True)]
        return self._scorer.prepare(history[: steps[-1]], [history[steps[-1]]], tools) if steps else None


def load(
    directory: str | Path,
    *,
    rows: int = 8,
    max_tokens: int = 2048,
    dtype: str = "float32",
    chat_template: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Model:
    """A reward model, from its directory, its training output, a run with a single one, or by its name on the hub.

    rows: states whose candidates are scored at once; max_tokens: conversations up to this length are kept in the
    cache of `score_actions`, longer ones are encoded anew. Memory of the cache grows with both. dtype: "float32" or
    "bfloat16", of the arithmetic and of the cache. chat_template: in the place of the model's own, for models trained
    elsewhere whose template rewrites earlier turns: "chatml", "llama3", or a file. mesh: devices of this process to
    share the work, as in a config: {"tensor": 4} splits parameters and cache four ways; without it the first does all.

    Raises UserError or DataError where there is no model, or one that cannot be read.
    """
    model = find_model(directory)
    options: dict[str, Any] = {"rows": rows, "max_tokens": max_tokens, "dtype": dtype, "template": chat_template}
    sizes = None if mesh is None else config_lib.mesh_of_sizes(mesh, where="mesh")
    scorer = loading.load_scorer(model, **options, mesh=sizes)
    return Model(scorer, read_recipe(model))


def _parts(trajectory: Any, name: str) -> tuple[Conversation, list[dict] | None, str]:
    """(messages, tools, name for errors) of a trajectory in any of its forms."""
    if isinstance(trajectory, Trajectory):
        return trajectory.messages, trajectory.tools, trajectory.id
    if isinstance(trajectory, Mapping):
        if "messages" not in trajectory:
            raise UserError(f'{name}: has no "messages", only {sorted(trajectory)}')
        return trajectory["messages"], trajectory.get("tools"), str(trajectory.get("id") or name)
    return trajectory, None, name


def _scores(promises: np.ndarray, before: np.float32 | None) -> list[ActionScore]:
    return [
        ActionScore(loading.plain(promise), None if before is None else loading.plain(promise - before))
        for promise in promises
    ]


def _is_message(one: Any) -> bool:
    return isinstance(one, Message) or (isinstance(one, Mapping) and "role" in one and "messages" not in one)


def _plain(messages: Conversation, name: str) -> list[dict]:
    """Messages checked, and in one form whatever they came as, so that equal conversations are found again."""
    if not messages:
        raise UserError(f"{name}: is empty; a conversation begins with the task, as a user message")
    return msgspec.to_builtins(as_messages(messages, name))


def _action(candidate: str | Mapping[str, Any], name: str) -> str | dict:
    if isinstance(candidate, str):
        return candidate
    (action,) = _plain([candidate], name)
    if action["role"] != "assistant" or not action.get("step", True):
        raise UserError(f"{name}: must be an assistant message that is a step, got role {action['role']}")
    return action
