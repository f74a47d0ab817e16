"""Trajectories of a file with the promises of several models: what the metrics need, without the texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, one_line
from data_pipeline.trajectory import Trajectory
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation.labels import Labels, lookup, read_labels
from jaxprm.evaluation.statistics import Array
from jaxprm.progress import bar
from jaxprm.scoring import files as score_files
from jaxprm.scoring import loading
from jaxprm.scoring.sources import Source, reward_model

SHOWN_ERRORS = 20
# The group of trajectories that lack the field.
NO_GROUP = "(none)"


@dataclass(frozen=True)
class ScoredTrajectory:
    """Promises and labels of a trajectory with S steps."""

    task: str
    group: str | None
    outcome: float | None  # None without one, and for an episode that ended in an error
    rewards: tuple[float, ...] | None  # [S]
    failed: bool  # ended in an error
    labels: Labels | None
    promises: tuple[Array, ...]  # [S] for each model


class Lengths(NamedTuple):
    """Lengths in tokens: the longest conversation that a model was trained on, and those of a file that are longer.

    Args:
        trained: None if unknown.
        longer: number of conversations.
        longest: of those, or None.
    """

    trained: int | None
    longer: int
    longest: int | None


@dataclass(frozen=True)
class ScoredFile:
    """The trajectories of a file that every model could score, and the number of lines that some model could not."""

    rows: list[ScoredTrajectory]
    lines: int
    sha256: str
    errors: int
    examples: list[str] = field(default_factory=list)  # the first errors
    lengths: list[Lengths] = field(default_factory=list)  # of each model


def score_models(
    models: Sequence[Path | Source],
    input: Path,
    *,
    labels: str,
    group: str | None = None,
    chunk: int = 256,
    check: Callable[[list[ScoredTrajectory]], None] = lambda rows: None,
    encoding: Mapping[str, Any] = MappingProxyType({}),
) -> ScoredFile:
    """Scores a file with every model, one model and `chunk` trajectories in memory at a time.

    A line that one model cannot score is left out for all, so that every number is on the same trajectories.

    Args:
        models: locations of reward models, or other sources of scores.
        labels: the field of the step labels, as in `read_labels`.
        group: a field of the trajectory, or a dotted path into its meta.
        check: called before a model is loaded, with all trajectories, which have no promises yet.
        encoding: `reasoning` and `special_tokens`, as in loading.load_encoder.

    Raises UserError for a model or a file that cannot be read, and if no line could be scored.
    """
    if not input.is_file():
        raise UserError(f"input {input}: no such file; give trajectories as JSON Lines")
    sources = [model if isinstance(model, Source) else reward_model(model) for model in models]
    digest, total, _ = score_files.digest_and_count(input)
    rows, errors = _read(input, labels, group)
    if not rows:
        raise _no_line(input, total, errors)
    check([*rows.values()])
    lengths = []
    for model_index, source in enumerate(sources):
        scorer, longer = source.load(**encoding), []
        name = "score" if len(models) == 1 else f"score {model_index + 1} of {len(models)}"
        with bar(name, total, unit="trajectory") as progress:
            remaining = itertools.islice(score_files.read_input(input), total)
            while batch := list(itertools.islice(remaining, chunk)):
                for line in score_files.score_lines(scorer, batch):
                    if line.error is not None:
                        errors.setdefault(line.number, line.error)
                    elif line.number in rows and line.number not in errors:
                        rows[line.number] = _with_promises(rows[line.number], line.promises)
                        if source.trained_length is not None and line.tokens > source.trained_length:
                            longer.append(line.tokens)
                progress.set_postfix(errors=len(errors), refresh=False)
                progress.update(len(batch))
        if files.sha256(input) != digest:
            raise UserError(f"input {input}: changed while it was scored; run the same command again")
        lengths.append(Lengths(source.trained_length, len(longer), max(longer, default=None)))
    complete = [row for number, row in sorted(rows.items()) if number not in errors]
    if not complete:
        raise _no_line(input, total, errors)
    examples = [error for _, error in sorted(errors.items())[:SHOWN_ERRORS]]
    return ScoredFile(complete, total, digest, len(errors), examples, lengths)


def _no_line(input: Path, total: int, errors: dict[int, str]) -> UserError:
    why = f"; {min(errors.items())[1]}" if errors else ""
    return UserError(f"input {input}: none of its {total} rows could be scored{why}")


def _read(input: Path, labels: str, group: str | None) -> tuple[dict[int, ScoredTrajectory], dict[int, str]]:
    """(trajectories without promises, errors) of a file, by line number."""
    rows: dict[int, ScoredTrajectory] = {}
    errors: dict[int, str] = {}
    for row in score_files.read_input(input):
        try:
            rows[row.number] = _row(*row.parse(), row.where, labels, group)
        except DataError as error:
            errors[row.number] = one_line(error)
    return rows, errors


def _with_promises(row: ScoredTrajectory, promises: np.ndarray) -> ScoredTrajectory:
    loading.check_finite(promises)
    return replace(row, promises=(*row.promises, promises.astype(float)))


def _row(
    trajectory: Trajectory, origins: Sequence[int], where: str, labels: str, group: str | None
) -> ScoredTrajectory:
    """A trajectory without promises. Raises DataError for invalid labels, or a group with several values."""
    step_labels = read_labels(trajectory, labels, where, origins)
    if step_labels is not None and np.isnan(step_labels.values).all():
        step_labels = None
    failed = trajectory.ended == "error"
    return ScoredTrajectory(
        task=trajectory.task_id,
        group=_group(trajectory, group, where) if group else None,
        outcome=None if failed else _outcome(trajectory),
        rewards=tuple(trajectory.rewards) if trajectory.rewards and not failed else None,
        failed=failed,
        labels=step_labels,
        promises=(),
    )


def _outcome(trajectory: Trajectory) -> float | None:
    """The outcome, else 1 or 0 by `success`, else the sum of the rewards."""
    if trajectory.outcome is not None:
        return trajectory.outcome
    if trajectory.success is not None:
        return float(trajectory.success)
    return sum(trajectory.rewards) if trajectory.rewards else None


def _group(trajectory: Trajectory, name: str, where: str) -> str:
    own = name in ("environment", "split", "task", "ended", "success")
    value = getattr(trajectory, name) if own else lookup(trajectory.meta, name)
    if isinstance(value, (dict, list)):
        raise DataError(f"{where}: group {name} is {type(value).__name__}; name a field that holds a single value")
    return NO_GROUP if value is None else str(value)


@dataclass(frozen=True)
class Steps:
    """The steps of several trajectories in order, all [K]."""

    row: NDArray[np.int64]  # index of the trajectory
    depth: NDArray[np.int64]  # 1 for the first
    length: NDArray[np.int64]  # number of steps of its trajectory
    task: NDArray[np.int64]  # in [0, count)
    count: int  # number of tasks


def steps_of(rows: Sequence[ScoredTrajectory]) -> Steps:
    """The steps of trajectories, with their tasks numbered in alphabetical order."""
    lengths = np.array([len(row.promises[0]) for row in rows], int)
    row = np.repeat(np.arange(len(rows)), lengths)
    depth = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    names, task = np.unique([row.task for row in rows], return_inverse=True)
    return Steps(row, depth, lengths[row], task[row], len(names))


def returns(row: ScoredTrajectory, discount: float) -> Array:
    """The quantity that a promise estimates, [S]: G_t = r_t + discount * G_{t+1}, the discounted return from step t on.

    Without rewards the outcome is the reward of the last step (the method's sparse reward).
    """
    count = len(row.promises[0])
    rewards = list(row.rewards) if row.rewards else [0.0] * (count - 1) + [row.outcome]
    result, total = np.zeros(count), 0.0
    for index in reversed(range(count)):
        total = rewards[index] + discount * total
        result[index] = total
    return result
