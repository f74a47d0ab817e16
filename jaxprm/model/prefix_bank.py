"""Keys and values of conversation prefixes, found again by their tokens: the one cache behind sampling and scoring.

A conversation grows by a turn at a time, and search forks it. The bank holds one slot a prefix on the device; placing
a longer prefix forks the slot of the longest prefix that is held and encodes only what is new. Slots are reused in
order of last use; what was dropped is encoded again, which costs time and changes nothing.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.model.transformer import Cache, TransformerConfig

# Two widths, since each costs seconds of compilation: a turn, and a long prompt.
CHUNK_WIDTHS = (64, 256)
# Cached lengths compiled for: a call costs what its bucket costs, not what the longest episode would.
CAPACITY_BUCKETS = (0, 192, 384, 640, 1024, 2048, 4096)
# A call with few rows to fill is made this much smaller: the end of every search is.
FEW = 4
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


@functools.partial(jax.jit, static_argnames=("graph", "capacity"), donate_argnames=("bank",))
def _extend(graph, parameters, bank: Cache, source, target, starts, tokens, counts, *, capacity: int) -> Cache:
    """Encodes `counts[r]` of tokens [R, W] after the first `starts[r]` of slot `source[r]` into slot `target[r]`.

    `capacity`, static, is no less than any start: what lies beyond it is neither read nor copied.
    """
    trunk = nnx.merge(graph, parameters)
    width = tokens.shape[1]
    rows = rows_of(bank, source, starts, capacity + width)
    positions = starts[:, None] + jnp.arange(width)
    segments = (jnp.arange(width) < counts[:, None]).astype(jnp.int32)
    output = trunk(tokens, positions, segments, (rows,), dtype=bank.keys[0].dtype)
    grown = rows.append(output.keys, output.values, counts)

    filled = slice(capacity + width)
    keys = (b.at[target, :, :, filled].set(n, mode="drop") for b, n in zip(bank.keys, grown.keys, strict=True))
    values = (b.at[target, :, filled].set(n, mode="drop") for b, n in zip(bank.values, grown.values, strict=True))
    return Cache(tuple(keys), tuple(values), bank.lengths)


def rows_of(bank: Cache, slots, lengths, capacity: int) -> Cache:
    """A working copy of slots, R of them, cut to `capacity`, which is static."""
    keys = tuple(buffer[slots, :, :, :capacity] for buffer in bank.keys)
    values = tuple(buffer[slots, :, :capacity] for buffer in bank.values)
    return Cache(keys, values, lengths)


def rows_for(count: int, most: int) -> int:
    """The rows of a call that has `count` to fill: all, or a quarter of them."""
    few = max(1, most // FEW)
    return few if count <= few else most


class PrefixBank:
    """The bank of one model. Not thread-safe; nothing outside sees slots but through `place`.

    slots: prefixes held at once; capacity: the longest prefix in tokens; rows: prefixes encoded at once;
    dtype: what they are computed and kept in.
    `tokens_encoded` counts what was computed, `tokens_reused` what was found.
    """

    def __init__(
        self,
        graph: Any,
        parameters: Any,
        config: TransformerConfig,
        *,
        slots: int,
        capacity: int,
        rows: int,
        dtype: Any = jnp.float32,
    ):
        self._graph, self._parameters = graph, parameters
        self.capacity, self._rows = capacity, rows
        # A chunk is written whole, so a slot has room for one chunk of padding past its end.
        self.bank = Cache.empty(config, slots, capacity + CHUNK_WIDTHS[-1], dtype)
        self._tokens: list[np.ndarray | None] = [None] * slots
        self._keys: list[int] = [0] * slots
        self._index: dict[int, int] = {}
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))
        self.tokens_encoded = 0
        self.tokens_reused = 0

    def bucket(self, length: int) -> int:
        """The capacity to compile for, where `length` cached tokens are read: few, as each costs a compilation."""
        return next((bucket for bucket in CAPACITY_BUCKETS if length <= bucket <= self.capacity), self.capacity)

    def place(self, prefixes: Sequence[np.ndarray]) -> np.ndarray:
        """A slot for each prefix of tokens, int32 [T] each; equal prefixes share one. Holds until the next call.

        Twice as many slots as prefixes are always enough.

        Raises UserError for a prefix longer than the capacity.
        """
        slots, pending, pinned = np.empty(len(prefixes), np.int32), {}, set()
        for index, prefix in enumerate(prefixes):
            if len(prefix) > self.capacity:
                raise UserError(
                    f"a conversation of {len(prefix)} tokens is longer than the cache of {self.capacity}; "
                    "raise policy.max_tokens or shorten the episode"
                )
            name = prefix.tobytes()
            if name in pending:
                slots[index] = pending[name][1]
                continue
            hashes = _prefix_hashes(prefix)
            source, length = self._longest(prefix, hashes)
            self.tokens_reused += length
            if length == len(prefix) and length:
                slots[index] = source
                pinned.add(source)
                self._order.move_to_end(source)
                continue
            if length:
                pinned.add(source)
            target = self._free(pinned, len(prefixes))
            pinned.add(target)
            slots[index] = target
            pending[name] = (source, target, length, prefix)
            self._keys[target] = int(hashes[-1]) if len(prefix) else 0
        self._encode(list(pending.values()))
        for _, target, _, prefix in pending.values():
            self._tokens[target] = prefix
            self._index[self._keys[target]] = target
        return slots

    def _longest(self, prefix: np.ndarray, hashes: np.ndarray) -> tuple[int, int]:
        """(slot, length) of the longest held prefix of `prefix`; length 0 if there is none."""
        for length in range(len(prefix), 0, -1):
            slot = self._index.get(int(hashes[length - 1]))
            if slot is not None and np.array_equal(self._tokens[slot], prefix[:length]):
                self._order.move_to_end(slot)
                return slot, length
        return 0, 0

    def _free(self, pinned: set[int], wanted: int) -> int:
        for slot in self._order:
            if slot not in pinned:
                break
        else:
            raise UserError(f"the cache has {len(self._tokens)} slots, too few for {wanted} prefixes at once")
        if self._tokens[slot] is not None:
            if self._index.get(self._keys[slot]) == slot:
                del self._index[self._keys[slot]]
            self._tokens[slot] = None
        self._order.move_to_end(slot)
        return slot

    def _encode(self, jobs: list[tuple[int, int, int, np.ndarray]]) -> None:
        """Forks and extends, `rows` jobs at a time, alike lengths together; long rests take several chunks."""
        while jobs:
            jobs.sort(key=lambda job: len(job[3]) - job[2])
            longest = len(jobs[-1][3]) - jobs[-1][2]
            width = next((w for w in CHUNK_WIDTHS if longest <= w), CHUNK_WIDTHS[-1])
            # Long chunks go a few rows at a time, so that the two shapes do about the same work.
            rows = rows_for(len(jobs), max(1, self._rows * CHUNK_WIDTHS[0] // width))
            now, jobs = jobs[-rows:], jobs[:-rows]
            source, target = np.zeros(rows, np.int32), np.full(rows, len(self._tokens), np.int32)
            starts, counts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
            tokens = np.zeros((rows, width), np.int32)
            for row, (slot, new, length, prefix) in enumerate(now):
                chunk = prefix[length : length + width]
                source[row], target[row], starts[row], counts[row] = slot, new, length, len(chunk)
                tokens[row, : len(chunk)] = chunk
                if length + len(chunk) < len(prefix):
                    jobs.append((new, new, length + len(chunk), prefix))
            self.bank = _extend(
                self._graph, self._parameters, self.bank, source, target, starts, tokens, counts,
                capacity=self.bucket(int(starts.max())),
            )
            self.tokens_encoded += int(counts.sum())


def _prefix_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every prefix of `tokens`, [T]; a match is confirmed by comparing tokens."""
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(tokens), _HASH_BASE, np.uint64))
        mixed = (np.asarray(tokens, np.uint64) + np.uint64(1)) * powers
        return np.cumsum(mixed, dtype=np.uint64)
