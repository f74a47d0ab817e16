"""Prefix cache on the device, looked up by tokens: the one KV cache behind sampling and scoring.

A conversation grows by one turn at a time, and search forks it. The bank holds one prefix per slot. To allocate a
longer prefix it copies the slot with the longest common prefix and encodes only the rest. If the turn in between has
been scored as a candidate, its keys and values are copied from a ring buffer of recently scored rows, so that only the
observation is encoded. The least recently used slot is evicted; encoding it again costs time and changes no result.

Letters: N slots or ring rows, R rows of a call, W tokens of a row, T tokens of a chunk, L layers, K kv heads,
E head dim.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.model.config import TransformerConfig
from jaxprm.model.sharding import ONE_DEVICE, Layout
from jaxprm.model.transformer import Cache

# Each shape of a call has two batch sizes: the maximum, and this fraction of it for the end of a search round, when few
# rows are left.
SMALL_CALL_DIVISOR = 8
# Fixed overhead of a call, in tokens. A larger value gives fewer calls with more padding.
CALL_OVERHEAD_TOKENS = 64
# Evicted prefixes whose hashes are kept, to count the tokens that are encoded again.
MAX_DROPPED_PREFIXES = 1 << 14
# Upper bound of the shapes compiled for the turns of a model's data: every slot has room for such a turn past its end.
MAX_TURN_WIDTH = 2048
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


class TurnTokens(NamedTuple):
    """Median and 99th percentile of the lengths of turns, in tokens."""

    median: int
    percentile_99: int


class Shapes(NamedTuple):
    """Lengths in tokens that programs are compiled for, ascending. Each costs seconds to compile; too few cost padding.

    growth: tokens appended to a prefix in one call. packed: widths of rows of continuations to score. ring_width: the
    longest continuation that is copied from the ring into its prefix. lengths: numbers of cached tokens that a call
    reads; a call uses the smallest that covers its longest prefix.
    """

    growth: tuple[int, ...] = (8, 64, 256)
    packed: tuple[int, ...] = (32, 64, 128, 256)
    ring_width: int = 256
    lengths: tuple[int, ...] = (0, 192, 384, 640, 1024, 2048, 4096)

    def for_turns(self, action: TurnTokens, observation: TurnTokens) -> Shapes:
        """Shapes scaled up, to at most MAX_TURN_WIDTH, for data with longer turns.

        99 of 100 observations then fit the widest growth, 99 of 100 actions the ring and the widest row, and four
        median actions share a row.
        """

        def widened(widths: tuple[int, ...], tokens: int) -> tuple[int, ...]:
            power_of_two = 1 << (max(1, tokens) - 1).bit_length()
            widest = max(widths[-1], min(MAX_TURN_WIDTH, power_of_two))
            return tuple(width * widest // widths[-1] for width in widths)

        return self._replace(
            growth=widened(self.growth, observation.percentile_99),
            packed=widened(self.packed, max(action.percentile_99, 4 * action.median)),
            ring_width=widened((self.ring_width,), action.percentile_99)[0],
        )


class Ring(NamedTuple):
    """Ring buffer of the keys and values of the rows scored last: L arrays [N, K, W, E] each.

    Tokens come before features in both, the layout in which a forward pass returns them and `Cache.append` takes them.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def write(self, rows: jax.Array, keys: Sequence[jax.Array], values: Sequence[jax.Array]) -> Ring:
        """Writes chunks, L arrays [R, K, T, E], to the beginning of `rows` [R]; rows out of range are dropped."""

        def put(buffers, chunks):
            pairs = zip(buffers, chunks, strict=True)
            return tuple(b.at[rows, :, : c.shape[2]].set(c.astype(b.dtype), mode="drop") for b, c in pairs)

        return Ring(put(self.keys, keys), put(self.values, values))

    def read(self, rows: jax.Array, offsets: jax.Array, width: int) -> tuple[tuple[jax.Array, ...], ...]:
        """(keys, values), L arrays [R, K, `width`, E] each: the tokens of `rows` [R] from `offsets` [R] on."""
        columns = offsets[:, None] + jnp.arange(width)

        def gather(buffer):
            return buffer.at[rows[:, None], :, columns].get(mode="clip").swapaxes(1, 2)

        return tuple(map(gather, self.keys)), tuple(map(gather, self.values))


