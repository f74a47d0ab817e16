"""Rows of trajectories to the records of a dataset: what is left out, cut and merged is decided and counted here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from data_pipeline.encode import Encoded, Encoder
from data_pipeline.errors import DataError, SplitError
from data_pipeline.metadata import LENGTH_EDGES, SplitMetadata
from data_pipeline.splits import Inputs, Splits, named_split
from data_pipeline.trajectory import Trajectory

TooLong = Literal["error", "drop", "window"]


class _Steps(NamedTuple):
    """What is stored of a trajectory by token and by step."""

    tokens: np.ndarray
    read_positions: np.ndarray
    state_positions: np.ndarray
    rewards: np.ndarray
    step_labels: np.ndarray


class RowCounts(NamedTuple):
    """Rows of a split, and those of them that ended in an error, were too long and left out, or cut."""

    rows: int = 0
    errors: int = 0
    dropped: int = 0
    windowed: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*map(sum, zip(self, other, strict=True)))


class Sizes(NamedTuple):
    """What the metadata of a split is made of, by trajectory: [N] each. `tasks` are digests."""

    lengths: np.ndarray
    steps: np.ndarray
    weights: np.ndarray
    returns: np.ndarray
    tasks: list[bytes]


class PreparedRow(NamedTuple):
    """What becomes of a row: what it adds to the counts, and what is stored of it, None where it is left out."""

    counts: RowCounts
    steps: _Steps | None


class Preparation:
    """Rows to what is stored of them, each by itself."""

    def __init__(self, encoder: Encoder, max_length: int | None, too_long: TooLong):
        self._encoder, self._max_length, self._too_long = encoder, max_length, too_long
        self._encoded: dict[bytes, Encoded] = {}

    def prepare(self, trajectory: Trajectory, row: str) -> PreparedRow:
        """Raises DataError for a row that cannot be trained on."""
        if trajectory.ended == "error":
            return PreparedRow(RowCounts(rows=1, errors=1), None)
        steps = _steps(trajectory, self._encode(trajectory, row), row)
        if self._max_length is None or len(steps.tokens) <= self._max_length:
            return PreparedRow(RowCounts(rows=1), steps)
        if self._too_long == "error":
            raise DataError(
                f"{row}: {len(steps.tokens)} tokens, max_length is {self._max_length}; "
                'raise it, or set too_long to "drop" or "window"'
            )
        # A window needs one whole step: a prompt that fills it leaves nothing to train on.
        if self._too_long == "drop" or steps.read_positions[0] >= self._max_length:
            return PreparedRow(RowCounts(rows=1, dropped=1), None)
        return PreparedRow(RowCounts(rows=1, windowed=1), self._window(steps))

    def _encode(self, trajectory: Trajectory, row: str) -> Encoded:
        key = hashlib.sha256(msgspec.json.encode([trajectory.messages, trajectory.tools])).digest()
        if key not in self._encoded:
            self._encoded[key] = self._encoder.trajectory(trajectory.messages, row=row, tools=trajectory.tools)
        return self._encoded[key]

    def _window(self, steps: _Steps) -> _Steps:
        """As many first steps as fit, closed with what the trajectory still earned from the last of them on."""
        kept = int(np.searchsorted(steps.read_positions, self._max_length))
        rewards = steps.rewards[:kept].copy()
        rewards[-1] = steps.rewards[kept - 1 :].sum(dtype=np.float64)
        return _Steps(
            steps.tokens[: steps.read_positions[kept - 1] + 1],
            steps.read_positions[:kept],
            steps.state_positions[:kept],
            rewards,
            steps.step_labels[:kept],
        )


def identity(trajectory: Trajectory, steps: _Steps) -> bytes:
    """Equal for trajectories that are merged into one: of the same task and outcome, stored alike but for their id."""
    digest = hashlib.sha256(f"{trajectory.task_id}\0{trajectory.outcome}".encode())
    for array in steps:
        digest.update(b"%d " % len(array) + array.tobytes())
    return digest.digest()


def record_of(trajectory: Trajectory, steps: _Steps) -> dict[str, Any]:
    """The record of a trajectory that stands for itself alone."""
    outcome = np.nan if trajectory.outcome is None else trajectory.outcome
    return {"id": trajectory.id, "task": trajectory.task_id, "outcome": outcome, "weight": 1, **steps._asdict()}


def sizes_of(records: Sequence[Mapping[str, Any]]) -> Sizes:
    return Sizes(
        lengths=np.asarray([len(record["tokens"]) for record in records], np.int64),
        steps=np.asarray([len(record["rewards"]) for record in records], np.int64),
        weights=np.asarray([record["weight"] for record in records], np.int64),
        returns=np.asarray([record["rewards"].sum(dtype=np.float64) for record in records]),
        tasks=[hashlib.blake2b(record["task"].encode(), digest_size=12).digest() for record in records],
    )


def split_metadata(counts: RowCounts, sizes: Sizes) -> SplitMetadata:
    count = len(sizes.lengths)
    return SplitMetadata(
        **counts._asdict(),
        merged=int(sizes.weights.sum()) - count,
        trajectories=count,
        tasks=len(set(sizes.tasks)),
        steps=int(sizes.steps.sum()),
        tokens=int(sizes.lengths.sum()),
        longest=int(sizes.lengths.max()),
        most_steps=int(sizes.steps.max()),
        mean_return=float(np.average(sizes.returns, weights=sizes.weights)),
        lengths=np.histogram(sizes.lengths, [*LENGTH_EDGES, np.inf])[0].tolist(),
    )


class SplitRecords:
    """Collects the records of one split: merges equal ones, counts what is left out."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.counts = RowCounts()
        self._index: dict[bytes, int] = {}

    def add(self, trajectory: Trajectory, steps: _Steps) -> None:
        index = self._index.setdefault(identity(trajectory, steps), len(self.records))
        if index < len(self.records):
            self.records[index]["weight"] += 1
        else:
            self.records.append(record_of(trajectory, steps))


