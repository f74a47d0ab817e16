"""Promise of every step of conversations, and of candidate actions after cached states.

Shapes: S steps of a conversation, N candidates of a state, T tokens of a conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from cachetools import LRUCache

from data_pipeline.encode import Encoded, Encoder
from data_pipeline.errors import DataError, one_line
from jaxprm.errors import UserError
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import Shapes, bucket
from jaxprm.model.sharding import ONE_DEVICE, Layout
from jaxprm.policies.protocol import prefix_hash
from jaxprm.scoring.engine import CACHE_BYTES, LENGTH_BUCKETS, Engine, bucket_of

# Row widths for what follows a shared prompt; a conversation goes into the narrowest that holds it.
FINISHED_WIDTHS = (128, 256, 512, 1024)
# Scores of candidates in memory, a few hundred bytes each; the least recently used are dropped.
MAX_CACHED = 1 << 16

# Hashes of a state and of a candidate.
Key = tuple[str, str]


class PreparedCandidates(NamedTuple):
    """Encoded candidates of one state: `keys` and `indices` have one entry a candidate, the others distinct keys.

    Args:
      indices: number of each candidate in `errors` and in messages.
      scores: of candidates whose score was in memory.
      continuations: (prefix [P], continuation [N]) of candidates to score after the cached prefix.
      conversations: those that have to be encoded in full, since they do not continue their prompt token by token.
      errors: of candidates that cannot be scored, by number. Their keys are in no other field.
    """

    keys: list[Key]
    indices: list[int]
    scores: dict[Key, float]
    continuations: dict[Key, tuple[np.ndarray, np.ndarray]]
    conversations: dict[Key, Encoded]
    errors: dict[int, str]

    def within(self, limit: int, why: str) -> PreparedCandidates:
        """The same without candidates whose conversations have more than `limit` tokens: these have the error `why`."""
        short = {key: job for key, job in self.continuations.items() if len(job[0]) + len(job[1]) <= limit}
        conversations = {key: item for key, item in self.conversations.items() if len(item.tokens) <= limit}
        dropped = {*self.continuations, *self.conversations} - {*short, *conversations}
        errors = {
            index: f"candidate {index}: {why}"
            for index, key in zip(self.indices, self.keys, strict=True)
            if key in dropped
        }
        return self._replace(continuations=short, conversations=conversations, errors=self.errors | errors)

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that has to be computed; 0 if there is none."""
        lengths = [len(prefix) + len(continuation) for prefix, continuation in self.continuations.values()]
        return max([*lengths, *(len(encoded.tokens) for encoded in self.conversations.values())], default=0)


