"""The Python interface: a trained reward model in a user's own program.

    import jaxprm

    model = jaxprm.load("runs/demo/reward_models/agentprm/seed-0")
    model.score([messages])[0]["steps"]                    # promise and progress of every step of a conversation
    model.score_actions(messages, ["get 2 oak log", ...])  # of each candidate for the agent's next turn

Shapes: S steps of a conversation, N candidates of a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypeAlias, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.chat_template import as_conversation, as_messages
from data_pipeline.errors import DataError, one_line
from data_pipeline.trajectory import Message, Trajectory
from jaxprm import config as config_lib
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.scoring.engine import bucket_of
from jaxprm.scoring.scorer import PreparedCandidates, Scorer

Conversation: TypeAlias = Sequence[Message | Mapping[str, Any]]
Tools: TypeAlias = list[dict[str, Any]]


class StepScore(TypedDict):
    """A step of a conversation. message: index of its message; progress: None for the first step."""

    message: int
    promise: float
    progress: float | None


class ConversationScore(TypedDict):
    """Scores of a conversation: its steps [S], and the promise of the last one.

    A conversation that cannot be scored has an error, no steps, and the score -inf.
    """

    steps: list[StepScore]
    score: float
    error: NotRequired[str]


class _Score(NamedTuple):
    promise: float
    progress: float | None


class ActionScore(_Score):
    """Score of an action: a pair of promise and progress.

    Args:
      promise: expected outcome of the episode after the action, in the units of the training outcomes. -inf if the
        action cannot be scored, so that it is never the best one.
      progress: promise after the action minus promise before it. None for the first step of a conversation, and for a
        model with a discount, whose promises do not define it.

    Attributes:
      error: why the action cannot be scored; None if it was.
    """

    # Not a third field: programs unpack the pair.
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> ActionScore:
        """The score of an action that cannot be scored."""
        score = cls(-math.inf, None)
        score.error = error
        return score


class Question(NamedTuple):
    """Candidates of one state, for `Model.answer`.

    Args:
      candidates: the valid ones, encoded.
      last: the step before them, if progress is defined.
      errors: of the others, by their index among all candidates.
    """

    candidates: PreparedCandidates
    last: PreparedCandidates | None
    errors: dict[int, str]

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that has to be computed; 0 if all scores are in memory."""
        return max(self.candidates.longest, self.last.longest if self.last else 0)

    def within(self, limit: int, why: str) -> Question:
        """The same, with the error `why` for candidates whose conversations have more than `limit` tokens."""
        # With the candidates of a conversation that is itself too long, its last step goes too.
        last = self.last and self.last.within(limit, why)
        return self._replace(candidates=self.candidates.within(limit, why), last=last)


