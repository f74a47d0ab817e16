"""The interface of a policy: it proposes actions for states, reproducibly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol


class State(NamedTuple):
    """A point of an episode at which the agent acts.

    Args:
      messages: the conversation so far; the last message is from the user or a tool.
      first: number of the first candidate to draw. Candidates of equal (seed, task, messages, number) are equal,
        whatever else is in the batch.
    """

    task: str
    messages: list[dict[str, Any]]
    first: int = 0


class Action(NamedTuple):
    """One assistant turn.

    Args:
      tokens: number of generated tokens.
      log_probability: of the whole turn at temperature 1, if known.
      stop: "end" if the turn ended by itself, "length" if it was cut at the token limit, "error" if there is no turn;
        then `error` says why, and `text` must not be acted on.
      reasoning: what the agent thought before the text, if it is told. The environment gets the text alone; the
        conversation keeps both.
    """

    text: str
    tokens: int
    log_probability: float | None = None
    stop: Literal["end", "length", "error"] = "end"
    error: str | None = None
    reasoning: str | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The turn as an assistant message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        return message | {"reasoning_content": self.reasoning} if self.reasoning else message


class DrawKey(NamedTuple):
    """Identifies a draw of a policy with a given seed.

    Args:
      prefix: `prefix_hash` of the conversation.
      number: of the candidate in its state.
    """

    task: str
    prefix: str
    number: int
    temperature: float


class Policy(Protocol):
    """Proposes actions for batches of states.

    `usage` counts the tokens encoded and generated so far. A policy may have a method `close()`; a run calls it at its
    end.
    """

    usage: dict[str, int]

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        """n actions for each state."""

    def count_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        """Length of a conversation in the policy's tokens, or an estimate if its tokenizer is unknown."""


def prefix_hash(messages: Sequence[dict[str, Any]]) -> str:
    """A hash of everything in a conversation that a chat template can show: 32 hexadecimal digits."""
    # Sorted keys, and no hash() of Python's: equal in every process, however a dictionary was built.
    text = json.dumps([_shown(message) for message in messages], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _shown(message: dict[str, Any]) -> list[Any]:
    shown = [message["role"], message.get("content"), message.get("tool_calls")]
    shown += [message[field] for field in ("name", "tool_call_id") if message.get(field) is not None]
    if message.get("reasoning_content"):
        # Marked, so that it differs from a name or an id of the same text.
        shown.append(["reasoning", message["reasoning_content"]])
    return shown


def draw_keys(states: Sequence[State], n: int, temperature: float) -> list[list[DrawKey]]:
    """Keys of n draws for each state, in order of their numbers."""
    return [
        [DrawKey(state.task, prefix, number, temperature) for number in range(state.first, state.first + n)]
        for state, prefix in zip(states, [prefix_hash(state.messages) for state in states], strict=True)
    ]


def candidate_seed(seed: int, task: str, prefix: str, index: int) -> tuple[int, int]:
    """Two 32-bit words, a function of the arguments alone: the same in every process and on every machine."""
    # Separated, so that seed 1 with task "2" is not seed 12 with task "".
    digest = hashlib.sha256(f"{seed}\x1f{task}\x1f{prefix}\x1f{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
