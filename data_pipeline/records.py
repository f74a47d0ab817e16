"""Rows of trajectories to the records of a dataset: what is left out, cut and merged is decided and counted here."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from data_pipeline.encode import Encoded, Encoder
from data_pipeline.errors import DataError, SplitError
from data_pipeline.metadata import LENGTH_EDGES, SplitMetadata
from data_pipeline.splits import Splits, named_split
from data_pipeline.trajectory import Trajectory

TooLong = Literal["error", "drop", "window"]


class _Steps(NamedTuple):
    """What is stored of a trajectory by token and by step."""

    tokens: np.ndarray
    read_positions: np.ndarray
    state_positions: np.ndarray
    rewards: np.ndarray
    step_labels: np.ndarray


class SplitRecords:
    """Collects the records of one split: merges equal ones, counts what is left out."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.rows = self.errors = self.dropped = self.windowed = 0
        self._index: dict[bytes, int] = {}

    def add(self, trajectory: Trajectory, steps: _Steps) -> None:
        digest = hashlib.sha256(f"{trajectory.task_id}\0{trajectory.outcome}".encode())
        for array in steps:
            digest.update(b"%d " % len(array) + array.tobytes())
        index = self._index.setdefault(digest.digest(), len(self.records))
        if index < len(self.records):
            self.records[index]["weight"] += 1
            return
        outcome = np.nan if trajectory.outcome is None else trajectory.outcome
        self.records.append(
            {"id": trajectory.id, "task": trajectory.task_id, "outcome": outcome, "weight": 1, **steps._asdict()}
        )

    def metadata(self) -> SplitMetadata:
        lengths = np.asarray([len(record["tokens"]) for record in self.records])
        steps = [len(record["rewards"]) for record in self.records]
        weights = np.asarray([record["weight"] for record in self.records])
        returns = np.asarray([record["rewards"].sum(dtype=np.float64) for record in self.records])
        return SplitMetadata(
            rows=self.rows, errors=self.errors, dropped=self.dropped, windowed=self.windowed,
            merged=int(weights.sum()) - len(weights), trajectories=len(weights),
            tasks=len({record["task"] for record in self.records}), steps=sum(steps), tokens=int(lengths.sum()),
            longest=int(lengths.max()), most_steps=max(steps), mean_return=float(np.average(returns, weights=weights)),
            lengths=np.histogram(lengths, [*LENGTH_EDGES, np.inf])[0].tolist(),
        )


class Rows:
    """Rows of any split to records; what holds across splits is checked here."""

    def __init__(self, encoder: Encoder, max_length: int | None, too_long: TooLong):
        self.splits: dict[str, SplitRecords] = {}
        self._encoder, self._max_length, self._too_long = encoder, max_length, too_long
        self._encoded: dict[bytes, Encoded] = {}
        self._splits = Splits()

    def add(self, trajectory: Trajectory, split: str | None, where: str) -> None:
        """Raises DataError for a row that cannot be trained on, which is then in none of the counts."""
        row = f"{where} ({trajectory.id})"
        split = self._split(trajectory, split, row)
        records = self.splits.setdefault(split, SplitRecords())
        if trajectory.ended == "error":
            records.rows += 1
            records.errors += 1
            return
        steps = _steps(trajectory, self._encode(trajectory, row), row)
        too_long = self._max_length is not None and len(steps.tokens) > self._max_length
        if too_long and self._too_long == "error":
            raise DataError(
                f"{row}: {len(steps.tokens)} tokens, max_length is {self._max_length}; "
                'raise it, or set too_long to "drop" or "window"'
            )
        records.rows += 1
        if too_long:
            # A window needs one whole step: a prompt that fills it leaves nothing to train on.
            if self._too_long == "drop" or (
                self._too_long == "window" and steps.read_positions[0] >= self._max_length
            ):
                records.dropped += 1
                return
            steps = self._window(steps)
            records.windowed += 1
        records.add(trajectory, steps)

    def _split(self, trajectory: Trajectory, split: str | None, row: str) -> str:
        """The split of a row; a task in two splits would let what is measured leak into what is learnt."""
        split = named_split(trajectory.split, split, row) or "train"
        try:
            self._splits.add(trajectory.task_id, split)
        except SplitError as error:
            raise SplitError(f"{row}: {error}") from None
        return split

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
            steps.read_positions[:kept], steps.state_positions[:kept], rewards, steps.step_labels[:kept],
        )


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
