"""Trajectories of a file with the promises of several models: what the metrics need, without the texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.trajectory import Trajectory
from jaxprm.artifacts.directory import find_model
from jaxprm.errors import UserError
from jaxprm.evaluation.labels import Labels, lookup, read_labels
from jaxprm.evaluation.statistics import Array
from jaxprm.progress import bar
from jaxprm.scoring import files as score_files
from jaxprm.scoring import loading

SHOWN_ERRORS = 20


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


@dataclass(frozen=True)
class ScoredFile:
    """The trajectories of a file that every model could score, and the number of lines that some model could not."""

    rows: list[ScoredTrajectory]
    lines: int
    sha256: str
    errors: int
    examples: list[str] = field(default_factory=list)  # the first errors


def score_models(
    models: Sequence[Path], input: Path, *, labels: str, group: str | None = None, chunk: int = 256
) -> ScoredFile:
    """Scores a file with every model, one model and `chunk` trajectories in memory at a time.

    A line that one model cannot score is left out for all, so that every number is on the same trajectories.

    Args:
        labels: the field of the step labels, as in `read_labels`.
        group: a field of the trajectory, or a dotted path into its meta.

    Raises UserError for a model or a file that cannot be read, and if no line could be scored.
    """
    if not input.is_file():
        raise UserError(f"input {input}: no such file; give trajectories as JSON Lines")
    digest, total = score_files.digest_and_count(input)
    rows: dict[int, ScoredTrajectory] = {}  # by line number
    errors: dict[int, str] = {}
    for model_index, model in enumerate(models):
        scorer = loading.load_scorer(find_model(model))
        name = "score" if len(models) == 1 else f"score {model_index + 1} of {len(models)}"
        with input.open("rb") as file, bar(name, total, unit="trajectory") as progress:
            lines = score_files.HashedLines(itertools.islice(file, total))
            numbered = enumerate(lines, start=1)
            while batch := list(itertools.islice(numbered, chunk)):
                for line in score_files.score_lines(scorer, batch, input.name):
                    error = line.error
                    if error is None and line.number not in errors:
                        try:
                            # Labels and outcome are read with the first model's scores, promises are added by each.
                            row = rows[line.number] if model_index else _row(line, input.name, labels, group)
                            rows[line.number] = _with_promises(row, line.promises)
                        except DataError as wrong:
                            error = str(wrong)
                    if error is not None:
                        errors.setdefault(line.number, error)
                progress.set_postfix(errors=len(errors), refresh=False)
                progress.update(len(batch))
        if lines.hexdigest() != digest:
            raise UserError(f"input {input}: changed while it was scored; run the same command again")
    complete = [row for number, row in sorted(rows.items()) if number not in errors]
    examples = [error for _, error in sorted(errors.items())[:SHOWN_ERRORS]]
    if not complete:
        why = f"; {examples[0]}" if examples else ""
        raise UserError(f"input {input}: none of its {total} lines could be scored{why}")
    return ScoredFile(complete, total, digest, len(errors), examples)


def _with_promises(row: ScoredTrajectory, promises: np.ndarray) -> ScoredTrajectory:
    if not np.isfinite(promises).all():
        raise UserError("the model's scores are not finite; its weights are broken")
    return replace(row, promises=(*row.promises, promises.astype(float)))


def _row(line: score_files.ScoredLine, source: str, labels: str, group: str | None) -> ScoredTrajectory:
    """A line without its promises. Raises DataError for invalid labels, or a group with several values."""
    trajectory, where = line.trajectory, f"{source}:{line.number}"
    step_labels = read_labels(trajectory, labels, where)
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
    return "(none)" if value is None else str(value)


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