class Model:
    """A reward model. Made by `load`. Not thread-safe: give each thread its own.

    recipe: the content of reward_model.json, such as `value_range` and `max_tokens`; see docs/formats.md.
    """

    recipe: dict[str, Any]

    def __init__(self, scorer: Scorer, recipe: dict[str, Any]) -> None:
        self.recipe = recipe
        self._scorer = scorer
        self._has_progress = loading.defines_progress(recipe)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far: `encoded`, `reused` from the cache, encoded `again`, and `slots` with padding.

        docs/search.md defines them.
        """
        return self._scorer.usage

    def score(self, trajectories: Sequence[Trajectory | Mapping[str, Any] | Conversation]) -> list[ConversationScore]:
        """Promise and progress of every step of finished conversations.

        Args:
          trajectories: each is a Trajectory, a dictionary with "messages" (and perhaps "tools"), or a list of messages.

        Returns {"steps": [{"message", "promise", "progress"}], "score"} for each, in order. "message" is the index of
        the step's message; "score" is the promise of the last step. A trajectory that has no step, cannot be encoded or
        is too long costs no other: it has "error", no steps, and the score -inf.

        Raises UserError if `trajectories` is not a list of trajectories.

        Example:

            messages = [{"role": "user", "content": "Goal: torch"}, {"role": "assistant", "content": "get 1 coal"}]
            model.score([messages])[0]["steps"]  # [{"message": 1, "promise": 0.27, "progress": None}]
        """
        # A single conversation would pass for a list: each of its messages would be taken for a trajectory.
        if isinstance(trajectories, (Trajectory, Mapping)) or any(_is_message(item) for item in trajectories):
            raise UserError("score takes a list of trajectories; put a single one into a list: score([messages])")
        # Encoded first, because all are scored in common batches.
        scores: list[ConversationScore] = []
        names, encoded, indices = [], [], []
        for index, trajectory in enumerate(trajectories):
            scores.append(ConversationScore(steps=[], score=-math.inf))
            name = f"trajectory {index}"
            try:
                messages, tools, name = _parts(trajectory, name)
                # A message of the caller may become several, and a step is named by the caller's.
                checked, origins = as_conversation(messages, name)
                conversation = self._scorer.encoder.trajectory(checked, row=name, tools=tools)
                bucket_of(len(conversation.tokens), name)
            except (UserError, DataError) as error:
                scores[-1]["error"] = one_line(error)
                continue
            names.append(name)
            encoded.append(conversation._replace(message_indices=np.asarray(origins)[conversation.message_indices]))
            indices.append(index)
        promises = self._scorer.score_encoded(encoded, names)
        for index, conversation, of_steps in zip(indices, encoded, promises, strict=True):
            table = loading.step_table(conversation.message_indices, of_steps, progress=self._has_progress)
            scores[index] = ConversationScore(steps=table["steps"], score=table["score"])
        return scores

    def score_actions(
        self, messages: Conversation, candidates: Sequence[str | Mapping[str, Any]], tools: Tools | None = None
    ) -> list[ActionScore]:
        """Promise and progress of each candidate for the next assistant turn: N scores, in order.

        The result equals the last step of `score([[*messages, candidate]])`, but the conversation is encoded once, and
        tokens that earlier calls have read come from the cache.

        Args:
          messages: the conversation so far, up to the point where the agent acts.
          candidates: texts, or assistant messages with "content" or "tool_calls".
          tools: definitions for the chat template, as the model was trained with.

        A candidate that is no assistant message, cannot be encoded or is too long costs no other: its score has
        `error`, and the promise -inf.

        Raises UserError or DataError for a conversation that cannot be encoded.

        Example:

            scores = model.score_actions(messages, ["Action: get 1 coal", "Action: craft torch"])
            best = max(range(len(scores)), key=lambda index: scores[index].promise)
        """
        return self.answer([self.question(messages, candidates, tools)])[0]

    def question(
        self, messages: Conversation, candidates: Sequence[str | Mapping[str, Any]], tools: Tools | None = None
    ) -> Question:
        """Encodes the arguments of `score_actions`, to be computed with others in one call of `answer`.

        Raises as `score_actions`.
        """
        if isinstance(candidates, (str, Mapping)):
            raise UserError("score_actions takes a list of candidates; put a single one into a list")
        history = _plain(messages, "messages")
        actions: dict[int, str | dict[str, Any]] = {}
        errors: dict[int, str] = {}
        for index, candidate in enumerate(candidates):
            try:
                actions[index] = _action(candidate, f"candidate {index}")
            except (UserError, DataError) as error:
                errors[index] = one_line(error)
        last = self._last_step(history, tools) if self._has_progress and actions else None
        return Question(self._scorer.prepare(history, list(actions.values()), tools, list(actions)), last, errors)

    def answer(self, questions: Sequence[Question]) -> list[list[ActionScore]]:
        """Scores of the candidates of several states, computed together: N scores for each question."""
        # Last steps first: the candidates then find their conversations in the cache.
        before = iter(self._scorer.score_prepared([question.last for question in questions if question.last]))
        promises = self._scorer.score_prepared([question.candidates for question in questions])
        last = [next(before)[0] if question.last else None for question in questions]
        last = [None if value is None or value == -math.inf else value for value in last]
        return [_action_scores(*each) for each in zip(questions, promises, last, strict=True)]

    def _last_step(self, history: list[dict[str, Any]], tools: Tools | None) -> PreparedCandidates | None:
        """The last step as a candidate: in an agent's loop it was one, so its score is in memory."""
        steps = [
            index
            for index, message in enumerate(history)
            if message["role"] == "assistant" and message.get("step", True)
        ]
        return self._scorer.prepare(history[: steps[-1]], [history[steps[-1]]], tools) if steps else None


