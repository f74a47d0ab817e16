"""Values of token sequences, jitted in a few fixed shapes: whole sequences, or continuations of cached prefixes.

Up to rounding, a value does not depend on what else is in the batch.

Shapes: B rows of whole sequences, T tokens of a sequence or row; R rows of continuations, W their width, P tokens of a
prefix, N of a continuation.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.model.attention import packed_attention, tiled_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import PrefixBank, RingEntry, Shapes, bucket, call_rows, copy_slots, equal_work_rows
from jaxprm.model.sharding import ONE_DEVICE, Layout
from jaxprm.model.transformer import ForwardOptions, reward_model_graph, transformer_graph

# Padded lengths of whole sequences: beyond 256 tokens at most a third of a row is padding.
LENGTH_BUCKETS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
# Tokens of a call with whole sequences, padding included: longer sequences are computed in fewer rows.
TOKENS_A_CALL = 8192
# Memory for keys and values of prefixes. What does not fit is encoded again.
CACHE_BYTES = 2 << 30


class TokenCounts(NamedTuple):
    """Tokens that an engine has processed.

    Args:
      encoded_tokens: computed, without padding.
      cached_tokens: of prefixes, found in the cache.
      recomputed_tokens: those among the encoded that the cache had dropped.
      padded_tokens: computed, with padding.
    """

    encoded_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    padded_tokens: int = 0

    def plus(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*map(operator.add, self, other))

    def minus(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*map(operator.sub, self, other))


@functools.partial(jax.jit, static_argnames=("graph", "dtype", "layout"))
def values_of_rows(graph, parameters, tokens, counts, dtype, layout=ONE_DEVICE):
    """Values [B, T] of every token of rows [B, T], of which the first `counts` [B] are not padding."""
    model, tokens = nnx.merge(graph, parameters), layout.constrain_rows(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < counts[:, None]).astype(jnp.int32)
    forward_options = ForwardOptions(dtype, attend=functools.partial(packed_attention, block=tiled_attention))
    return model.value(model.transformer(tokens, positions, segments, forward_options=forward_options).hidden)


# The ring is donated, so that it is updated in place.
@functools.partial(jax.jit, static_argnames=("graph", "capacity", "layout"), donate_argnames=("ring",))
def _values_after(
    graph,
    parameters,
    bank,
    ring,
    ring_rows,
    slots,
    lengths,
    tokens,
    positions,
    segments,
    capacity,
    layout=ONE_DEVICE,
):
    """Values [R, W] of packed continuations. Each attends to its row's cached prefix and to itself, not its neighbours.

    Also returns the ring, with the keys and values of the rows at `ring_rows` [R], or None if `ring` is None.
    """
    model = nnx.merge(graph, parameters)
    cache, dtype = layout.constrain_rows(copy_slots(bank, slots, lengths, capacity)), bank.keys[0].dtype
    output = model.transformer(
        layout.constrain_rows(tokens), lengths[:, None] + positions, segments, (cache,), dtype=dtype
    )
    return model.value(output.hidden), ring and layout.constrain_slots(
        ring.write(ring_rows, output.keys, output.values)
    )


class Engine:
    """A reward model over token sequences, with a cache of prefixes. Not thread-safe.

    Args:
      rows: rows of the narrowest shape that are computed at once.
      max_tokens: longest sequence that goes through the cache, prefix and continuation together.
      shapes: lengths to compile for.
      cache_bytes: bound on the memory of cached keys and values.
      dtype: of the arithmetic and of the cache, whatever the parameters are stored in.
      layout: of the mesh that holds the parameters.

    The first use of the cache raises UserError if `cache_bytes` has no room for two prefixes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parameters: Any,
        *,
        rows: int,
        max_tokens: int,
        shapes: Shapes = Shapes(),
        cache_bytes: int = CACHE_BYTES,
        dtype: Any = jnp.float32,
        layout: Layout = ONE_DEVICE,
    ):
        self._layout = layout
        self.config, self.max_tokens, self.shapes, self._dtype = config, max_tokens, shapes, jnp.dtype(dtype)
        self._graph, self._parameters = reward_model_graph(config), parameters
        self._cache_bytes, self._max_rows = cache_bytes, rows
        # Whose cached prefixes are read and written, see PrefixBank.allocate.
        self.owner = 0
        # Counts outside the bank, and those of banks that were dropped by `forget`.
        self._encoded = self._padded = 0
        self._earlier = TokenCounts()

    @property
    def bytes_of_a_slot(self) -> int:
        """Memory of a cached prefix in bytes, with room for a chunk past its end and a row of the ring."""
        config, shapes = self.config, self.shapes
        tokens = self.max_tokens + shapes.growth[-1] + shapes.ring_width + shapes.packed[-1]
        return 2 * config.layers * config.kv_heads * config.head_dim * self._dtype.itemsize * tokens

    @property
    def usage(self) -> TokenCounts:
        """Tokens processed so far, by all calls."""
        counts = TokenCounts(encoded_tokens=self._encoded, padded_tokens=self._padded)
        # Where a cached_property keeps its value: asking for `self._bank` would allocate the cache.
        if "_bank" in self.__dict__:
            bank = self._bank
            counts = counts.plus(
                TokenCounts(bank.tokens_encoded, bank.tokens_reused, bank.tokens_recomputed, bank.tokens_padded)
            )
        return counts.plus(self._earlier)

    def score_full(
        self, sequences: Sequence[np.ndarray], names: Sequence[str], *, small_batches: bool = False
    ) -> list[np.ndarray]:
        """Values of every token of each sequence int32 [T]: float32 [T]. Neither reads nor changes the cache.

        small_batches: use a smaller batch when few rows remain: lower latency, one more compilation a length.

        Raises UserError for a sequence longer than the largest bucket, with its name.
        """
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        batches = padded_batches(sequences, names, parts=self._layout.parts, small_batches=small_batches)
        for indices, tokens, counts in batches:
            result = np.asarray(
                values_of_rows(self._graph, self._parameters, tokens, counts, self._dtype, self._layout)
            )
            self._encoded += int(counts.sum())
            self._padded += tokens.size
            for row, index in enumerate(indices):
                values[index] = result[row, : counts[row]]
        return values

    def score_unbatched(self, tokens: np.ndarray) -> np.ndarray:
        """Values float32 [T] of one sequence int32 [T], without padding or cache: the reference for all other ways.

        Slow: every length is compiled. Not counted in `usage`.
        """
        counts = np.asarray([len(tokens)], np.int32)
        return np.asarray(values_of_rows(self._graph, self._parameters, tokens[None], counts, self._dtype))[0]

    def fits(self, prefix: np.ndarray, continuation: np.ndarray) -> bool:
        """Whether `score_continuations` accepts the pair."""
        return 0 < len(continuation) <= self.shapes.packed[-1] and len(prefix) + len(continuation) <= self.max_tokens

    def score_continuations(
        self, jobs: Sequence[tuple[np.ndarray, np.ndarray]], *, width: int | None = None
    ) -> list[np.ndarray]:
        """Values of every token of continuations (prefix int32 [P], continuation int32 [N]): float32 [N] each.

        Only the parts of prefixes that are not cached are encoded. Continuations are cached too: a later prefix that
        extends one costs only what follows it.

        width: of the rows, in place of those of `shapes`; rows wider than the cache's are not cached.
        """
        widths = self.shapes.packed if width is None else (width,)
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(jobs)
        # A call needs a slot for each of its rows, and `allocate` twice as many slots as prefixes.
        rows, rows_at_once = _packed(jobs, widths[-1]), self._bank.slots // 2
        for start in range(0, len(rows), rows_at_once):
            chunk = rows[start : start + rows_at_once]
            slots = self._bank.allocate([row.prefix for row in chunk], self.owner)
            with_slots = list(zip(chunk, slots, strict=True))
            for row_width in widths:
                if width is None:
                    max_rows = equal_work_rows(row_width, widths, self._rows)
                else:
                    max_rows = max(1, min(self._rows, TOKENS_A_CALL // 2 // row_width))
                fitting = [pair for pair in with_slots if bucket(pair[0].used, widths) == row_width]
                while fitting:
                    count = call_rows(len(fitting), max_rows, row_width)
                    self._score(fitting[:count], count, row_width, values)
                    fitting = fitting[count:]
        return values

    def forget(self) -> None:
        """Empties the cache. Compiled programs and the counts of `usage` stay."""
        # Before the bank goes: its counts go with it.
        self._earlier, self._encoded, self._padded = self.usage, 0, 0
        self.__dict__.pop("_bank", None)

    def warm_up(self, longest: int, on_program: Callable[[], None] = lambda: None) -> None:
        """Compiles all that `score_continuations` runs for prefixes of up to `longest` tokens.

        on_program: called before each program; an exception from it ends the warm-up.
        """
        self._bank.warm_up(longest, on_program)
        bank = self._bank
        for capacity in bank.buckets(longest):
            for width in self.shapes.packed:
                max_rows = equal_work_rows(width, self.shapes.packed, self._rows)
                for rows in {call_rows(1, max_rows, width), max_rows}:
                    on_program()
                    zeros, empty = np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
                    _, bank.ring = _values_after(
                        self._graph,
                        self._parameters,
                        bank.bank,
                        bank.ring,
                        # Rows out of range are dropped: the warm-up writes nothing.
                        np.full(rows, bank.slots, np.int32),
                        zeros,
                        zeros,
                        empty,
                        empty,
                        empty,
                        capacity=capacity,
                        layout=self._layout,
                    )

    def warm_up_full(self, longest: int, on_program: Callable[[], None] = lambda: None) -> None:
        """Compiles all that `score_full` runs for sequences of up to `longest` tokens, with small batches.

        on_program: as in `warm_up`. The sequences count in `usage`.
        """
        for width in (length for length in LENGTH_BUCKETS if length <= bucket(longest, LENGTH_BUCKETS)):
            max_rows = max(1, TOKENS_A_CALL // width)
            for count in {call_rows(1, max_rows, width), max_rows}:
                on_program()
                self.score_full([np.zeros(width, np.int32)] * count, ["warm-up"] * count, small_batches=True)

    @functools.cached_property
    def _bank(self) -> PrefixBank:
        """The cache, allocated on first use: `score_full` does not need it."""
        config, shapes, size = self.config, self.shapes, self.bytes_of_a_slot
        # A search needs the states of a round and of the round before it. For beams that is three times as many slots
        # as rows of each.
        slots = min(6 * self._max_rows, self._cache_bytes // size)
        if slots < 2:
            raise UserError(
                f"cache_bytes = {self._cache_bytes}: two conversations of {self.max_tokens} tokens take {2 * size}; "
                "raise it or lower max_tokens"
            )
        return PrefixBank(
            transformer_graph(config),
            self._parameters["transformer"],
            config,
            slots=slots,
            capacity=self.max_tokens,
            rows=min(self._max_rows, slots // 2),
            dtype=self._dtype,
            shapes=shapes,
            ring=slots,
            layout=self._layout,
        )

    @property
    def _rows(self) -> int:
        return min(self._max_rows, self._bank.slots // 2)

    def _score(self, group: list[tuple[_Row, int]], rows: int, width: int, values: list[np.ndarray]) -> None:
        """Fills `values` from one call of shape [rows, width]. group: rows, and the slots of their prefixes."""
        bank, count = self._bank, len(group)
        slots, lengths = np.zeros((2, rows), np.int32)
        tokens, positions, segments = np.zeros((3, rows, width), np.int32)
        for number, (row, slot) in enumerate(group):
            slots[number], lengths[number] = slot, len(row.prefix)
            for segment, (where, part) in enumerate(row.slices(), start=1):
                tokens[number, where], positions[number, where] = part, np.arange(len(part))
                segments[number, where] = segment
        # The ring has rows of the widest packed shape: wider calls cannot be cached in it.
        keeps = width <= self.shapes.packed[-1]
        ring_rows = np.full(rows, bank.slots, np.int32)
        if keeps:
            ring_rows[:count] = bank.reserve_ring_rows(count)
        result, ring = _values_after(
            self._graph,
            self._parameters,
            bank.bank,
            bank.ring if keeps else None,
            ring_rows,
            slots,
            lengths,
            tokens,
            positions,
            segments,
            capacity=bank.bucket(int(lengths.max())),
            layout=self._layout,
        )
        result = np.asarray(result)
        self._encoded += int((segments > 0).sum())
        self._padded += tokens.size
        if keeps:
            # The ring that was passed is donated and no longer exists.
            bank.ring = ring
        for number, (row, slot) in enumerate(group):
            for index, (where, part) in zip(row.indices, row.slices(), strict=True):
                values[index] = result[number, where]
                if keeps:
                    bank.remember(int(slot), RingEntry(len(row.prefix), part, int(ring_rows[number]), where.start))


class _Row(NamedTuple):
    """Continuations of one prefix that share a row. indices: of the continuations among the jobs of the call."""

    prefix: np.ndarray
    indices: list[int]
    continuations: list[np.ndarray]

    @property
    def used(self) -> int:
        return sum(map(len, self.continuations))

    def slices(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Each continuation with its slice of the row."""
        start = 0
        for tokens in self.continuations:
            yield slice(start, start + len(tokens)), tokens
            start += len(tokens)


def _packed(jobs: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> list[_Row]:
    """Rows of at most `width` tokens: continuations of equal prefixes together, rows in order of prefix length."""
    # By length, since the longest prefix of a call decides its cost; then by content, so that continuations of equal
    # prefixes are neighbours and share rows.
    order = sorted(range(len(jobs)), key=lambda index: (len(jobs[index][0]), jobs[index][0].tobytes()))
    rows: list[_Row] = []
    for index in order:
        prefix, continuation = jobs[index]
        last = rows[-1] if rows else None
        if last is None or last.used + len(continuation) > width or not np.array_equal(last.prefix, prefix):
            rows.append(_Row(prefix, [], []))
        rows[-1].indices.append(index)
        rows[-1].continuations.append(continuation)
    return rows


def padded_batches(
    sequences: Sequence[np.ndarray], names: Sequence[str], *, parts: int = 1, small_batches: bool = False
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Sequences as rows of few shapes: (indices of the sequences, tokens int32 [B, T], lengths of the rows int32 [B]).

    parts: of the mesh that rows are split over. small_batches: as in `Engine.score_full`.

    Raises UserError for a sequence longer than the largest bucket, with its name.
    """
    buckets: dict[int, list[int]] = {}
    for index, (sequence, name) in enumerate(zip(sequences, names, strict=True)):
        buckets.setdefault(bucket_of(len(sequence), name), []).append(index)
    for width, indices in sorted(buckets.items()):
        max_rows = max(1, TOKENS_A_CALL // width)
        # Rows are split over the mesh, so their number is a multiple of its parts.
        max_rows -= max_rows % parts if max_rows > parts else 0
        while indices:
            rows = call_rows(len(indices), max_rows, width) if small_batches else max_rows
            # All calls have `rows` rows, full or not: another number would be another program.
            chunk, indices = indices[:rows], indices[rows:]
            tokens, counts = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
            for row, index in enumerate(chunk):
                counts[row] = len(sequences[index])
                tokens[row, : counts[row]] = sequences[index]
            yield chunk, tokens, counts


def bucket_of(length: int, name: str) -> int:
    """The padded length at which `score_full` computes a sequence. Raises UserError, with its name, if too long."""
    if length > LENGTH_BUCKETS[-1]:
        raise UserError(f"{name}: {length} tokens, more than the {LENGTH_BUCKETS[-1]} that can be scored; shorten it")
    return bucket(length, LENGTH_BUCKETS)
