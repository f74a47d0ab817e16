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
    """One assistant turn. tokens: how many were generated; log_probability: of the whole turn, where known."""

    text: str
    tokens: int
    log_probability: float | None = None
    stop: Literal["end", "length"] = "end"


class Policy(Protocol):
    """Batched over states. `usage` counts tokens encoded and generated since the start."""

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


def candidate_seed(seed: int, task: str, prefix: str, index: int) -> tuple[int, int]:
    """Two 32-bit words that depend on nothing but what they are called with."""
    digest = hashlib.sha256(f"{seed}\x1f{task}\x1f{prefix}\x1f{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
