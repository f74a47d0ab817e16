"""Values of token sequences, jitted in a few fixed shapes: whole ones in one pass, continuations after a cache.

A number does not depend on what else is in the batch, but for rounding: a continuation reads its prefix and itself.
"""

from __future__ import annotations

import functools
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

LENGTH_BUCKETS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
TOKENS_A_CALL = 8192
# Memory for keys and values of prefixes; what does not fit is encoded again.
CACHE_BYTES = 2 << 30


@functools.partial(jax.jit, static_argnames=("graph", "dtype", "layout"))
def values_of_rows(graph, parameters, tokens, counts, dtype, layout=ONE_DEVICE):
    """Values [B, T] of every token of rows [B, T], of which the first counts [B] are real."""
    model, tokens = nnx.merge(graph, parameters), layout.constrain_rows(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < counts[:, None]).astype(jnp.int32)
    forward_options = ForwardOptions(dtype, attend=functools.partial(packed_attention, block=tiled_attention))
    return model.value(model.transformer(tokens, positions, segments, forward_options=forward_options).hidden)


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
    """Values [R, W] of packed continuations, each after its row's cached prefix and blind to its neighbours.

    The second result is the ring, where there is one, with their keys and values in `ring_rows` [R].
    """
    model = nnx.merge(graph, parameters)
    cache, dtype = layout.constrain_rows(copy_slots(bank, slots, lengths, capacity)), bank.keys[0].dtype
    output = model.transformer(
        layout.constrain_rows(tokens), lengths[:, None] + positions, segments, (cache,), dtype=dtype
    )
    return model.value(output.hidden), ring and layout.constrain_slots(
        ring.write(ring_rows, output.keys, output.values)
    )


class _Row(NamedTuple):
    """Continuations that share a row: after one prefix, (place in the answer, tokens) each."""

    prefix: np.ndarray
    parts: list[tuple[int, np.ndarray]]

    @property
    def used(self) -> int:
        return sum(len(tokens) for _, tokens in self.parts)