def load(
    directory: str | Path,
    *,
    rows: int = 8,
    max_tokens: int = 2048,
    dtype: str = "float32",
    chat_template: str | None = None,
    reasoning: Literal["keep", "drop"] | None = None,
    special_tokens: Literal["error", "break"] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Model:
    """Loads a reward model.

    Args:
      directory: a model directory, the output or a checkpoint of a training run, a directory with exactly one reward
        model below it, or a Hub id ("org/name" or "org/name@revision").
      rows: states whose candidates are scored at once.
      max_tokens: tokens of the longest conversation that `score_actions` caches; longer ones are encoded in full, each
        time. The memory of the cache grows with `rows` and `max_tokens`, up to 2 GiB.
      dtype: of the arithmetic and of the cache, "float32" or "bfloat16".
      chat_template: used in place of the model's own: "chatml", "llama3", or a file. For models trained elsewhere whose
        template rewrites earlier turns.
      reasoning: what to do with what the agent thought, for models from elsewhere. Others do as in training.
      special_tokens: "break" writes a space into special tokens in the text of messages, which are an error otherwise.
      mesh: devices of this process that share the work, as in a config: {"tensor": 4} splits parameters and cache four
        ways. None is the first device alone.

    Raises UserError or DataError if there is no model or several, if the model or its tokenizer cannot be read, and for
    a mesh or dtype that does not fit.

    Example:

        model = jaxprm.load("runs/demo", dtype="bfloat16")
    """
    model = find_model(directory)
    scorer = loading.load_scorer(
        model,
        rows=rows,
        max_tokens=max_tokens,
        dtype=dtype,
        template=chat_template,
        reasoning=reasoning,
        special_tokens=special_tokens,
        mesh=None if mesh is None else config_lib.mesh_of_sizes(mesh, where="mesh"),
    )
    return Model(scorer, read_recipe(model))


def _parts(
    trajectory: Trajectory | Mapping[str, Any] | Conversation, name: str
) -> tuple[Conversation, Tools | None, str]:
    """(messages, tools, name in error messages) of a trajectory in any of its forms."""
    if isinstance(trajectory, Trajectory):
        return trajectory.messages, trajectory.tools, trajectory.id
    if isinstance(trajectory, Mapping):
        if "messages" not in trajectory:
            raise UserError(f'{name}: has no "messages", only {sorted(trajectory)}')
        if trajectory.get("system"):
            raise UserError(f"{name}: `system` is next to the messages; make it the first of them")
        return trajectory["messages"], trajectory.get("tools"), str(trajectory.get("id") or name)
    return trajectory, None, name


def _action_scores(question: Question, promises: NDArray[np.float32], before: np.float32 | None) -> list[ActionScore]:
    """The scores of all candidates: those with a promise, and those with an error."""
    errors, computed, scores = question.errors | question.candidates.errors, iter(promises), []
    for index in range(len(promises) + len(question.errors)):
        # Candidates that were encoded have a place among the promises, if only for -inf.
        promise = np.float32(-np.inf) if index in question.errors else next(computed)
        if index in errors:
            scores.append(ActionScore.failed(errors[index]))
        else:
            gain = None if before is None else loading.shortest_float(promise - before)
            scores.append(ActionScore(loading.shortest_float(promise), gain))
    return scores


def _is_message(value: object) -> bool:
    return isinstance(value, Message) or (isinstance(value, Mapping) and "role" in value and "messages" not in value)


def _plain(messages: Conversation, name: str) -> list[dict[str, Any]]:
    """Checked messages as dictionaries: one form, so that equal conversations have equal hashes."""
    if not messages:
        raise UserError(f"{name}: is empty; a conversation begins with the task, as a user message")
    plain: list[dict[str, Any]] = msgspec.to_builtins(as_messages(messages, name))
    return plain


def _action(candidate: str | Mapping[str, Any], name: str) -> str | dict[str, Any]:
    if isinstance(candidate, str):
        return candidate
    action, *more = _plain([candidate], name)
    if more:
        raise UserError(f"{name}: is {1 + len(more)} messages; give one assistant message")
    if action["role"] != "assistant" or not action.get("step", True):
        raise UserError(f"{name}: must be an assistant message that is a step, got role {action['role']}")
    return action
