"""Promise of every step of conversations: finished ones in one pass, candidates after what is known of their state."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from data_pipeline.encode import Encoded, Encoder
from jaxprm.model.prefix_bank import Shapes, bucket
from jaxprm.model.sharding import ONE_DEVICE, Layout
from jaxprm.policies.protocol import prefix_hash
from jaxprm.scoring.engine import CACHE_BYTES, LENGTH_BUCKETS, Engine

# Rows of what follows a shared prompt; a conversation goes into the narrowest that holds it.
FINISHED_WIDTHS = (128, 256, 512, 1024)
# Scores of candidates, of which the ones used last are remembered; a few hundred bytes each.
MAX_CACHED = 1 << 16

# Names of a state and of a candidate.
Key = tuple[str, str]


class PreparedConversation(NamedTuple):
    """Candidates of one state, by key in order: those `known`, those to score `after` their prefix, and `whole`."""

    keys: list[Key]
    known: dict[Key, float]
    after: dict[Key, tuple[np.ndarray, np.ndarray]]
    whole: dict[Key, Encoded]

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that is to be scored."""
        lengths = [len(prefix) + len(rest) for prefix, rest in self.after.values()]
        return max([*lengths, *(len(one.tokens) for one in self.whole.values())], default=0)


class Scorer:
    """A reward model ready to score.

    rows: candidates' rows computed at once; max_tokens: the longest conversation for `score_actions`; dtype:
    "float32" or "bfloat16", of the arithmetic, whatever the parameters are kept in; cache_bytes: memory for
    conversations that may go on; shapes: lengths to compile for; layout: on the mesh where the parameters lie.
    `usage` counts tokens, see Engine; the last REMEMBERED scores of candidates are remembered.
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
            config,
            parameters,
            rows=rows,
            max_tokens=max_tokens,
            shapes=shapes,
            cache_bytes=cache_bytes,
            dtype=jnp.dtype(dtype),
            layout=layout,
        )
        self._memory: dict[Key, float] = {}

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
                values = self.engine.score_continuations(jobs, width=width)
            else:
                values = self.engine.score_full(rests, [names[index] for index in indices])
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
        return self.score_prepared([self.prepare(*one) for one in zip(states, candidates, tools, strict=True)])

    def prepare(
        self, state: Sequence[dict], candidates: Sequence[str | dict], tools: list[dict] | None = None
    ) -> PreparedConversation:
        """A state's candidates encoded, but for those whose scores are remembered: nothing is computed yet.

        Raises DataError for what cannot be encoded.
        """
        name = _state_name(state, tools)
        actions = [_as_message(candidate) for candidate in candidates]
        made = PreparedConversation([(name, prefix_hash([action])) for action in actions], {}, {}, {})
        prefix = None
        for key, action in zip(made.keys, actions, strict=True):
            if key in self._memory:
                made.known[key] = self._memory[key] = self._memory.pop(key)  # used last
            elif key not in made.after and key not in made.whole:
                if prefix is None:
                    prefix = np.asarray(self.encoder.prompt(state, tools=tools), np.int32)
                one = self.encoder.trajectory([*state, action], row="candidate", tools=tools)
                self._sort_out(key, one, prefix, made)
        return made

    def score_prepared(self, prepared: Sequence[PreparedConversation]) -> list[np.ndarray]:
        """Promise of the candidates of each, a float32 [N], all computed at once; what several ask for, only once."""
        known = {key: value for one in prepared for key, value in one.known.items()}
        whole = {key: one for some in prepared for key, one in some.whole.items()}
        after = {key: job for some in prepared for key, job in some.after.items()}
        found = dict(zip(whole, self.score_encoded([*whole.values()], ["candidate"] * len(whole)), strict=True))
        found |= zip(after, self.engine.score_continuations([*after.values()]), strict=True)
        new = {key: float(values[-1]) for key, values in found.items()}
        self._memory |= new
        while len(self._memory) > MAX_CACHED:
            del self._memory[next(iter(self._memory))]
        return [np.asarray([(new if key in new else known)[key] for key in one.keys], np.float32) for one in prepared]

    def _sort_out(self, key: Key, one: Encoded, prefix: np.ndarray, made: PreparedConversation) -> None:
        """A candidate that continues its prompt token by token goes after the cache; any other is scored whole."""
        rest = one.tokens[len(prefix) :]
        if np.array_equal(one.tokens[: len(prefix)], prefix) and self.engine.fits(prefix, rest):
            made.after[key] = (prefix, rest)
        else:
            made.whole[key] = one


def _as_message(candidate: str | dict) -> dict:
    return {"role": "assistant", "content": candidate} if isinstance(candidate, str) else candidate


def _state_name(messages: Sequence[dict], tools: list[dict] | None) -> str:
    """Of one length however long the tools are: many names are remembered."""
    of_tools = hashlib.sha256(json.dumps(tools, sort_keys=True).encode()).hexdigest()[:32] if tools else ""
    return prefix_hash(messages) + of_tools
