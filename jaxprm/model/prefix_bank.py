"""Keys and values of conversation prefixes, found again by their tokens: the one cache behind sampling and scoring.

A conversation grows by a turn at a time, and search forks it. The bank holds one slot a prefix on the device; placing
a longer prefix forks the slot that has most of it and encodes only what is new. Where the turn that was chosen has been
scored before, its keys and values come from the ring of what was scored last, and only the observation is new. Slots
are reused in order of last use; what was dropped is encoded again, which costs time, is counted, and changes nothing.
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

# A call with few rows to fill is made this much smaller: the end of every round of a search is.
FEW = 8
# What a call counts for beside its tokens: as so many of them. With more, calls are fewer and emptier.
CALL = 64
# Dropped prefixes that are known when they come back: for the count of what is encoded again, and no more.
DROPPED = 1 << 14
# The longest shape that is compiled for the turns of a model's data: memory beside every slot grows with it.
WIDEST = 2048
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


class TurnTokens(NamedTuple):
    """Lengths of turns: half of them have no more than `median` tokens, and 99 of 100 no more than `most`."""

    median: int
    most: int


class Shapes(NamedTuple):
    """Lengths in tokens that programs are compiled for, ascending: each costs seconds, and too few cost padding.

    growth: what is appended to a prefix at once; packed: rows of continuations to score; kept: the longest continuation
    of those that is moved into its prefix; lengths: cached tokens read, so that a call costs what its own longest does.
    """

    growth: tuple[int, ...] = (8, 64, 256)
    packed: tuple[int, ...] = (32, 64, 128, 256)
    kept: int = 256
    lengths: tuple[int, ...] = (0, 192, 384, 640, 1024, 2048, 4096)

    def for_turns(self, action: TurnTokens, observation: TurnTokens) -> Shapes:
        """Where these turns are longer, all of a kind widened until the widest takes them, up to WIDEST: an observation
        at once, an action that is kept, and a row for four candidates."""

        def widened(widths: tuple[int, ...], tokens: int) -> tuple[int, ...]:
            widest = min(WIDEST, 1 << (max(1, tokens) - 1).bit_length())
            return tuple(width * max(widest, widths[-1]) // widths[-1] for width in widths)

        return self._replace(
            growth=widened(self.growth, observation.most),
            packed=widened(self.packed, max(action.most, 4 * action.median)),
            kept=widened((self.kept,), action.most)[0],
        )


class Ring(NamedTuple):
    """Keys and values of the rows scored last: L arrays [N, K, W, E] each."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def write(self, rows: jax.Array, keys: Sequence[jax.Array], values: Sequence[jax.Array]) -> Ring:
        """Puts chunks [R, K, T, E] a layer into `rows` [R]; a row out of range is dropped."""

        def put(buffers, chunks):
            pairs = zip(buffers, chunks, strict=True)
            return tuple(b.at[rows, :, : c.shape[2]].set(c.astype(b.dtype), mode="drop") for b, c in pairs)

        return Ring(put(self.keys, keys), put(self.values, values))

    def read(self, rows: jax.Array, offsets: jax.Array, width: int) -> tuple[tuple[jax.Array, ...], ...]:
        """(keys, values), [R, K, `width`, E] a layer, of the tokens of `rows` [R] from `offsets` [R] on."""
        places = offsets[:, None] + jnp.arange(width)

        def take(buffer):
            return buffer.at[rows[:, None], :, places].get(mode="clip").swapaxes(1, 2)

        return tuple(map(take, self.keys)), tuple(map(take, self.values))


class RingEntry(NamedTuple):
    """A scored continuation `tokens` of the first `base` tokens of a slot: in a row of the ring, from `offset` on."""

    base: int
    tokens: np.ndarray
    row: int
    offset: int


