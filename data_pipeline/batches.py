"""Shards to packed batches: shuffled epochs for training, a single pass for evaluation.

A split is read into memory, and the rows of all batches are planned before the first one, as a function of lengths,
seed and epoch. So the position in the data is a single number, the batches handed out so far: saving it costs nothing,
and restoring it is exact and immediate. The complete split is shuffled, not a buffer of it, and batches do not depend
on how many hosts share the rows. The price is memory: four bytes per token. tf.data gathers the planned batches ahead
of the training step.

Shapes: B rows of a batch, T tokens of a row, S step slots of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from data_pipeline.errors import DataError, shown
from data_pipeline.packing import plan_epochs
from data_pipeline.shards import Dataset, ShardSplit, open_dataset
from data_pipeline.supervision import pair_layout, select

Batch = dict[str, np.ndarray]
# A mask of the records of a split that are used.
Selection = Callable[[ShardSplit], np.ndarray]

_PREFETCH = 8  # batches
_TOKEN_FIELDS = {"tokens": np.int32, "segments": np.int32, "positions": np.int32}
_STEP_FIELDS = {
    "read_positions": np.int32,
    "state_positions": np.int32,
    "step_index": np.int32,
    "trajectory": np.int32,
    "example": np.int32,
    "rewards": np.float32,
    "step_labels": np.float32,
    "weights": np.float32,
    "is_first": np.bool_,
    "is_last": np.bool_,
    "valid": np.bool_,
}
# The order of the fields where tf.data has only positions.
_FIELDS = _TOKEN_FIELDS | _STEP_FIELDS
# A split with pairs has one more.
_BRANCHES = {"branches": np.int32}
# Values of a step slot without a step; the other fields are 0 or False there.
_NO_STEP = {"trajectory": -1, "example": -1, "step_labels": np.nan}


class Shape(NamedTuple):
    """Shape of a batch: `rows` (B) rows of `length` (T) tokens and `steps_per_row` (S) step slots."""

    rows: int
    length: int
    steps_per_row: int


class _PackedSplit:
    """A split with a packing plan, and the batches that they define."""

    def __init__(self, dataset: Dataset, split: str, shape: Shape, selection: Selection | None, **planning: Any):
        self.split = dataset.split(split)
        self.mask = np.ones(len(self.split.ids), bool) if selection is None else selection(self.split)
        if not self.mask.any():
            raise DataError(f"{dataset.directory}: split {split} has no trajectory that is selected")
        self.split = select(self.split, self.mask)
        self._layout = pair_layout(self.split)
        self._fields = _FIELDS if self._layout is None else _FIELDS | _BRANCHES
        self._pad_id = dataset.metadata.pad_id
        self.shape = shape
        _check_fit(self.split, shape)
        self.plan = plan_epochs(
            self.split.lengths, self.split.step_counts, capacity=shape.length, slots=shape.steps_per_row, **planning
        )
        self.row_count = len(self.plan.starts) - 1
        self.batch_count = -(-self.row_count // shape.rows)

    @property
    def fill(self) -> float:
        """Share of the token slots of all batches that hold a token."""
        used = self.split.lengths[self.plan.members].sum()
        return float(used / (self.batch_count * self.shape.rows * self.shape.length))

    def rows_of(self, number: int) -> np.ndarray:
        """Indices into the plan of the rows of batch `number`."""
        first = number * self.shape.rows
        return np.arange(first, min(first + self.shape.rows, self.row_count))

    def gather(self, number: int, local_rows: np.ndarray | None = None) -> Batch:
        """Batch `number`, or only its rows `local_rows`. Rows past the last one of the plan are padding."""
        first, rows = number * self.shape.rows, self.shape.rows if local_rows is None else len(local_rows)
        plan_rows = first + (np.arange(rows) if local_rows is None else local_rows)
        plan_rows = plan_rows[plan_rows < self.row_count]
        counts = self.plan.starts[plan_rows + 1] - self.plan.starts[plan_rows]
        row_of = np.repeat(np.arange(len(plan_rows)), counts)
        # Index among all trajectories of the batch, minus that of the first one in the same row.
        rank = np.arange(len(row_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        examples = self.plan.members[self.plan.starts[plan_rows][row_of] + rank]
        return {
            **self._tokens(examples, row_of, rank, rows),
            **self._steps(examples, row_of, rank, rows),
        }

    def _tokens(self, examples: np.ndarray, row_of: np.ndarray, rank: np.ndarray, rows: int) -> Batch:
        split, length = self.split, self.shape.length
        batch = {name: np.zeros((rows, length), dtype) for name, dtype in _TOKEN_FIELDS.items()}
        batch["tokens"].fill(self._pad_id)
        spans = _spans(split.lengths[examples], row_of, length)
        source = split.token_starts[examples][spans.owner] + spans.within
        # reshape(-1) is a view, so this writes into the batch.
        batch["tokens"].reshape(-1)[spans.slots] = split.tokens[source]
        # Segments count from 1, because 0 marks padding.
        batch["segments"].reshape(-1)[spans.slots] = rank[spans.owner] + 1
        if self._layout is None:
            batch["positions"].reshape(-1)[spans.slots] = spans.within
            return batch
        batch["branches"] = np.zeros((rows, length), np.int32)
        for name, values in self._layout._asdict().items():
            batch[name].reshape(-1)[spans.slots] = values[source]
        return batch

    def _steps(self, examples: np.ndarray, row_of: np.ndarray, rank: np.ndarray, rows: int) -> Batch:
        split, slots = self.split, self.shape.steps_per_row
        batch = {name: np.full((rows, slots), _NO_STEP.get(name, 0), dtype) for name, dtype in _STEP_FIELDS.items()}
        counts = split.step_counts[examples]
        spans = _spans(counts, row_of, slots)
        source = split.step_starts[examples][spans.owner] + spans.within
        # Positions count from the trajectory in the shards, and from the row in a batch.
        offset = _offsets(split.lengths[examples], row_of)[spans.owner]
        values = {
            "read_positions": split.read_positions[source] + offset,
            "state_positions": split.state_positions[source] + offset,
            "step_index": spans.within,
            "trajectory": rank[spans.owner],
            "example": examples[spans.owner],
            "rewards": split.rewards[source],
            "step_labels": split.step_labels[source],
            "weights": split.weights[examples][spans.owner],
            "is_first": spans.within == 0,
            "is_last": spans.within == counts[spans.owner] - 1,
            "valid": True,
        }
        for name, value in values.items():
            batch[name].reshape(-1)[spans.slots] = value
        return batch

    def stream(self, start: int, local_rows: np.ndarray | None = None) -> Iterator[Batch]:
        """Batches from number `start` on, or only their rows `local_rows`, gathered ahead in the background."""

        def gather(number: np.ndarray) -> list[np.ndarray]:
            batch = self.gather(int(number), local_rows)
            # tf.numpy_function returns a list, not a dictionary.
            return [batch[name] for name in self._fields]

        def gathered(number: tf.Tensor) -> list[tf.Tensor]:
            return tf.numpy_function(gather, [number], list(self._fields.values()), stateful=False)

        batches = tf.data.Dataset.range(start, self.batch_count).map(gathered).prefetch(_PREFETCH)
        for arrays in batches.as_numpy_iterator():
            yield dict(zip(self._fields, arrays, strict=True))


class _Spans(NamedTuple):
    """Elements of trajectories laid out in rows: the flat slot of each, its trajectory, and its index in that."""

    slots: np.ndarray
    owner: np.ndarray
    within: np.ndarray


def _offsets(counts: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Start of each trajectory in its row, in elements. `row_of`, the row of each trajectory, ascends."""
    before = np.cumsum(counts) - counts
    # As `row_of` ascends, searchsorted gives the first trajectory of each row.
    return before - before[np.searchsorted(row_of, row_of)]