class RingEntry(NamedTuple):
    """A scored continuation of the first `base` tokens of a slot.

    Its keys and values are in ring row `row`, from column `offset` on.
    """

    base: int
    tokens: np.ndarray
    row: int
    offset: int


class PrefixBank:
    """Prefixes of one model, in slots on the device. Not thread-safe.

    Args:
        graph, parameters: of a Transformer; on a mesh, parameters have their shardings already.
        slots: number of prefixes held at once.
        capacity: longest prefix, in tokens.
        rows: largest batch of a call that encodes prefixes.
        dtype: of computation and storage.
        ring: number of rows of the ring; 0 remembers no continuations.
        layout: sharding of rows and slots.

    Attributes:
        tokens_encoded: tokens computed. tokens_padded: the same with padding.
        tokens_reused: tokens found in slots or ring.
        tokens_recomputed: those of `tokens_encoded` that an evicted slot held, as far as MAX_DROPPED_PREFIXES knows.
        evictions: number of evicted prefixes.
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
        shapes: Shapes = Shapes(),
        ring: int = 0,
        layout: Layout = ONE_DEVICE,
    ):
        self._graph, self._parameters, self._layout = graph, parameters, layout
        self.slots, self.capacity, self.shapes, self._rows = slots, capacity, shapes, rows
        # One width for all calls, even those without a remembered continuation: the unused room costs little, and
        # another program seconds.
        self._ring_width = shapes.ring_width if ring else 0
        # Chunks are written whole, padding included, so a slot has room for one of each kind past its end.
        padded_capacity = capacity + shapes.growth[-1] + self._ring_width
        self.bank = Cache.empty(config, slots, padded_capacity, dtype, layout.slot_sharding)
        shape = (ring, config.kv_heads, shapes.packed[-1], config.head_dim)
        keys, values = (
            tuple(jnp.zeros(shape, dtype, device=layout.slot_sharding) for _ in range(config.layers)) if ring else ()
            for _ in range(2)
        )
        self.ring, self._ring_rows = Ring(keys, values), ring
        self._ring_next = 0
        self._ring_owner = np.full(ring, -1)  # slot of the entries of each ring row, -1 for none
        self._tokens = np.full((slots, capacity), -1, np.int32)
        self._lengths = np.zeros(slots, np.int64)
        # Who may read a slot: `owner` of the call that filled it.
        self._owners = np.zeros(slots, object)
        self._entries: dict[int, list[RingEntry]] = {}  # by slot
        self._recency: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))  # slots, least recently used first
        self._dropped: dict[int, set[int]] = {}  # hashes of evicted prefixes, by length
        self._dropped_order: deque[tuple[int, int]] = deque()
        self.tokens_encoded = self.tokens_reused = self.tokens_recomputed = self.tokens_padded = self.evictions = 0

    def bucket(self, length: int) -> int:
        """The compiled capacity for calls that read up to `length` cached tokens."""
        capacity = bucket(length, self.shapes.lengths)
        return capacity if length <= capacity <= self.capacity else self.capacity

    def buckets(self, longest: int) -> list[int]:
        """Every compiled capacity for prefixes of up to `longest` tokens."""
        lengths = (*(length for length in self.shapes.lengths if length < longest), longest)
        return sorted({self.bucket(length) for length in lengths})

    def warm_up(self, longest: int, before_each: Callable[[], None] = lambda: None) -> None:
        """Compiles every program that `allocate` runs for prefixes of up to `longest` tokens; slots do not change.

        before_each: called before every program.
        """
        for capacity in self.buckets(longest):
            for width in self.shapes.growth:
                max_rows = equal_work_rows(width, self.shapes.growth, self._rows)
                for rows in {call_rows(1, max_rows, width), max_rows}:
                    zeros = np.zeros(rows, np.int32)
                    # A target out of range is dropped.
                    out_of_range = np.full(rows, self.slots, np.int32)
                    before_each()
                    ring_reads, tokens = np.zeros((3, rows), np.int32), np.zeros((rows, width), np.int32)
                    self._extend(zeros, out_of_range, zeros, ring_reads, tokens, zeros, capacity)

    def allocate(self, prefixes: Sequence[np.ndarray], owner: int = 0) -> np.ndarray:
        """Slots, int32 [len(prefixes)], that begin with the prefixes, int32 [T] each; valid until the next call.

        A bank needs at most twice as many slots as prefixes: one to fork from and one to write to. Only slots that
        were filled for the same `owner` are read, so that the time of a call reveals nothing of another owner's texts.

        Raises:
            UserError: a prefix is longer than the capacity, or there are too few slots.
        """
        for prefix in prefixes:
            if len(prefix) > self.capacity:
                raise UserError(
                    f"a conversation of {len(prefix)} tokens is longer than the cache of {self.capacity}; "
                    "raise policy.max_tokens or shorten the episode"
                )
        distinct = {prefix.tobytes(): prefix for prefix in prefixes}
        matches = {key: self._longest_match(prefix, owner) for key, prefix in distinct.items()}
        # All sources are pinned before anything is evicted: the source of one prefix must not make room for another.
        pinned = {source for source, start, _ in matches.values() if start}
        for source in pinned:
            self._recency.move_to_end(source)
        slots, jobs = {}, []
        for key, prefix in distinct.items():
            source, start, entry = matches[key]
            if start == len(prefix) > 0:
                slots[key] = source
                self.tokens_reused += start
                continue
            target = self._evict(pinned, len(distinct))
            pinned.add(target)
            slots[key] = target
            jobs.append(job := _Job(source, target, start, entry, prefix))
            self.tokens_reused += job.cached_length
            self.tokens_recomputed += self._count_recomputed(prefix, job.cached_length, owner)
        self._encode(jobs)
        for job in jobs:
            self._owners[job.target] = owner
            self._lengths[job.target] = len(job.prefix)
            self._tokens[job.target, : len(job.prefix)] = job.prefix
        return np.asarray([slots[prefix.tobytes()] for prefix in prefixes], np.int32)

    def reserve_ring_rows(self, count: int) -> np.ndarray:
        """The next `count` rows of the ring, int32 [count], whose entries are forgotten.

        All are out of range, so that writes are dropped, if the ring has fewer rows.
        """
        if count > self._ring_rows:
            return np.full(count, self._ring_rows, np.int32)
        rows = (self._ring_next + np.arange(count)) % self._ring_rows
        self._ring_next = (self._ring_next + count) % self._ring_rows
        for row in rows:
            owner = self._ring_owner[row]
            if owner in self._entries:
                self._entries[owner] = [entry for entry in self._entries[owner] if entry.row != row]
            self._ring_owner[row] = -1
        return rows.astype(np.int32)

    def remember(self, slot: int, entry: RingEntry) -> None:
        """Makes a continuation in the ring available to `allocate` until its slot or its ring row is reused."""
        if entry.row < self._ring_rows and len(entry.tokens) <= self.shapes.ring_width:
            self._entries.setdefault(slot, []).append(entry)
            self._ring_owner[entry.row] = slot

    def _longest_match(self, prefix: np.ndarray, owner: int) -> tuple[int, int, RingEntry | None]:
        """(slot, length, entry): tokens of a slot that `prefix` begins with, and a continuation of them if one fits."""
        own = (self._owners == owner).astype(bool)
        same = self._tokens[:, : len(prefix)] == prefix
        common = np.where(same.all(axis=1), len(prefix), np.argmin(same, axis=1)) if len(prefix) else self._lengths * 0
        # Conversations that differ before the middle chunk's length share too little: a fork saves less than another
        # shape of a call costs.
        forks_early = (common < np.minimum(self._lengths, len(prefix))) & (common < middle(self.shapes.growth))
        common = np.where(forks_early | ~own, 0, common)
        slot = int(common.argmax())
        longest, match = int(common[slot]), (slot, int(common[slot]), None)
        for holder, entries in self._entries.items():
            for entry in entries if own[holder] else ():
                end = entry.base + len(entry.tokens)
                fits = longest < end <= len(prefix) and entry.base <= common[holder]
                if fits and np.array_equal(prefix[entry.base : end], entry.tokens):
                    longest, match = end, (holder, entry.base, entry)
        return match

    def _evict(self, pinned: set[int], count: int) -> int:
        """The least recently used slot that is not pinned, emptied. count: prefixes of this call, for the error."""
        for slot in self._recency:
            if slot not in pinned:
                break
        else:
            raise UserError(f"the cache has {self.slots} slots, too few for {count} prefixes at once")
        if length := int(self._lengths[slot]):
            self.evictions += 1
            dropped = int(_prefix_hashes(self._tokens[slot, :length])[-1])
            self._record_dropped(length, dropped ^ self._owners[slot])
        self._tokens[slot], self._lengths[slot] = -1, 0
        self._entries.pop(slot, None)
        self._recency.move_to_end(slot)
        return slot

    def _record_dropped(self, length: int, prefix_hash: int) -> None:
        hashes = self._dropped.setdefault(length, set())
        if prefix_hash in hashes:
            return
        hashes.add(prefix_hash)
        self._dropped_order.append((length, prefix_hash))
        if len(self._dropped_order) > MAX_DROPPED_PREFIXES:
            length, prefix_hash = self._dropped_order.popleft()
            self._dropped[length].remove(prefix_hash)
            if not self._dropped[length]:
                del self._dropped[length]

    def _count_recomputed(self, prefix: np.ndarray, cached_length: int, owner: int) -> int:
        """Tokens of `prefix` after the first `cached_length` that an evicted slot of this owner held."""
        hashes = _prefix_hashes(prefix)
        lengths = (length for length in self._dropped if cached_length < length <= len(prefix))
        recomputed = (
            length - cached_length for length in lengths if int(hashes[length - 1]) ^ owner in self._dropped[length]
        )
        return max(recomputed, default=0)

    def _fullest_shape(self, lengths: np.ndarray) -> tuple[int, int]:
        """(rows, width) of the call that the longest of the ascending `lengths` to encode fill best; the widest of
        equals."""

        def utilization(shape: tuple[int, int]) -> tuple[float, int]:
            rows, width = shape
            return np.minimum(lengths[-rows:], width).sum() / (rows * width + CALL_OVERHEAD_TOKENS), width

        growth = self.shapes.growth
        rows = {width: call_rows(len(lengths), equal_work_rows(width, growth, self._rows), width) for width in growth}
        return max(((rows[width], width) for width in growth), key=utilization)

    def _encode(self, jobs: list[_Job]) -> None:
        """Runs jobs in batches of similar length, the longest first; what is wider than a call needs several."""
        while jobs:
            jobs.sort(key=lambda job: len(job.prefix) - job.cached_length)
            rows, width = self._fullest_shape(np.asarray([len(job.prefix) - job.cached_length for job in jobs]))
            batch, jobs = jobs[-rows:], jobs[:-rows]
            source, starts, counts = np.zeros((3, rows), np.int32)
            target, ring_reads = np.full(rows, self.slots, np.int32), np.zeros((3, rows), np.int32)
            tokens = np.zeros((rows, width), np.int32)
            for row, job in enumerate(batch):
                chunk = job.prefix[job.cached_length : job.cached_length + width]
                source[row], target[row], starts[row], counts[row] = job.source, job.target, job.start, len(chunk)
                tokens[row, : len(chunk)] = chunk
                if job.entry:
                    ring_reads[:, row] = job.entry.row, job.entry.offset, len(job.entry.tokens)
                if (end := job.cached_length + len(chunk)) < len(job.prefix):
                    jobs.append(_Job(job.target, job.target, end, None, job.prefix))
            capacity = self.bucket(int(starts.max()))
            self._extend(source, target, starts, ring_reads, tokens, counts, capacity)
            self.tokens_encoded += int(counts.sum())
            self.tokens_padded += rows * width

    def _extend(self, source, target, starts, ring_reads, tokens, counts, capacity: int) -> None:
        """See the function `_extend`."""
        self.bank = _extend(
            self._graph,
            self._parameters,
            self.bank,
            self.ring,
            source,
            target,
            starts,
            ring_reads,
            tokens,
            counts,
            capacity=capacity,
            ring_width=self._ring_width,
            layout=self._layout,
        )


def copy_slots(bank: Cache, slots: jax.Array, lengths: jax.Array, capacity: int) -> Cache:
    """A cache of the first `capacity` (static) tokens of `slots` [R], of which the first `lengths` [R] are filled."""
    keys = tuple(buffer[slots, :, :, :capacity] for buffer in bank.keys)
    values = tuple(buffer[slots, :, :capacity] for buffer in bank.values)
    return Cache(keys, values, lengths)


def call_rows(count: int, max_rows: int, width: int) -> int:
    """Batch size of the next of the calls that compute `count` rows of `width` tokens.

    The maximum, or 1 / SMALL_CALL_DIVISOR of it if the remaining rows cost less in such calls.
    """
    small = max(1, max_rows // SMALL_CALL_DIVISOR)
    small_calls = -(-count // small)
    small_cost = small_calls * (small * width + CALL_OVERHEAD_TOKENS)
    return small if count < max_rows and small_cost < max_rows * width + CALL_OVERHEAD_TOKENS else max_rows


def equal_work_rows(width: int, widths: Sequence[int], rows: int) -> int:
    """Largest batch of a call of `width`: as many tokens as in `rows` rows of the middle width, and at most `rows`."""
    return min(rows, max(1, rows * middle(widths) // width))


def middle(widths: Sequence[int]) -> int:
    return widths[(len(widths) - 1) // 2]


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that is at least `length`; the last if there is none."""
    return next((size for size in buckets if length <= size), buckets[-1])


