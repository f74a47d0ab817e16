"""Promise of every step of conversations: finished ones in one pass, candidates after what is known of their state."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from data_pipeline.encode import Encoder
from jaxprm.model.layout import ONE_DEVICE, Layout
from jaxprm.model.prefix_bank import Shapes, bucket
from jaxprm.policies.protocol import prefix_hash
from jaxprm.scoring.engine import CACHE_BYTES, LENGTH_BUCKETS, Engine

# Rows of what follows a shared prompt; a conversation goes into the narrowest that holds it.
FINISHED_WIDTHS = (128, 256, 512, 1024)


class Scorer:
    """A reward model ready to score.

    rows: candidates' rows computed at once; max_tokens: the longest conversation for `score_actions`; dtype:
    "float32" or "bfloat16", of the arithmetic, whatever the parameters are kept in; cache_bytes: memory for
    conversations that may go on; shapes: lengths to compile for; layout: on the mesh where the parameters lie.
    `usage` counts tokens, see Engine; scores are remembered by conversation and candidate.
    """

    def __init__(
        self,
        config,
        parameters: Any,
        encoder: Encoder,
        *,
        rows: int = 64,
        max_tokens: int = 1024,
        dtype: str = "float32",
        cache_bytes: int = CACHE_BYTES,
        shapes: Shapes = Shapes(),
        layout: Layout = ONE_DEVICE,
    ):
        self.config, self.parameters, self.encoder, self.max_tokens = config, parameters, encoder, max_tokens
        self.engine = Engine(
            config, parameters, rows=rows, max_tokens=max_tokens, shapes=shapes, cache_bytes=cache_bytes,
            dtype=jnp.dtype(dtype), layout=layout,
        )  # fmt: skip
        self._memory: dict[tuple[str, str], float] = {}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, padding not counted, and more: see Engine.usage."""
        return self.engine.usage

    def forget(self) -> None:
        """Forgets scores and conversations: what is asked next costs, and rounds, as if it were the first."""
        self._memory.clear()
        self.engine.forget()

    def score(
        self, trajectories: Sequence[Sequence], *, tools: Sequence | None = None, rows: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Promise of every step of finished conversations: a list of float32 [S].

        Raises DataError for a conversation that cannot be encoded, UserError for one longer than the largest bucket.
        """
        names = rows or [f"trajectory {index}" for index in range(len(trajectories))]
        tools = tools or [None] * len(trajectories)
        encoded = [
            self.encoder.trajectory(messages, row=name, tools=tool)
            for messages, name, tool in zip(trajectories, names, tools, strict=True)
        ]
        return self.score_encoded(encoded, names)

    def score_encoded(self, encoded: Sequence, names: Sequence[str]) -> list[np.ndarray]:
        """As `score`, for conversations that are encoded already.

        A prompt that several share is encoded once, where their rows are narrower without it.
        """
        prompts = [one.tokens[: one.state_positions[0] + 1] for one in encoded]
        sharing = Counter(prompt.tobytes() for prompt in prompts)
        of_width: dict[int | None, list[int]] = {}
        for index, (one, prompt) in enumerate(zip(encoded, prompts, strict=True)):
            rest = len(one.tokens) - len(prompt)
            width = bucket(rest, FINISHED_WIDTHS)
            narrower = rest <= width < bucket(len(one.tokens), LENGTH_BUCKETS)
            shares = narrower and sharing[prompt.tobytes()] > 1 and len(prompt) <= self.max_tokens
            of_width.setdefault(width if shares else None, []).append(index)
        promises: list[np.ndarray] = [np.empty(0, np.float32)] * len(encoded)
        for width, indices in of_width.items():
            starts = [len(prompts[index]) if width else 0 for index in indices]
            rests = [encoded[index].tokens[start:] for index, start in zip(indices, starts, strict=True)]
            if width:
                jobs = [(prompts[index], rest) for index, rest in zip(indices, rests, strict=True)]
                values = self.engine.after(jobs, width=width)
            else:
                values = self.engine.whole(rests, [names[index] for index in indices])
            for index, start, found in zip(indices, starts, values, strict=True):
                promises[index] = found[encoded[index].read_positions - start]
        return promises

    def score_actions(
        self,
        states: Sequence[Sequence[dict]],
        candidates: Sequence[Sequence[str | dict]],
        *,
        tools: Sequence[list[dict] | None] | None = None,
    ) -> list[np.ndarray]:
        """Promise of candidate actions: for each conversation a float32 [N], the value if that were the next turn.

        A candidate is the text of an assistant message, or the message itself. tools: those of each conversation.
        """
        tools = tools or [None] * len(states)
        actions = [[_as_message(candidate) for candidate in some] for some in candidates]
        names = [_state_name(messages, tool) for messages, tool in zip(states, tools, strict=True)]
        keys = [[(name, _action_name(action)) for action in some] for name, some in zip(names, actions, strict=True)]
        prefixes: dict[str, np.ndarray] = {}
        cached: list[tuple[tuple[str, str], np.ndarray]] = []
        whole: list[tuple[tuple[str, str], Any]] = []
        seen: set[tuple[str, str]] = set()
        for messages, tool, name, some, some_keys in zip(states, tools, names, actions, keys, strict=True):
            for action, key in zip(some, some_keys, strict=True):
                if key in self._memory or key in seen:
                    continue
                seen.add(key)
                if name not in prefixes:
                    prefixes[name] = np.asarray(self.encoder.prompt(messages, tools=tool), np.int32)
                one = self.encoder.trajectory([*messages, action], row="candidate", tools=tool)
                self._sort_out(key, one, prefixes[name], cached, whole)
        scores = self.score_encoded([one for _, one in whole], ["candidate"] * len(whole))
        for (key, _), values in zip(whole, scores, strict=True):
            self._memory[key] = float(values[-1])
        found = self.engine.after([(prefixes[name], rest) for (name, _), rest in cached])
        self._memory |= {key: float(values[-1]) for (key, _), values in zip(cached, found, strict=True)}
        return [np.asarray([self._memory[key] for key in some], np.float32) for some in keys]

    def _sort_out(self, key, one, prefix, cached, whole) -> None:
        """A candidate that continues its prompt token by token goes after the cache; any other is scored whole."""
        rest = one.tokens[len(prefix) :]
        if np.array_equal(one.tokens[: len(prefix)], prefix) and self.engine.fits(prefix, rest):
            cached.append((key, rest))
        else:
            whole.append((key, one))


def _as_message(candidate: str | dict) -> dict:
    return {"role": "assistant", "content": candidate} if isinstance(candidate, str) else candidate


def _state_name(messages: Sequence[dict], tools: list[dict] | None) -> str:
    return prefix_hash(messages) if not tools else f"{prefix_hash(messages)} {json.dumps(tools, sort_keys=True)}"


def _action_name(message: dict) -> str:
    """A plain text names itself; any other message, with its calls of tools or its parts, is named by its hash."""
    plain = message.keys() == {"role", "content"} and isinstance(message["content"], str)
    return "text " + message["content"] if plain else "message " + prefix_hash([message])