class Scorer:
    """A reward model that scores conversations and candidate actions. Not thread-safe.

    Args:
      parameters: of the reward model, transformer and head.
      rows: rows of candidates computed at once.
      max_tokens: longest conversation that `score_actions` caches; longer ones are encoded in full every time.
      dtype: of the arithmetic, "float32" or "bfloat16", whatever the parameters are stored in.
      cache_bytes: bound on the memory of cached keys and values.
      shapes: lengths to compile for.
      layout: of the mesh that holds the parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
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
        self._cache: LRUCache[Key, float] = LRUCache(MAX_CACHED)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far: `encoded`, `reused` from the cache, encoded `again`, and `slots` with padding.

        See docs/search.md; the engine calls them by longer names, see engine.TokenCounts.
        """
        counts = self.engine.usage
        return {
            "encoded": counts.encoded_tokens,
            "reused": counts.cached_tokens,
            "again": counts.recomputed_tokens,
            "slots": counts.padded_tokens,
        }

    def bound_caches(self, *, scores: int, renderings: int, texts: int) -> None:
        """Empties the caches of the host, and bounds them: a number of scores, bytes of renderings and of texts."""
        self._cache = LRUCache(scores)
        self.encoder.bound_caches(renderings=renderings, texts=texts)

    def isolate(self, owner: int) -> None:
        """Separates the caches: what follows reads and fills only those of this owner, an integer; 0 at first."""
        if owner != self.engine.owner:
            self.engine.owner = owner
            # These are not kept apart by owner: they save little next to the model.
            self.encoder.forget()

    def forget(self) -> None:
        """Empties all caches: the next call costs and rounds as the first one did."""
        self._cache.clear()
        self.engine.forget()

    def score(
        self, trajectories: Sequence[Sequence], *, tools: Sequence | None = None, rows: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Promise of every step of finished conversations: float32 [S] each.

        tools: of each conversation; rows: its name in error messages.

        Raises DataError for a conversation that cannot be encoded, UserError for one longer than the largest bucket.
        """
        names = rows or [f"trajectory {index}" for index in range(len(trajectories))]
        tools = tools or [None] * len(trajectories)
        encoded = [
            self.encoder.trajectory(messages, row=name, tools=tool)
            for messages, name, tool in zip(trajectories, names, tools, strict=True)
        ]
        return self.score_encoded(encoded, names)

    def score_encoded(self, encoded: Sequence[Encoded], names: Sequence[str]) -> list[np.ndarray]:
        """As `score`, for encoded conversations.

        A prompt that several conversations share is encoded once, if their rows are narrower without it.
        """
        prompts = [conversation.tokens[: conversation.state_positions[0] + 1] for conversation in encoded]
        sharing = Counter(prompt.tobytes() for prompt in prompts)
        # Indices of the conversations by the width of their rows; None: in full, prompt included.
        of_width: dict[int | None, list[int]] = {}
        for index, (conversation, prompt) in enumerate(zip(encoded, prompts, strict=True)):
            length = len(conversation.tokens) - len(prompt)
            width = bucket(length, FINISHED_WIDTHS)
            # Otherwise the row costs the same with the prompt as without it.
            is_narrower = length <= width < bucket(len(conversation.tokens), LENGTH_BUCKETS)
            shares = is_narrower and sharing[prompt.tobytes()] > 1 and len(prompt) <= self.max_tokens
            of_width.setdefault(width if shares else None, []).append(index)
        promises: list[np.ndarray] = [np.empty(0, np.float32)] * len(encoded)
        for width, indices in of_width.items():
            starts = [len(prompts[index]) if width else 0 for index in indices]
            sequences = [encoded[index].tokens[start:] for index, start in zip(indices, starts, strict=True)]
            if width:
                jobs = [(prompts[index], tokens) for index, tokens in zip(indices, sequences, strict=True)]
                values = self.engine.score_continuations(jobs, width=width)
            else:
                values = self.engine.score_full(sequences, [names[index] for index in indices])
            for index, start, of_tokens in zip(indices, starts, values, strict=True):
                promises[index] = of_tokens[encoded[index].read_positions - start]
        return promises

    def score_actions(
        self,
        states: Sequence[Sequence[dict]],
        candidates: Sequence[Sequence[str | dict]],
        *,
        tools: Sequence[list[dict] | None] | None = None,
    ) -> list[np.ndarray]:
        """Promise of candidate actions: float32 [N] for each state, the value after that action.

        A candidate is the text of an assistant message, or the message itself. tools: of each state. A candidate that
        cannot be encoded, or whose conversation is longer than the largest bucket, has -inf; `refusal` says why.
        """
        tools = tools or [None] * len(states)
        return self.score_prepared([self._prepare(*job) for job in zip(states, candidates, tools, strict=True)])

    def refusal(self, state: Sequence[dict], candidate: str | dict, tools: list[dict] | None = None) -> str | None:
        """Why `score_actions` gives a candidate -inf, in one line; None if it can be scored."""
        return self._prepare(state, [candidate], tools).errors.get(0)

    def _prepare(
        self, state: Sequence[dict], candidates: Sequence[str | dict], tools: list[dict] | None
    ) -> PreparedCandidates:
        """As `prepare`; for a state that cannot be encoded, all candidates have its error."""
        try:
            return self.prepare(state, candidates, tools)
        except DataError as error:
            keys = [("", str(index)) for index in range(len(candidates))]
            indices = list(range(len(candidates)))
            return PreparedCandidates(keys, indices, {}, {}, {}, dict.fromkeys(indices, one_line(error)))

    def prepare(
        self,
        state: Sequence[dict],
        candidates: Sequence[str | dict],
        tools: list[dict] | None = None,
        indices: Sequence[int] | None = None,
    ) -> PreparedCandidates:
        """Encodes candidates of a state, except those whose scores are in memory. Computes nothing on the device.

        A candidate that cannot be scored costs no other: it is in `errors`. indices: numbers of the candidates there
        and in messages; by default from 0.

        Raises DataError if the state cannot be encoded.
        """
        state_key = state_hash(state, tools) + (f"/{self.engine.owner:x}" if self.engine.owner else "")
        actions = [as_message(candidate) for candidate in candidates]
        indices = range(len(actions)) if indices is None else indices
        keys = [(state_key, prefix_hash([action])) for action in actions]
        prepared = PreparedCandidates(keys, list(indices), {}, {}, {}, {})
        prefix = None
        for index, key, action in zip(indices, keys, actions, strict=True):
            if key in self._cache:
                prepared.scores[key] = self._cache[key]
            elif key not in prepared.continuations and key not in prepared.conversations:
                if prefix is None:
                    prefix = np.asarray(self.encoder.prompt(state, tools=tools), np.int32)
                name = f"candidate {index}"
                try:
                    encoded = self.encoder.trajectory([*state, action], row=name, tools=tools)
                    bucket_of(len(encoded.tokens), name)
                except (DataError, UserError) as error:
                    prepared.errors[index] = one_line(error)
                    continue
                continuation = encoded.tokens[len(prefix) :]
                # A template may write the prompt of a turn otherwise than the start of the finished turn.
                continues = np.array_equal(encoded.tokens[: len(prefix)], prefix)
                if continues and self.engine.fits(prefix, continuation):
                    prepared.continuations[key] = (prefix, continuation)
                else:
                    prepared.conversations[key] = encoded
        return prepared

    def score_prepared(self, prepared: Sequence[PreparedCandidates]) -> list[np.ndarray]:
        """Promise of the candidates of each state, float32 [N]: all computed at once, equal ones once.

        A candidate with an error has -inf.
        """
        cached = {key: value for state in prepared for key, value in state.scores.items()}
        conversations = {key: encoded for state in prepared for key, encoded in state.conversations.items()}
        continuations = {key: job for state in prepared for key, job in state.continuations.items()}
        names = ["candidate"] * len(conversations)
        values = dict(zip(conversations, self.score_encoded([*conversations.values()], names), strict=True))
        values |= zip(continuations, self.engine.score_continuations([*continuations.values()]), strict=True)
        # The last value is the promise after the action.
        computed = {key: float(of_tokens[-1]) for key, of_tokens in values.items()}
        self._cache.update(computed)
        # Not from memory, which may have dropped some of these keys already.
        scores = cached | computed
        return [
            np.asarray(
                [
                    -np.inf if index in state.errors else scores[key]
                    for index, key in zip(state.indices, state.keys, strict=True)
                ],
                np.float32,
            )
            for state in prepared
        ]


def as_message(candidate: str | dict) -> dict:
    """A candidate, given as a text or a message, as a message."""
    return {"role": "assistant", "content": candidate} if isinstance(candidate, str) else candidate


def state_hash(messages: Sequence[dict], tools: list[dict] | None) -> str:
    """A hash of everything in a state that a chat template can show."""
    # Tools are hashed too: descriptions of tools are long, and many keys are kept.
    of_tools = hashlib.sha256(json.dumps(tools, sort_keys=True).encode()).hexdigest()[:32] if tools else ""
    return prefix_hash(messages) + of_tools