class _Job(NamedTuple):
    """A prefix to write to slot `target`: `start` tokens from slot `source`, those of `entry`, and the rest encoded."""

    source: int
    target: int
    start: int
    entry: RingEntry | None
    prefix: np.ndarray

    @property
    def cached_length(self) -> int:
        return self.start + (len(self.entry.tokens) if self.entry else 0)


# The bank is donated: it is updated in place, instead of existing twice.
@functools.partial(jax.jit, static_argnames=("graph", "capacity", "ring_width", "layout"), donate_argnames=("bank",))
def _extend(
    graph,
    parameters,
    bank: Cache,
    ring: Ring,
    source,
    target,
    starts,
    ring_reads,
    tokens,
    counts,
    *,
    capacity,
    ring_width,
    layout=ONE_DEVICE,
) -> Cache:
    """The bank with `counts[r]` of tokens [R, W] encoded after the first `starts[r]` of slot `source[r]`.

    The result goes to slot `target[r]`; a target out of range is dropped.

    Args:
        source, target, starts, counts: int32 [R].
        ring_reads: int32 [3, R], ring rows, offsets and counts of the tokens between the start and the new ones.
        capacity: static, at least every start. Tokens of the slot beyond it are neither read nor copied.
        ring_width: static, at least every count of `ring_reads`; 0 without a ring.
        layout: static, of rows and bank.
    """
    backbone = nnx.merge(graph, parameters)
    width = tokens.shape[1]
    rows = copy_slots(bank, source, starts, capacity + ring_width + width)
    rows = layout.constrain_rows(rows)
    if ring_width:
        rows = rows.append(*ring.read(ring_reads[0], ring_reads[1], ring_width), ring_reads[2])
    positions = rows.lengths[:, None] + jnp.arange(width)
    segments = (jnp.arange(width) < counts[:, None]).astype(jnp.int32)
    output = backbone(layout.constrain_rows(tokens), positions, segments, (rows,), dtype=bank.keys[0].dtype)
    extended = rows.append(output.keys, output.values, counts)

    filled = slice(extended.capacity)
    keys = (b.at[target, :, :, filled].set(n, mode="drop") for b, n in zip(bank.keys, extended.keys, strict=True))
    values = (b.at[target, :, filled].set(n, mode="drop") for b, n in zip(bank.values, extended.values, strict=True))
    return layout.constrain_slots(Cache(tuple(keys), tuple(values), bank.lengths))


def _prefix_hashes(tokens: np.ndarray) -> np.ndarray:
    """64-bit hashes of every prefix of `tokens` [T], uint64 [T]: a polynomial modulo 2^64."""
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(tokens), _HASH_BASE, np.uint64))
        # Plus one: otherwise tokens of id 0 would not change the hash.
        mixed = (np.asarray(tokens, np.uint64) + np.uint64(1)) * powers
        return np.cumsum(mixed, dtype=np.uint64)
