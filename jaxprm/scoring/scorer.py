"""Promise of every step, jitted in a few fixed shapes: finished trajectories in one pass, candidates after a cache.

A number does not depend on what else is in the batch: a row reads nothing but itself, and its shape follows from its
own length alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline.encode import Encoder
from jaxprm.errors import UserError
from jaxprm.model import huggingface
from jaxprm.model.prefix_bank import PrefixBank, rows_for, rows_of
from jaxprm.policies.protocol import prefix_hash

LENGTH_BUCKETS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS_A_CALL = 8192
CANDIDATE_WIDTHS = (64, 256)


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def values_of_rows(graph, parameters, tokens, counts, dtype):
    """Values [B, T] of every token of rows [B, T], of which the first counts [B] are real."""
    model = nnx.merge(graph, parameters)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < counts[:, None]).astype(jnp.int32)
    return model.value(model.transformer(tokens, positions, segments, dtype=dtype).hidden)


@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def _values_after(graph, parameters, bank, slots, lengths, tokens, positions, segments, capacity):
    """Values [R, W] of packed candidates, each after its row's cached prefix and blind to its neighbours."""
    model = nnx.merge(graph, parameters)
    cache, dtype = rows_of(bank, slots, lengths, capacity), bank.keys[0].dtype
    return model.value(model.transformer(tokens, lengths[:, None] + positions, segments, (cache,), dtype=dtype).hidden)


class Scorer:
    """A reward model ready to score.

    rows: prefixes held and candidates scored at once; max_tokens: the longest conversation for `score_actions`; dtype:
    "float32" or "bfloat16", of the arithmetic, whatever the parameters are kept in.
    `usage` counts tokens encoded; scores are remembered by conversation and candidate.
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
    ):
        self.config, self.encoder, self.max_tokens, self._dtype = config, encoder, max_tokens, jnp.dtype(dtype)
        self._graph, self._parameters = huggingface.reward_model_graph(config), parameters
        self._rows = rows
        self._bank: PrefixBank | None = None
        self._memory: dict[tuple[str, str], float] = {}
        self._encoded = 0

    @property
    def parameters(self) -> Any:
        """As they were given."""
        return self._parameters

    @property
    def usage(self) -> dict[str, int]:
        """Tokens encoded so far, padding not counted."""
        return {"encoded": self._encoded + (self._bank.tokens_encoded if self._bank else 0)}

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
        """As `score`, for conversations that are encoded already."""
        buckets: dict[int, list[int]] = {}
        for index, (one, name) in enumerate(zip(encoded, names, strict=True)):
            buckets.setdefault(bucket_of(len(one.tokens), name), []).append(index)
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(encoded)
        for bucket, indices in sorted(buckets.items()):
            rows = max(1, TOKENS_A_CALL // bucket)
            for start in range(0, len(indices), rows):
                chunk = indices[start : start + rows]
                tokens, counts = np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32)
                for row, index in enumerate(chunk):
                    counts[row] = len(encoded[index].tokens)
                    tokens[row, : counts[row]] = encoded[index].tokens
                result = np.asarray(values_of_rows(self._graph, self._parameters, tokens, counts, self._dtype))
                self._encoded += int(counts.sum())
                for row, index in enumerate(chunk):
                    values[index] = result[row, encoded[index].read_positions]
        return values

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
        self._score_cached(prefixes, cached)
        return [np.asarray([self._memory[key] for key in some], np.float32) for some in keys]

    def _sort_out(self, key, one, prefix, cached, whole) -> None:
        """A candidate that continues its prompt token by token goes after the cache; any other is scored whole."""
        rest = one.tokens[len(prefix) :]
        continues = np.array_equal(one.tokens[: len(prefix)], prefix) and 0 < len(rest) <= CANDIDATE_WIDTHS[-1]
        if continues and len(one.tokens) <= self.max_tokens:
            cached.append((key, rest))
        else:
            whole.append((key, one))

    def _score_cached(self, prefixes: dict[str, np.ndarray], candidates: list) -> None:
        """Packs candidates into rows of their state, as they come, and scores them some rows at a time."""
        # Rows of alike prefixes share a length bucket.
        candidates.sort(key=lambda item: (len(prefixes[item[0][0]]), item[0][0]))
        rows: list[tuple[str, list]] = []
        for key, rest in candidates:
            name, used = key[0], sum(len(other) for _, other in rows[-1][1]) if rows else 0
            if not rows or rows[-1][0] != name or used + len(rest) > CANDIDATE_WIDTHS[-1]:
                rows.append((name, []))
            rows[-1][1].append((key, rest))
        width_of = {
            id(row): next(w for w in CANDIDATE_WIDTHS if sum(len(rest) for _, rest in row[1]) <= w) for row in rows
        }
        for width in CANDIDATE_WIDTHS:
            group = [row for row in rows if width_of[id(row)] == width]
            size = max(1, self._rows * CANDIDATE_WIDTHS[0] // width)
            for start in range(0, len(group), size):
                some = group[start : start + size]
                self._score_rows(prefixes, some, rows_for(len(some), size), width)

    def _score_rows(self, prefixes, group: list, rows: int, width: int) -> None:
        if self._bank is None:
            trunk, parameters = huggingface.transformer_graph(self.config), self._parameters["transformer"]
            self._bank = PrefixBank(
                trunk, parameters, self.config, slots=4 * self._rows, capacity=self.max_tokens, rows=self._rows,
                dtype=self._dtype,
            )  # fmt: skip
        slots, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        tokens, positions, segments = (np.zeros((rows, width), np.int32) for _ in range(3))
        slots[: len(group)] = self._bank.place([prefixes[name] for name, _ in group])
        ends: list[list[int]] = []
        for row, (name, candidates) in enumerate(group):
            lengths[row], used = len(prefixes[name]), 0
            ends.append([])
            for number, (_, rest) in enumerate(candidates):
                place = slice(used, used := used + len(rest))
                tokens[row, place], positions[row, place], segments[row, place] = rest, np.arange(len(rest)), number + 1
                ends[-1].append(used - 1)
        values = np.asarray(
            _values_after(
                self._graph, self._parameters, self._bank.bank, slots, lengths, tokens, positions, segments,
                capacity=self._bank.bucket(int(lengths.max())),
            )
        )
        self._encoded += int((segments > 0).sum())
        for row, (_, candidates) in enumerate(group):
            for (key, _), end in zip(candidates, ends[row], strict=True):
                self._memory[key] = float(values[row, end])


def _as_message(candidate: str | dict) -> dict:
    return {"role": "assistant", "content": candidate} if isinstance(candidate, str) else candidate


def _state_name(messages: Sequence[dict], tools: list[dict] | None) -> str:
    return prefix_hash(messages) if not tools else f"{prefix_hash(messages)} {json.dumps(tools, sort_keys=True)}"


def _action_name(message: dict) -> str:
    """A plain text names itself; any other message, with its calls of tools or its parts, is named by its hash."""
    plain = message.keys() == {"role", "content"} and isinstance(message["content"], str)
    return "text " + message["content"] if plain else "message " + prefix_hash([message])


def bucket_of(length: int, name: str) -> int:
    """The padded length a conversation is scored at. Raises UserError, with its name, for one that is too long."""
    for bucket in LENGTH_BUCKETS:
        if length <= bucket:
            return bucket
    raise UserError(f"{name}: {length} tokens, more than the {LENGTH_BUCKETS[-1]} that can be scored; shorten it")