class Rows:
    """Rows of any split to records; what holds across splits is checked here."""

    def __init__(self, encoder: Encoder, max_length: int | None, too_long: TooLong):
        self.splits: dict[str, SplitRecords] = {}
        self._preparation = Preparation(encoder, max_length, too_long)
        self._splits = Splits()

    def add(self, trajectory: Trajectory, split: str | None, where: str) -> None:
        """Raises DataError for a row that cannot be trained on, which is then in none of the counts."""
        row = f"{where} ({trajectory.id})"
        split = self._split(trajectory, split, row)
        records = self.splits.setdefault(split, SplitRecords())
        prepared = self._preparation.prepare(trajectory, row)
        records.counts += prepared.counts
        if prepared.steps is not None:
            records.add(trajectory, prepared.steps)

    def _split(self, trajectory: Trajectory, split: str | None, row: str) -> str:
        """The split of a row; a task in two splits would let what is measured leak into what is learnt."""
        split = split_of_row(trajectory, split, row)
        try:
            self._splits.add(trajectory.task_id, split)
        except SplitError as error:
            raise SplitError(f"{row}: {error}") from None
        return split


def split_of_row(trajectory: Trajectory, given: str | None, row: str) -> str:
    """The split that a row names or its file was given for, "train" without either. Raises DataError, see splits."""
    return named_split(trajectory.split, given, row) or "train"


def _steps(trajectory: Trajectory, encoded: Encoded, row: str) -> _Steps:
    count = len(encoded.read_positions)
    if trajectory.rewards is not None:
        rewards = np.asarray(trajectory.rewards, np.float32)
    elif trajectory.outcome is not None:
        rewards = np.zeros(count, np.float32)
        rewards[-1] = trajectory.outcome
    else:
        raise DataError(f'{row}: no outcome and no rewards; training needs an outcome in [0, 1] (or "ended": "error")')
    labels = np.full(count, np.nan, np.float32)
    if trajectory.step_labels is not None:
        labels[:] = [np.nan if label is None else label for label in trajectory.step_labels]
    return _Steps(encoded.tokens, encoded.read_positions, encoded.state_positions, rewards, labels)


def check_not_empty(splits: Mapping[str, tuple[RowCounts, int]], inputs: Inputs) -> None:
    """Raises DataError where a split that was asked for, or has rows, has no trajectory to store."""
    missing = [split for split in inputs if split is not None and split not in splits]
    if missing or not splits:
        raise DataError(f"no row was given for split {missing[0] if missing else 'train'}")
    for split, found in splits.items():
        if not found[1]:
            counts = found[0]
            raise DataError(
                f"split {split}: no trajectory is left of {counts.rows} rows; {counts.errors} ended in an error, "
                f"{counts.dropped} were too long"
            )
