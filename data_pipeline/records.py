"""Rows of trajectories to the records of a dataset: which are left out, cut or merged, and the counts of these."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from data_pipeline.encode import Encoded, Encoder
from data_pipeline.errors import DataError, SplitError
from data_pipeline.metadata import LENGTH_EDGES, SplitMetadata
from data_pipeline.preferences import Preference
from data_pipeline.splits import Inputs, Splits, named_split
from data_pipeline.trajectory import Trajectory

TooLong = Literal["error", "drop", "window"]


class _Steps(NamedTuple):
    """The arrays of a record: tokens int32 [T], and by step [S] positions int32, rewards and labels float32."""

    tokens: np.ndarray
    read_positions: np.ndarray
    state_positions: np.ndarray
    rewards: np.ndarray
    step_labels: np.ndarray


class RowCounts(NamedTuple):
    """Rows of a split, and how many of them ended in an error, were too long and dropped, or were too long and cut.

    Of the stored rows, `without_outcome` have step labels only, and `pairs` compare actions.
    """

    rows: int = 0
    errors: int = 0
    dropped: int = 0
    windowed: int = 0
    without_outcome: int = 0
    pairs: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*map(sum, zip(self, other, strict=True)))


class Sizes(NamedTuple):
    """By trajectory, what the metadata of a split is computed from, [N] each. `tasks` are digests."""

    lengths: np.ndarray
    steps: np.ndarray
    weights: np.ndarray
    returns: np.ndarray
    tasks: list[bytes]


class PreparedRow(NamedTuple):
    """Contribution of a row: to the counts, and to the records, None if the row is left out."""

    counts: RowCounts
    steps: _Steps | None


class Preparation:
    """Turns single rows into records. Equal conversations are encoded once."""

    def __init__(self, encoder: Encoder, max_length: int | None, too_long: TooLong):
        self._encoder, self._max_length, self._too_long = encoder, max_length, too_long
        # By digest of the conversation: messages as keys would keep every row of the file in memory.
        self._encoded: dict[bytes, Encoded] = {}

    def prepare(self, trajectory: Trajectory | Preference, row: str) -> PreparedRow:
        """Encodes a row. Raises DataError for one that cannot be trained on."""
        if isinstance(trajectory, Preference):
            return self._prepare_preference(trajectory, row)
        # Before encoding: an episode that failed at once has no step, which the encoder refuses.
        if trajectory.ended == "error":
            return PreparedRow(RowCounts(rows=1, errors=1), None)
        steps = _steps(trajectory, self._encode(trajectory, row), row)
        counts = RowCounts(rows=1, without_outcome=int(np.isnan(steps.rewards[0])))
        if self._fits(steps, row):
            return PreparedRow(counts, steps)
        # A window needs a complete step: a prompt that fills it leaves nothing to train on.
        if self._too_long == "drop" or steps.read_positions[0] >= self._max_length:
            return PreparedRow(RowCounts(rows=1, dropped=1), None)
        return PreparedRow(counts._replace(windowed=1), self._window(steps))

    def _prepare_preference(self, preference: Preference, row: str) -> PreparedRow:
        steps = steps_of_pairs(self._encoder, preference, row)
        # A cut would take an action away, so a window drops the row as well.
        if self._fits(steps, row):
            return PreparedRow(RowCounts(rows=1, pairs=1), steps)
        return PreparedRow(RowCounts(rows=1, dropped=1), None)

    def _fits(self, steps: _Steps, row: str) -> bool:
        """Raises DataError for a row that is too long, if such rows are errors."""
        if self._max_length is None or len(steps.tokens) <= self._max_length:
            return True
        if self._too_long == "error":
            raise DataError(
                f"{row}: {len(steps.tokens)} tokens, max_length is {self._max_length}; "
                'raise it, or set too_long to "drop" or "window"'
            )
        return False

    def _encode(self, trajectory: Trajectory, row: str) -> Encoded:
        key = hashlib.sha256(msgspec.json.encode([trajectory.messages, trajectory.tools])).digest()
        if key not in self._encoded:
            self._encoded[key] = self._encoder.trajectory(trajectory.messages, row=row, tools=trajectory.tools)
        return self._encoded[key]

    def _window(self, steps: _Steps) -> _Steps:
        """The first steps that fit. The last of them gets the return from there on as its reward."""
        # The number of positions below max_length: a step read at token max_length - 1 is the last that fits.
        kept = int(np.searchsorted(steps.read_positions, self._max_length))
        rewards = steps.rewards[:kept].copy()
        # Its Monte Carlo value, so that the undiscounted return of every kept step stays the same.
        rewards[-1] = steps.rewards[kept - 1 :].sum(dtype=np.float64)
        return _Steps(
            steps.tokens[: steps.read_positions[kept - 1] + 1],
            steps.read_positions[:kept],
            steps.state_positions[:kept],
            rewards,
            steps.step_labels[:kept],
        )


def identity(trajectory: Trajectory | Preference, steps: _Steps) -> bytes:
    """Digest that is equal for rows to merge: same task, outcome and stored arrays; the id may differ."""
    digest = hashlib.sha256(f"{trajectory.task_id}\0{_outcome(trajectory)}".encode())
    for array in steps:
        # With the lengths, or values could move from one array to the next without changing the digest.
        digest.update(b"%d " % len(array) + array.tobytes())
    return digest.digest()


def record_of(trajectory: Trajectory | Preference, steps: _Steps) -> dict[str, Any]:
    """The record of a row, with weight 1."""
    # Records have no null, so NaN is a missing outcome.
    outcome = np.nan if _outcome(trajectory) is None else _outcome(trajectory)
    return {"id": trajectory.id, "task": trajectory.task_id, "outcome": outcome, "weight": 1, **steps._asdict()}


def sizes_of(records: Sequence[Mapping[str, Any]]) -> Sizes:
    """Sizes of records, in their order."""
    return Sizes(
        lengths=np.asarray([len(record["tokens"]) for record in records], np.int64),
        steps=np.asarray([len(record["rewards"]) for record in records], np.int64),
        weights=np.asarray([record["weight"] for record in records], np.int64),
        returns=np.asarray([record["rewards"].sum(dtype=np.float64) for record in records]),
        # Digests, because a task may be named by its whole prompt.
        tasks=[hashlib.blake2b(record["task"].encode(), digest_size=12).digest() for record in records],
    )


def split_metadata(counts: RowCounts, sizes: Sizes) -> SplitMetadata:
    """The entry of a split in metadata.json."""
    count = len(sizes.lengths)
    judged = ~np.isnan(sizes.returns)
    # Left out where they are 0, so that the metadata of outcomes alone stays as it was.
    supervised = {name: getattr(counts, name) or msgspec.UNSET for name in ("without_outcome", "pairs")}
    return SplitMetadata(
        **counts._asdict() | supervised,
        merged=int(sizes.weights.sum()) - count,
        trajectories=count,
        tasks=len(set(sizes.tasks)),
        steps=int(sizes.steps.sum()),
        tokens=int(sizes.lengths.sum()),
        longest=int(sizes.lengths.max()),
        most_steps=int(sizes.steps.max()),
        mean_return=float(np.average(sizes.returns[judged], weights=sizes.weights[judged])) if judged.any() else None,
        lengths=np.histogram(sizes.lengths, [*LENGTH_EDGES, np.inf])[0].tolist(),
    )


class SplitRecords:
    """Records and row counts of one split; equal trajectories become one record with a weight."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.counts = RowCounts()
        self._index: dict[bytes, int] = {}

    def add(self, trajectory: Trajectory | Preference, steps: _Steps) -> None:
        """Adds a row, or counts it in the weight of an equal record."""
        # A new identity gets the index after the last record.
        index = self._index.setdefault(identity(trajectory, steps), len(self.records))
        if index < len(self.records):
            self.records[index]["weight"] += 1
        else:
            self.records.append(record_of(trajectory, steps))


