"""Which trajectories share a row, and the padding token: pure functions of lengths, seed and epoch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class PackingPlan(NamedTuple):
    """Rows of epochs. Row r holds trajectories members[starts[r]:starts[r + 1]]; epoch e ends before row ends[e]."""

    members: np.ndarray  # int32
    starts: np.ndarray  # int64
    ends: np.ndarray  # int64

    def row(self, index: int) -> np.ndarray:
        return self.members[self.starts[index] : self.starts[index + 1]]


def best_fit(lengths: Sequence[int], steps: Sequence[int], *, capacity: int, slots: int) -> list[list[int]]:
    """Packs trajectories into rows of `capacity` tokens and `slots` steps; returns indices by row.

    Largest first, each into the fullest row that has room; large means tokens alone, or whichever of tokens and steps
    is scarcer. Where neither order needs as few rows as all tokens or steps together, each goes into the first row that
    has room instead. What needs the fewest rows is returned: never more than first-fit decreasing. Every trajectory
    must fit into an empty row.
    """
    by_tokens = np.asarray(lengths) / capacity
    by_scarcer = np.maximum(by_tokens, np.asarray(steps) / slots)
    orders = [np.argsort(-size, kind="stable").tolist() for size in (by_tokens, by_scarcer)]
    found = min((_best_fit(order, lengths, steps, capacity, slots) for order in orders), key=len)
    if len(found) > max(-(-sum(lengths) // capacity), -(-sum(steps) // slots)):
        found = min(found, _first_fit(orders[0], lengths, steps, capacity, slots), key=len)
    return found


def _best_fit(
    order: list[int], lengths: Sequence[int], steps: Sequence[int], capacity: int, slots: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    free_slots: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in order:
        at = bisect_left(open_rows, (lengths[item], 0))
        while at < len(open_rows) and free_slots[open_rows[at][1]] < steps[item]:
            at += 1
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
            free_slots.append(slots)
        rows[row].append(item)
        free_slots[row] -= steps[item]
        insort(open_rows, (free - lengths[item], row))
    return rows


def _first_fit(
    order: list[int], lengths: Sequence[int], steps: Sequence[int], capacity: int, slots: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    free_tokens: list[int] = []
    free_slots: list[int] = []
    for item in order:
        length, count = lengths[item], steps[item]
        free = enumerate(zip(free_tokens, free_slots, strict=True))
        row = next((row for row, (tokens, left) in free if tokens >= length and left >= count), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free_tokens.append(capacity)
            free_slots.append(slots)
        rows[row].append(item)
        free_tokens[row] -= length
        free_slots[row] -= count
    return rows


def plan_epochs(
    lengths: np.ndarray, steps: np.ndarray, *, capacity: int, slots: int, window: int, epochs: int, seed: int | None
) -> PackingPlan:
    """Packs every trajectory once an epoch, in an order that depends on seed and epoch alone.

    The order is cut into windows of `window` trajectories, each packed by itself and its rows shuffled, since packing
    sorts by length. The emptiest row of a window is taken apart again and joins the next one, so that only an epoch
    ends with a row half empty. With seed None nothing is shuffled.
    """
    packed: list[list[int]] = []
    ends = []
    for epoch in range(epochs):
        random = None if seed is None else np.random.default_rng([seed, epoch])
        packed.extend(_plan_epoch(lengths, steps, capacity=capacity, slots=slots, window=window, random=random))
        ends.append(len(packed))
    counts = [len(row) for row in packed]
    return PackingPlan(
        members=np.fromiter((item for row in packed for item in row), np.int32, sum(counts)),
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        ends=np.asarray(ends, np.int64),
    )


def _plan_epoch(
    lengths: np.ndarray,
    steps: np.ndarray,
    *,
    capacity: int,
    slots: int,
    window: int,
    random: np.random.Generator | None,
) -> list[list[int]]:
    count = len(lengths)
    order = np.arange(count) if random is None else random.permutation(count)
    packed: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, count, window):
        items = carried + order[start : start + window].tolist()
        chosen = best_fit(lengths[items].tolist(), steps[items].tolist(), capacity=capacity, slots=slots)
        rows = [[items[index] for index in row] for row in chosen]
        carried = []
        if start + window < count:
            emptiest = min(range(len(rows)), key=lambda row: sum(lengths[item] for item in rows[row]))
            carried = rows.pop(emptiest)
        if random is not None:
            rows = [rows[index] for index in random.permutation(len(rows))]
        packed.extend(rows)
    return packed


# Llama 3.1 and later have the first, Qwen the others; both are there for this and stand in no chat.
_KNOWN = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|fim_pad|>")


def padding_id(
    specials: Mapping[str, int], *, declared: int | None, used: Collection[int], template: str
) -> int | None:
    """The id to pad with: the declared one where it may, else another special token that no conversation holds.

    specials: ids of the tokenizer's special tokens; used: those with a part of their own (bos, eos, unk); a token whose
    text stands in the chat template is in use too. Returns None where every special token is in use.
    """
    free = {text: id for text, id in specials.items() if id not in used and text not in template}
    if declared in free.values():
        return declared
    by_name = [text for word in ("pad", "reserved") for text in sorted(free, key=free.get) if word in text.lower()]
    return next((free[text] for text in (*_KNOWN, *by_name) if text in free), None)
