"""What a policy is: something that proposes actions for states, reproducibly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol


class State(NamedTuple):
    """A point of an episode at which the agent acts.

    messages: the conversation so far, ending with a user or tool message. `first` numbers the first candidate drawn
    here: candidates of equal (seed, task, messages, number) are equal, whatever else is in the batch.
    """

    task: str
    messages: list[dict]
    first: int = 0


class Action(NamedTuple):
    """One assistant turn. tokens: how many were generated; log_probability: of the whole turn, where known.

    stop: it ended by itself, was cut at the token limit, or was never obtained; then `error` says why, and there is no
    text to act on.
    """

    text: str
    tokens: int
    log_probability: float | None = None
    stop: Literal["end", "length", "error"] = "end"
    error: str | None = None


class DrawKey(NamedTuple):
    """Names a draw: equal ones are the same draw, of a policy with one seed."""

    task: str
    prefix: str
    index: int
    temperature: float


class Policy(Protocol):
    """Batched over states. `usage` counts tokens encoded and generated since the start.

    A run calls `close()` when it ends, where there is one.
    """

    usage: dict[str, int]

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        """n actions for each state."""

    def count_tokens(self, messages: Sequence[dict]) -> int:
        """Length of a conversation in the policy's tokens; an estimate where its tokenizer is not known."""


def prefix_hash(messages: Sequence[dict]) -> str:
    """Names a conversation: whatever a chat template can show, and nothing else."""
    plain = [
        [message["role"], message.get("content"), message.get("tool_calls")]
        + [message[field] for field in ("name", "tool_call_id") if message.get(field) is not None]
        for message in messages
    ]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]


def draw_keys(states: Sequence[State], n: int, temperature: float) -> list[list[DrawKey]]:
    """The n draws asked for in each state, in order."""
    return [
        [DrawKey(state.task, name, index, temperature) for index in range(state.first, state.first + n)]
        for state, name in zip(states, [prefix_hash(state.messages) for state in states], strict=True)
    ]


def candidate_seed(seed: int, task: str, prefix: str, index: int) -> tuple[int, int]:
    """Two 32-bit words that depend on nothing but what they are called with."""
    digest = hashlib.sha256(f"{seed}\x1f{task}\x1f{prefix}\x1f{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
