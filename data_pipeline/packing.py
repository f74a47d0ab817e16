"""Packing of trajectories into rows, and the padding token: pure functions of lengths, seed and epoch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class PackingPlan(NamedTuple):
    """Rows of all epochs. Row r holds the trajectories members[starts[r]:starts[r + 1]].

    Epoch e ends before row ends[e].
    """

    members: np.ndarray  # int32
    starts: np.ndarray  # int64
    ends: np.ndarray  # int64

    def row(self, index: int) -> np.ndarray:
        """Indices of the trajectories in a row."""
        return self.members[self.starts[index] : self.starts[index + 1]]


def best_fit(lengths: Sequence[int], steps: Sequence[int], *, capacity: int, slots: int) -> list[list[int]]:
    """Packs trajectories into rows of `capacity` tokens and `slots` steps; returns their indices by row.

    Best-fit decreasing: the largest trajectory first, each into the fullest row that has room. It is tried with two
    orders, by tokens and by the scarcer of tokens and steps. If neither reaches the lower bound (all tokens or all
    steps, divided by what a row holds), first-fit decreasing is tried as well. The plan with the fewest rows is
    returned, so there are never more rows than with first-fit decreasing. Every trajectory must fit into an empty row.
    """
    by_tokens = np.asarray(lengths) / capacity
    by_scarcer = np.maximum(by_tokens, np.asarray(steps) / slots)
    # Stable: the order of ties must not depend on how NumPy sorts, or a saved position would fit another plan.
    orders = [np.argsort(-size, kind="stable").tolist() for size in (by_tokens, by_scarcer)]
    rows = min((_best_fit(order, lengths, steps, capacity, slots) for order in orders), key=len)
    # First fit is quadratic in the number of rows, so it runs only where it can help.
    if len(rows) > max(-(-sum(lengths) // capacity), -(-sum(steps) // slots)):
        rows = min(rows, _first_fit(orders[0], lengths, steps, capacity, slots), key=len)
    return rows


def _best_fit(
    order: list[int], lengths: Sequence[int], steps: Sequence[int], capacity: int, slots: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    free_slots: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in order:
        # The fullest row with enough free tokens, then the next fullest until one also has the step slots.
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
    """Packs every trajectory once per epoch, in an order that depends only on seed and epoch.

    The order is cut into windows of `window` trajectories, and each window is packed on its own. Packing sorts by
    length, so the rows of a window are shuffled afterwards. The trajectories of a window's emptiest row move to the
    next window, so that only the last row of an epoch is left partly empty. With seed None nothing is shuffled.
    """
    packed: list[list[int]] = []
    ends = []
    for epoch in range(epochs):
        # A generator for each epoch: adding epochs does not change the earlier ones.
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


# Llama 3.1 and later have the first, Qwen the others. They exist for padding and occur in no conversation.
_PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|fim_pad|>")


def padding_id(
    specials: Mapping[str, int], *, declared: int | None, used: Collection[int], template: str
) -> int | None:
    """The id to pad with: the declared one if it is free, else another special token that no conversation contains.

    A token is free if it has no other role and its text does not occur in the chat template. Of several, one that is
    known or named as padding is preferred, then one that is reserved, then the first.

    Args:
      specials: ids of the tokenizer's special tokens by text.
      declared: id of the tokenizer's pad_token.
      used: ids with a role of their own (bos, eos, unk), and those that the template puts together.
      template: source of the chat template.

    Returns:
      None if no special token is free.
    """
    # Readers take the last token that is not padding. If the end of a message were padding, they would read before it.
    free = {text: id for text, id in specials.items() if id not in used and text not in template}
    if declared in free.values():
        return declared
    by_name = [text for word in ("pad", "reserved") for text in sorted(free, key=free.get) if word in text.lower()]
    preferred = [text for text in (*_PADDING_TOKENS, *by_name) if text in free]
    return free[preferred[0]] if preferred else min(free.values(), default=None)