class _Job(NamedTuple):
    """`prefix` into slot `target`: its first `start` tokens from slot `source`, then what is kept, the rest is new."""

    source: int
    target: int
    start: int
    kept: RingEntry | None
    prefix: np.ndarray

    @property
    def known(self) -> int:
        return self.start + (len(self.kept.tokens) if self.kept else 0)


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "ring_width", "layout"), donate_argnames=("bank",))
def _extend(
    graph,
    parameters,
    bank: Cache,
    ring: Ring,
    source,
    target,
    starts,
    kept,
    tokens,
    counts,
    *,
    capacity,
    ring_width,
    layout=ONE_DEVICE,
) -> Cache:
    """Encodes `counts[r]` of tokens [R, W] after the first `starts[r]` of slot `source[r]` into slot `target[r]`.

    kept: int32 [3, R], ring rows, offsets and counts of what comes in between; ring_width, static, is no less than any
    count, and 0 without a ring. `capacity`, static, is no less than any start: what lies beyond it is neither
    read nor copied. layout, static: of rows and bank.
    """
    trunk = nnx.merge(graph, parameters)
    width = tokens.shape[1]
    rows = rows_of(bank, source, starts, capacity + ring_width + width)
    rows = layout.of_rows(rows)
    if ring_width:
        rows = rows.append(*ring.read(kept[0], kept[1], ring_width), kept[2])
    positions = rows.lengths[:, None] + jnp.arange(width)
    segments = (jnp.arange(width) < counts[:, None]).astype(jnp.int32)
    output = trunk(layout.of_rows(tokens), positions, segments, (rows,), dtype=bank.keys[0].dtype)
    grown = rows.append(output.keys, output.values, counts)

    filled = slice(grown.capacity)
    keys = (b.at[target, :, :, filled].set(n, mode="drop") for b, n in zip(bank.keys, grown.keys, strict=True))
    values = (b.at[target, :, filled].set(n, mode="drop") for b, n in zip(bank.values, grown.values, strict=True))
    return layout.of_slots(Cache(tuple(keys), tuple(values), bank.lengths))


def rows_of(bank: Cache, slots, lengths, capacity: int) -> Cache:
    """A working copy of slots, R of them, cut to `capacity`, which is static."""
    keys = tuple(buffer[slots, :, :, :capacity] for buffer in bank.keys)
    values = tuple(buffer[slots, :, :capacity] for buffer in bank.values)
    return Cache(keys, values, lengths)