class Rows:
    """Records of all splits; checks that every task is in one split."""

    def __init__(self, encoder: Encoder, max_length: int | None, too_long: TooLong):
        self.splits: dict[str, SplitRecords] = {}
        self._preparation = Preparation(encoder, max_length, too_long)
        self._splits = Splits()

    def add(self, trajectory: Trajectory | Preference, file_split: str | None, where: str) -> None:
        """Adds a row. Raises DataError for one that cannot be trained on, which is then in none of the counts."""
        row = f"{where} ({trajectory.id})"
        split = split_of_row(trajectory, file_split, row)
        # Before the row is prepared: a task in two splits is an error even if the row is then left out as bad.
        try:
            self._splits.add(trajectory.task_id, split)
        except SplitError as error:
            raise SplitError(f"{row}: {error}") from None
        # A split is listed even if all of its rows are bad, so that `check_not_empty` can report it.
        records = self.splits.setdefault(split, SplitRecords())
        prepared = self._preparation.prepare(trajectory, row)
        records.counts += prepared.counts
        if prepared.steps is not None:
            records.add(trajectory, prepared.steps)


def split_of_row(trajectory: Trajectory | Preference, file_split: str | None, row: str) -> str:
    """The split of a row: that of its file, else its own, else "train". Raises DataError as `named_split`."""
    return named_split(trajectory.split, file_split, row) or "train"