class Engine:
    """A reward model over tokens.

    rows: rows of the narrowest shape computed at once; max_tokens: the longest sequence that goes through the cache;
    cache_bytes: what its keys and values may take; layout: on the mesh where the parameters lie. Raises UserError where
    not even two prefixes fit in there.
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
        self._cache_bytes, self._wanted_rows = cache_bytes, rows
        self._encoded = self._slots = 0
        self._past = dict.fromkeys(("encoded", "reused", "again", "slots"), 0)

    @property
    def bytes_of_a_slot(self) -> int:
        """Memory of one conversation in the cache, with room for what is written past its end and a row of the ring."""
        config, shapes = self.config, self.shapes
        tokens = self.max_tokens + shapes.growth[-1] + shapes.ring_width + shapes.packed[-1]
        return 2 * config.layers * config.kv_heads * config.head_dim * self._dtype.itemsize * tokens

    @functools.cached_property
    def _bank(self) -> PrefixBank:
        """Made when first needed: whole sequences do without."""
        config, shapes, size = self.config, self.shapes, self.bytes_of_a_slot
        # In a search the states of a round and of the one before it: for beams, three times as many as rows of each.
        slots = min(6 * self._wanted_rows, self._cache_bytes // size)
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
            rows=min(self._wanted_rows, slots // 2),
            dtype=self._dtype,
            shapes=shapes,
            ring=slots,
            layout=self._layout,
        )

    @property
    def _rows(self) -> int:
        return min(self._wanted_rows, self._bank.slots // 2)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far: `encoded`, padding not counted; `reused`, found in the cache; `again`, encoded because they
        had been dropped; `slots`, encoded with their padding."""
        found = {"encoded": self._encoded, "reused": 0, "again": 0, "slots": self._slots}
        if "_bank" in self.__dict__:
            bank = self._bank
            counts = (bank.tokens_encoded, bank.tokens_reused, bank.tokens_recomputed, bank.tokens_padded)
            found = {name: value + count for (name, value), count in zip(found.items(), counts, strict=True)}
        return {name: value + self._past[name] for name, value in found.items()}

    def forget(self) -> None:
        """Lets go of everything in the cache; what was compiled stays, and the counts go on."""
        self._past, self._encoded, self._slots = self.usage, 0, 0
        self.__dict__.pop("_bank", None)

    def score_full(
        self, sequences: Sequence[np.ndarray], names: Sequence[str], *, few: bool = False
    ) -> list[np.ndarray]:
        """Values of every token of each sequence int32 [T]: float32 [T]. The cache is neither read nor changed.

        few: a call that has few rows to fill is a smaller one, another program to compile, for those who wait for it.

        Raises UserError, with its name, for one longer than the largest bucket.
        """
        buckets: dict[int, list[int]] = {}
        for index, (tokens, name) in enumerate(zip(sequences, names, strict=True)):
            buckets.setdefault(bucket_of(len(tokens), name), []).append(index)
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        for width, indices in sorted(buckets.items()):
            rows, parts = max(1, TOKENS_A_CALL // width), self._layout.parts
            rows -= rows % parts if rows > parts else 0
            while indices:
                made = call_rows(len(indices), rows, width) if few else rows
                chunk, indices = indices[:made], indices[made:]
                tokens, counts = np.zeros((made, width), np.int32), np.zeros(made, np.int32)
                for row, index in enumerate(chunk):
                    counts[row] = len(sequences[index])
                    tokens[row, : counts[row]] = sequences[index]
                result = np.asarray(
                    values_of_rows(self._graph, self._parameters, tokens, counts, self._dtype, self._layout)
                )
                self._encoded += int(counts.sum())
                self._slots += tokens.size
                for row, index in enumerate(chunk):
                    values[index] = result[row, : counts[row]]
        return values

    def score_unbatched(self, tokens: np.ndarray) -> np.ndarray:
        """Values of every token of one sequence in a row of its own length: what all else is measured by, and slow,
        as every length is compiled."""
        counts = np.asarray([len(tokens)], np.int32)
        return np.asarray(values_of_rows(self._graph, self._parameters, tokens[None], counts, self._dtype))[0]

    def fits(self, prefix: np.ndarray, rest: np.ndarray) -> bool:
        """Whether `after` takes them."""
        return 0 < len(rest) <= self.shapes.packed[-1] and len(prefix) + len(rest) <= self.max_tokens

    def score_continuations(
        self, jobs: Sequence[tuple[np.ndarray, np.ndarray]], *, width: int | None = None
    ) -> list[np.ndarray]:
        """Values of every token of continuations (prefix int32 [P], rest int32 [N]): float32 [N] each.

        Prefixes come from the cache as far as they are in it, and continuations stay there: whoever asks next after one
        of them pays for what follows it alone. With `width` rows have that one, which may be more than the cache keeps.
        """
        widths = self.shapes.packed if width is None else (width,)
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(jobs)
        rows, at_once = _packed(jobs, widths[-1]), self._bank.slots // 2
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            placed = list(zip(some, self._bank.allocate([row.prefix for row in some]), strict=True))
            for one in widths:
                most = (
                    max(1, min(self._rows, TOKENS_A_CALL // 2 // one))
                    if width
                    else equal_work_rows(one, widths, self._rows)
                )
                fitting = [pair for pair in placed if bucket(pair[0].used, widths) == one]
                while fitting:
                    made = call_rows(len(fitting), most, one)
                    self._score(fitting[:made], made, one, values)
                    fitting = fitting[made:]
        return values

    def warm_up(self, longest: int, each: Callable[[], None] = lambda: None) -> None:
        """Compiles what `after` runs for prefixes of up to `longest` tokens, so that nothing is compiled later.

        each: called before every program; what it raises ends the warm-up.
        """
        self._bank.warm_up(longest, each)
        bank = self._bank
        for capacity in bank.buckets(longest):
            for width in self.shapes.packed:
                most = equal_work_rows(width, self.shapes.packed, self._rows)
                for rows in {call_rows(1, most, width), most}:
                    each()
                    none, chunk = np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
                    _, bank.ring = _values_after(
                        self._graph,
                        self._parameters,
                        bank.bank,
                        bank.ring,
                        np.full(rows, bank.slots, np.int32),
                        none,
                        none,
                        chunk,
                        chunk,
                        chunk,
                        capacity=capacity,
                        layout=self._layout,
                    )

    def warm_up_whole(self, longest: int, each: Callable[[], None] = lambda: None) -> None:
        """As `warm_up`, what `whole` runs for few and many sequences of up to `longest` tokens, which are counted."""
        for width in (one for one in LENGTH_BUCKETS if one <= bucket(longest, LENGTH_BUCKETS)):
            rows = max(1, TOKENS_A_CALL // width)
            for count in {call_rows(1, rows, width), rows}:
                each()
                self.score_full([np.zeros(width, np.int32)] * count, ["warm-up"] * count, few=True)

    def _score(self, group: list[tuple[_Row, int]], rows: int, width: int, values: list[np.ndarray]) -> None:
        """Values of rows, each with the slot that begins with its prefix, in one call of that shape."""
        bank, count = self._bank, len(group)
        slots, lengths = np.zeros((2, rows), np.int32)
        tokens, positions, segments = np.zeros((3, rows, width), np.int32)
        for row, (one, slot) in enumerate(group):
            slots[row], lengths[row] = slot, len(one.prefix)
            for number, (place, part) in enumerate(_places(one), start=1):
                tokens[row, place], positions[row, place], segments[row, place] = part, np.arange(len(part)), number
        keeps = width <= self.shapes.packed[-1]
        ring_rows = np.full(rows, bank.slots, np.int32)
        if keeps:
            ring_rows[:count] = bank.reserve_ring_rows(count)
        found, ring = _values_after(
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
        found = np.asarray(found)
        self._encoded += int((segments > 0).sum())
        self._slots += tokens.size
        if keeps:
            bank.ring = ring
        for row, (one, slot) in enumerate(group):
            for (at, part), (place, _) in zip(one.parts, _places(one), strict=True):
                values[at] = found[row, place]
                if keeps:
                    bank.remember(int(slot), RingEntry(len(one.prefix), part, int(ring_rows[row]), place.start))


def _packed(jobs: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> list[_Row]:
    """Rows no wider than that: continuations of equal prefixes together, in order, and rows of alike prefixes too."""
    order = sorted(range(len(jobs)), key=lambda at: (len(jobs[at][0]), jobs[at][0].tobytes()))
    rows: list[_Row] = []
    for at in order:
        prefix, rest = jobs[at]
        last = rows[-1] if rows else None
        if last is None or last.used + len(rest) > width or not np.array_equal(last.prefix, prefix):
            rows.append(_Row(prefix, []))
        rows[-1].parts.append((at, rest))
    return rows


def _places(row: _Row) -> Iterator[tuple[slice, np.ndarray]]:
    """Where each continuation lies in its row."""
    used = 0
    for _, tokens in row.parts:
        yield slice(used, used + len(tokens)), tokens
        used += len(tokens)


def bucket_of(length: int, name: str) -> int:
    """The padded length a conversation is scored at. Raises UserError, with its name, for one that is too long."""
    if length > LENGTH_BUCKETS[-1]:
        raise UserError(f"{name}: {length} tokens, more than the {LENGTH_BUCKETS[-1]} that can be scored; shorten it")
    return bucket(length, LENGTH_BUCKETS)