def rows_for(count: int, most: int, width: int) -> int:
    """The rows of the next call, of that width, where `count` are to be computed: all that it can have, or few where
    calls of few cost less."""
    few = max(1, most // FEW)
    return few if count < most and -(-count // few) * (few * width + CALL) < most * width + CALL else most


def alike(width: int, widths: Sequence[int], rows: int) -> int:
    """Rows of a call of that width, one of `widths`: as much work as `rows` of the middle one, and no more rows."""
    return min(rows, max(1, rows * middle(widths) // width))


def middle(widths: Sequence[int]) -> int:
    return widths[(len(widths) - 1) // 2]


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest of ascending `buckets` that holds `length`; the last where none does."""
    return next((one for one in buckets if length <= one), buckets[-1])


class PrefixBank:
    """The bank of one model. Not thread-safe; nothing outside sees slots but through `allocate`.

    slots: prefixes held at once; capacity: the longest prefix in tokens; rows: prefixes encoded at once; dtype: what
    they are computed and kept in; ring: rows of scored continuations that are kept; layout: of the cache on a mesh, on
    which the parameters lie already.
    `tokens_encoded` counts what was computed and `slots_computed` the same with padding, `tokens_reused` what was
    found, `tokens_again` what had been dropped among the computed, of the last DROPPED prefixes that were.
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
        # Every call has room for what is kept between a start and what is new: it costs little, another shape seconds.
        self._ring_width = shapes.kept if ring else 0
        # A chunk is written whole, so a slot has room for one of each kind past its end.
        room = capacity + shapes.growth[-1] + self._ring_width
        self.bank = Cache.empty(config, slots, room, dtype, layout.slots)
        shape = (ring, config.kv_heads, shapes.packed[-1], config.head_dim)
        keys, values = (
            tuple(jnp.zeros(shape, dtype, device=layout.slots) for _ in range(config.layers)) if ring else ()
            for _ in range(2)
        )
        self.ring, self._ring_rows = Ring(keys, values), ring
        self._ring_next = 0
        self._ring_owner = np.full(ring, -1)
        self._table = np.full((slots, capacity), -1, np.int32)
        self._held = np.zeros(slots, np.int64)
        self._kept: dict[int, list[RingEntry]] = {}
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))
        self._dropped: dict[int, set[int]] = {}
        self._dropped_order: deque[tuple[int, int]] = deque()
        self.tokens_encoded = self.tokens_reused = self.tokens_again = self.slots_computed = self.evictions = 0

    def bucket(self, length: int) -> int:
        """The capacity to compile for, where `length` cached tokens are read: few, as each costs a compilation."""
        found = bucket(length, self.shapes.lengths)
        return found if length <= found <= self.capacity else self.capacity

    def buckets(self, longest: int) -> list[int]:
        """Every capacity that prefixes of up to `longest` tokens are computed with."""
        lengths = (*(length for length in self.shapes.lengths if length < longest), longest)
        return sorted({self.bucket(length) for length in lengths})

    def warm_up(self, longest: int, each: Callable[[], None] = lambda: None) -> None:
        """Compiles what `allocate` runs for prefixes of up to `longest` tokens; changes nothing that is held.

        each: called before every program.
        """
        for capacity in self.buckets(longest):
            for width in self.shapes.growth:
                most = alike(width, self.shapes.growth, self._rows)
                for rows in {rows_for(1, most, width), most}:
                    none, nowhere = np.zeros(rows, np.int32), np.full(rows, self.slots, np.int32)
                    each()
                    self.bank = _extend(
                        self._graph,
                        self._parameters,
                        self.bank,
                        self.ring,
                        none,
                        nowhere,
                        none,
                        np.zeros((3, rows), np.int32),
                        np.zeros((rows, width), np.int32),
                        none,
                        capacity=capacity,
                        ring_width=self._ring_width,
                        layout=self._layout,
                    )

    def allocate(self, prefixes: Sequence[np.ndarray]) -> np.ndarray:
        """A slot that begins with each prefix of tokens, int32 [T] each. Holds until the next call.

        Twice as many slots as prefixes are always enough.

        Raises UserError for a prefix longer than the capacity.
        """
        for prefix in prefixes:
            if len(prefix) > self.capacity:
                raise UserError(
                    f"a conversation of {len(prefix)} tokens is longer than the cache of {self.capacity}; "
                    "raise policy.max_tokens or shorten the episode"
                )
        distinct = {prefix.tobytes(): prefix for prefix in prefixes}
        found = {name: self._longest(prefix) for name, prefix in distinct.items()}
        # All sources first: what one prefix is forked from must not make room for another.
        pinned = {source for source, start, _ in found.values() if start}
        for source in pinned:
            self._order.move_to_end(source)
        placed, jobs = {}, []
        for name, prefix in distinct.items():
            source, start, kept = found[name]
            if start == len(prefix) > 0:
                placed[name] = source
                self.tokens_reused += start
                continue
            target = self._free(pinned, len(distinct))
            pinned.add(target)
            placed[name] = target
            jobs.append(job := _Job(source, target, start, kept, prefix))
            self.tokens_reused += job.known
            self.tokens_again += self._dropped_of(prefix, job.known)
        self._encode(jobs)
        for job in jobs:
            self._held[job.target] = len(job.prefix)
            self._table[job.target, : len(job.prefix)] = job.prefix
        return np.asarray([placed[prefix.tobytes()] for prefix in prefixes], np.int32)

    def ring_rows(self, count: int) -> np.ndarray:
        """`count` rows of the ring to write to; what was kept there is forgotten. Out of range where there is none."""
        if count > self._ring_rows:
            return np.full(count, self._ring_rows, np.int32)
        rows = (self._ring_next + np.arange(count)) % self._ring_rows
        self._ring_next = (self._ring_next + count) % self._ring_rows
        for row in rows:
            owner = self._ring_owner[row]
            if owner in self._kept:
                self._kept[owner] = [kept for kept in self._kept[owner] if kept.row != row]
            self._ring_owner[row] = -1
        return rows.astype(np.int32)

    def keep(self, slot: int, kept: RingEntry) -> None:
        """Remembers a continuation that was written to the ring, for as long as slot and row hold what they hold."""
        if kept.row < self._ring_rows and len(kept.tokens) <= self.shapes.kept:
            self._kept.setdefault(slot, []).append(kept)
            self._ring_owner[kept.row] = slot

    def _longest(self, prefix: np.ndarray) -> tuple[int, int, RingEntry | None]:
        """(slot, length, kept) of what is held of `prefix`: tokens of a slot, and perhaps a continuation of them."""
        same = self._table[:, : len(prefix)] == prefix
        common = np.where(same.all(axis=1), len(prefix), np.argmin(same, axis=1)) if len(prefix) else self._held * 0
        # Where two conversations part before a chunk's length, a fork saves less than another shape costs.
        apart = (common < np.minimum(self._held, len(prefix))) & (common < middle(self.shapes.growth))
        common = np.where(apart, 0, common)
        slot = int(common.argmax())
        best, found = int(common[slot]), (slot, int(common[slot]), None)
        for owner, some in self._kept.items():
            for kept in some:
                end = kept.base + len(kept.tokens)
                fits = best < end <= len(prefix) and kept.base <= common[owner]
                if fits and np.array_equal(prefix[kept.base : end], kept.tokens):
                    best, found = end, (owner, kept.base, kept)
        return found

    def _free(self, pinned: set[int], wanted: int) -> int:
        for slot in self._order:
            if slot not in pinned:
                break
        else:
            raise UserError(f"the cache has {self.slots} slots, too few for {wanted} prefixes at once")
        if length := int(self._held[slot]):
            self.evictions += 1
            self._drop(length, int(_prefix_hashes(self._table[slot, :length])[-1]))
        self._table[slot], self._held[slot] = -1, 0
        self._kept.pop(slot, None)
        self._order.move_to_end(slot)
        return slot

    def _drop(self, length: int, name: int) -> None:
        same = self._dropped.setdefault(length, set())
        if name in same:
            return
        same.add(name)
        self._dropped_order.append((length, name))
        if len(self._dropped_order) > DROPPED:
            length, name = self._dropped_order.popleft()
            self._dropped[length].remove(name)
            if not self._dropped[length]:
                del self._dropped[length]

    def _dropped_of(self, prefix: np.ndarray, known: int) -> int:
        """Tokens of `prefix` after the first `known` that a dropped slot held."""
        hashes = _prefix_hashes(prefix)
        lengths = (length for length in self._dropped if known < length <= len(prefix))
        dropped = (length - known for length in lengths if int(hashes[length - 1]) in self._dropped[length])
        return max(dropped, default=0)

    def _fullest(self, rests: np.ndarray) -> tuple[int, int]:
        """The shape (rows, width) that the longest of ascending `rests` fill best; of equals the widest."""

        def key(shape: tuple[int, int]) -> tuple[float, int]:
            rows, width = shape
            return np.minimum(rests[-rows:], width).sum() / (rows * width + CALL), width

        growth = self.shapes.growth
        rows = {width: rows_for(len(rests), alike(width, growth, self._rows), width) for width in growth}
        return max(((rows[width], width) for width in growth), key=key)

    def _encode(self, jobs: list[_Job]) -> None:
        """Forks and extends, `rows` jobs at a time, alike lengths together; long rests take several chunks."""
        while jobs:
            jobs.sort(key=lambda job: len(job.prefix) - job.known)
            rows, width = self._fullest(np.asarray([len(job.prefix) - job.known for job in jobs]))
            now, jobs = jobs[-rows:], jobs[:-rows]
            source, starts, counts = np.zeros((3, rows), np.int32)
            target, kept = np.full(rows, self.slots, np.int32), np.zeros((3, rows), np.int32)
            tokens = np.zeros((rows, width), np.int32)
            for row, job in enumerate(now):
                chunk = job.prefix[job.known : job.known + width]
                source[row], target[row], starts[row], counts[row] = job.source, job.target, job.start, len(chunk)
                tokens[row, : len(chunk)] = chunk
                if job.kept:
                    kept[:, row] = job.kept.row, job.kept.offset, len(job.kept.tokens)
                if (end := job.known + len(chunk)) < len(job.prefix):
                    jobs.append(_Job(job.target, job.target, end, None, job.prefix))
            self.bank = _extend(
                self._graph,
                self._parameters,
                self.bank,
                self.ring,
                source,
                target,
                starts,
                kept,
                tokens,
                counts,
                capacity=self.bucket(int(starts.max())),
                ring_width=self._ring_width,
                layout=self._layout,
            )
            self.tokens_encoded += int(counts.sum())
            self.slots_computed += rows * width


def _prefix_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every prefix of `tokens`, [T]."""
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(tokens), _HASH_BASE, np.uint64))
        mixed = (np.asarray(tokens, np.uint64) + np.uint64(1)) * powers
        return np.cumsum(mixed, dtype=np.uint64)