def _steps(trajectory: Trajectory, encoded: Encoded, row: str) -> _Steps:
    count = len(encoded.read_positions)
    if trajectory.rewards is not None:
        rewards = np.asarray(trajectory.rewards, np.float32)
    elif trajectory.outcome is not None:
        rewards = np.zeros(count, np.float32)
        rewards[-1] = trajectory.outcome
    else:
        # NaN: the trajectory is trained on by its labels only.
        rewards = np.full(count, np.nan, np.float32)
    labels = np.full(count, np.nan, np.float32)
    if trajectory.step_labels is not None:
        labels[:] = [np.nan if label is None else label for label in trajectory.step_labels]
    if np.isnan(rewards).all() and np.isnan(labels).all():
        raise DataError(
            f"{row}: no outcome and no rewards; training needs an outcome in [0, 1], or step_labels "
            '(or "ended": "error")'
        )
    return _Steps(encoded.tokens, encoded.read_positions, encoded.state_positions, rewards, labels)


def steps_of_pairs(encoder: Encoder, preference: Preference, row: str) -> _Steps:
    """The actions of a state: the tokens of the state once, then those of each action; see data_pipeline.supervision.

    An action is encoded as the last message of its conversation, up to its read position.
    """
    state = preference.state
    encoded = [encoder.trajectory([*state, action], row=row, tools=preference.tools) for action in preference.actions]
    first, before = encoded[0], int(encoded[0].state_positions[0])
    actions = []
    for index, conversation in enumerate(encoded):
        prefix = conversation.tokens[: before + 1]
        if conversation.state_positions[0] != before or not np.array_equal(prefix, first.tokens[: before + 1]):
            raise DataError(f"{row}: the chat template renders the state differently before its actions")
        actions.append(conversation.tokens[before + 1 : conversation.read_positions[0] + 1])
        if index and np.array_equal(actions[index], actions[0]):
            raise DataError(f"{row}: rejected[{index - 1}] is the chosen action; a pair needs two different ones")
    nothing = np.full(len(actions), np.nan, np.float32)
    return _Steps(
        tokens=np.concatenate([first.tokens[: before + 1], *actions]),
        read_positions=(before + np.cumsum([len(tokens) for tokens in actions])).astype(np.int32),
        state_positions=np.full(len(actions), before, np.int32),
        rewards=nothing,
        step_labels=nothing,
    )


def _outcome(row: Trajectory | Preference) -> float | None:
    return row.outcome if isinstance(row, Trajectory) else None


def check_not_empty(splits: Mapping[str, tuple[RowCounts, int]], inputs: Inputs) -> None:
    """Raises DataError if a split of the inputs, or one with rows, has no trajectory to store.

    splits: (row counts, number of records) by split.
    """
    missing = [split for split in inputs if split is not None and split not in splits]
    if missing or not splits:
        raise DataError(f"no row was given for split {missing[0] if missing else 'train'}")
    for split, (counts, records) in splits.items():
        if not records:
            raise DataError(
                f"split {split}: no trajectory is left of {counts.rows} rows; {counts.errors} ended in an error, "
                f"{counts.dropped} were too long"
            )