def _spans(counts: np.ndarray, row_of: np.ndarray, width: int) -> _Spans:
    """Layout of `counts` elements of each trajectory in rows of `width` slots."""
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Spans((row_of * width + _offsets(counts, row_of))[owner] + within, owner, within)


class EvaluationBatches:
    """Every trajectory of a split exactly once, in packed order. Can be iterated again; `len` is the number of batches.

    `split` holds the trajectories, and a batch's `example` is an index into it. `fill` is the share of token slots that
    hold a token. `identity` names the batches: it depends on the data, the split, the shape of a batch and the plan.
    """

    def __init__(self, packed: _PackedSplit, identity: str):
        self._packed = packed
        self.identity = identity
        self.split = packed.split
        self.fill = packed.fill

    def __len__(self) -> int:
        return self._packed.batch_count

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def starting_at(self, number: int) -> Iterator[Batch]:
        """The batches from `number` on, counted from 0."""
        return self._packed.stream(number)


class TrainingBatches:
    """An iterator over the batches of all epochs, whose position can be saved and restored; see `training_batches`."""

    def __init__(self, packed: _PackedSplit, identity: str):
        self._packed = packed
        self._identity = identity
        self._stream: Iterator[Batch] | None = None
        self._local_rows: np.ndarray | None = None
        self.split = packed.split
        self.fill = packed.fill
        self.position = 0
        # A batch with rows of two epochs counts to the earlier one.
        self.epoch_ends: list[int] = (-(-packed.plan.ends // packed.shape.rows)).tolist()

    def __len__(self) -> int:
        return self._packed.batch_count

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._packed.stream(self.position, self._local_rows)
        # Counted when handed out: batches gathered ahead are not in a saved position, and are gathered again.
        batch = next(self._stream)
        self.position += 1
        return batch

    def peek(self) -> Batch:
        """The next batch, which stays the next one."""
        return self._packed.gather(self.position, self._local_rows)

    def set_local_rows(self, rows: np.ndarray) -> None:
        """Restricts the batches from here on to these rows, ascending: those of this host."""
        # Batches that were gathered ahead have other rows, so the stream is made again.
        self._local_rows, self._stream = np.asarray(rows), None

    def trajectories(self, number: int) -> list[str]:
        """Ids of the trajectories in batch `number` (from 0), on all hosts."""
        rows = self._packed.rows_of(number)
        return [self.split.ids[member] for row in rows for member in self._packed.plan.row(row)]

    def save_state(self) -> dict[str, Any]:
        """The position after the batches handed out so far, as a JSON object."""
        return {"batches": self.position, "plan": self._identity}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `state` was saved.

        Raises DataError if it was saved with other data, another seed, other epochs or another batch shape.
        """
        batches = state.get("batches")
        if not isinstance(batches, int) or not 0 <= batches <= len(self):
            raise DataError(
                f"the saved data position has batches = {shown(batches)}, not a whole number of at most "
                f"{len(self)}: the checkpoint is broken; delete it"
            )
        if state.get("plan") != self._identity:
            raise DataError(
                "the saved data position belongs to other batches: the dataset, the seed, the epochs or the batch "
                "shape have changed; train into another work directory, or restore the old settings"
            )
        self.position = batches
        self._stream = None


def training_batches(
    dataset: Dataset | str | PathLike[str],
    split: str = "train",
    *,
    rows: int,
    length: int,
    steps_per_row: int,
    epochs: int,
    seed: int,
    window: int = 256,
    selection: Selection | None = None,
) -> TrainingBatches:
    """Packed batches of `epochs` passes over a split, each in another order.

    Epochs follow each other without a gap: only the very last batch may have rows of padding. A batch is a dictionary:

    tokens, segments, positions    int32[B, T]    segment 0 is padding; positions restart with each trajectory
    read_positions, state_positions int32[B, S]   indices into the row
    step_index, trajectory         int32[B, S]    index of the step in its trajectory, of the trajectory in its row
    example                        int32[B, S]    index of the trajectory in `.split`
    rewards, step_labels, weights  float32[B, S]  missing labels are NaN; a weight is a number of equal trajectories
    is_first, is_last, valid       bool[B, S]

    Slots without a step have valid False, trajectory and example -1, label NaN, and 0 in the other fields. A split with
    pairs also has branches, int32[B, T]; see `data_pipeline.supervision`.

    Args:
      dataset: from `open_dataset`, which checks the tokenizer, or a directory.
      rows, length, steps_per_row: B, T, S.
      window: number of trajectories that are packed together; see `packing.plan_epochs`.
      selection: which trajectories are used; `.split` then holds only these.

    Raises:
      DataError: a trajectory has more than T tokens or S steps, the split is missing, or shards are broken.
    """
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    shape = Shape(rows, length, steps_per_row)
    packed = _PackedSplit(dataset, split, shape, selection, window=window, epochs=epochs, seed=seed)
    return TrainingBatches(packed, _identity(dataset, split, packed))


def evaluation_batches(
    dataset: Dataset | str | PathLike[str],
    split: str = "validation",
    *,
    rows: int,
    length: int,
    steps_per_row: int,
    window: int = 1024,
    selection: Selection | None = None,
) -> EvaluationBatches:
    """A single pass over a split in batches as of `training_batches`, not shuffled; the last may have padding rows."""
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    shape = Shape(rows, length, steps_per_row)
    packed = _PackedSplit(dataset, split, shape, selection, window=window, epochs=1, seed=None)
    return EvaluationBatches(packed, _identity(dataset, split, packed))


def _identity(dataset: Dataset, split: str, packed: _PackedSplit) -> str:
    """sha256 of data, shape and plan: a saved position is only valid for the very same batches."""
    digest = hashlib.sha256(f"{dataset.fingerprint} {dataset.metadata.pad_id} {split} {packed.shape}".encode())
    for array in packed.plan:
        digest.update(array.tobytes())
    if not packed.mask.all():
        digest.update(packed.mask.tobytes())
    return digest.hexdigest()


def _check_fit(split: ShardSplit, shape: Shape) -> None:
    for what, sizes, bound, field in (
        ("tokens", split.lengths, shape.length, "length"),
        ("steps", split.step_counts, shape.steps_per_row, "steps_per_row"),
    ):
        largest = int(sizes.argmax())
        if sizes[largest] > bound:
            raise DataError(
                f"trajectory {split.ids[largest]} has {sizes[largest]} {what}, a row holds {bound}; raise {field}, or "
                "build the dataset with a smaller max_length"
            )
