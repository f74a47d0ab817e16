"""A file of trajectories, scored: the numbers that judging needs of every step, and nothing of the texts."""

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
    """What is kept of a trajectory."""

    task: str
    group: str | None
    outcome: float | None  # None too where the episode ended in an error
    rewards: tuple[float, ...] | None
    failed: bool  # ended in an error
    labels: Labels | None
    promises: tuple[Array, ...]  # [S] of each model


@dataclass(frozen=True)
class ScoredFile:
    """The trajectories of a file that every model could score, and how many it could not."""

    rows: list[ScoredTrajectory]
    lines: int
    sha256: str
    errors: int
    examples: list[str] = field(default_factory=list)  # the first errors


def score_models(
    models: Sequence[Path], input: Path, *, labels: str, group: str | None = None, chunk: int = 256
) -> ScoredFile:
    """Scores a file with every model, one model and `chunk` trajectories in memory at a time.

    labels: as in `read_labels`. group: a field of the trajectory, or a dotted path into its meta.

    Raises UserError for a model or a file that cannot be read.
    """
    if not input.is_file():
        raise UserError(f"input {input}: no such file; give trajectories as JSON Lines")
    digest, total = score_files.digest_and_count(input)
    found: dict[int, ScoredTrajectory] = {}
    bad: dict[int, str] = {}
    for place, model in enumerate(models):
        scorer = loading.load_scorer(find_model(model))
        name = "score" if len(models) == 1 else f"score {place + 1} of {len(models)}"
        with input.open("rb") as lines, bar(name, total, unit="trajectory") as shown:
            numbered = enumerate(lines, start=1)
            while some := list(itertools.islice(numbered, chunk)):
                for one in score_files.score_lines(scorer, some, input.name):
                    error = one.error
                    if error is None and one.number not in bad:
                        try:
                            row = found[one.number] if place else _row(one, input.name, labels, group)
                            found[one.number] = _with_promises(row, one.promises)
                        except DataError as wrong:
                            error = str(wrong)
                    if error is not None:
                        bad.setdefault(one.number, error)
                shown.set_postfix(errors=len(bad), refresh=False)
                shown.update(len(some))
    rows = [row for number, row in sorted(found.items()) if number not in bad]
    examples = [error for _, error in sorted(bad.items())[:SHOWN_ERRORS]]
    if not rows:
        why = f"; {examples[0]}" if examples else ""
        raise UserError(f"input {input}: none of its {total} lines could be scored{why}")
    return ScoredFile(rows, total, digest, len(bad), examples)


def _with_promises(row: ScoredTrajectory, promises: np.ndarray) -> ScoredTrajectory:
    if not np.isfinite(promises).all():
        raise UserError("the model's scores are not finite; its weights are broken")
    return replace(row, promises=(*row.promises, promises.astype(float)))


def _row(scored: score_files.ScoredLine, source: str, labels: str, group: str | None) -> ScoredTrajectory:
    """What is kept of a line, as yet without promises. Raises DataError for labels or a group that are none."""
    trajectory, where = scored.trajectory, f"{source}:{scored.number}"
    found = read_labels(trajectory, labels, where)
    failed = trajectory.ended == "error"
    if found is not None and np.isnan(found.values).all():
        found = None
    return ScoredTrajectory(
        task=trajectory.task_id,
        group=_group(trajectory, group, where) if group else None,
        outcome=None if failed else _outcome(trajectory),
        rewards=tuple(trajectory.rewards) if trajectory.rewards and not failed else None,
        failed=failed,
        labels=found,
        promises=(),
    )


def _outcome(trajectory: Trajectory) -> float | None:
    """The outcome or, where there is none, whether it succeeded, or the sum of its rewards."""
    if trajectory.outcome is not None:
        return trajectory.outcome
    if trajectory.success is not None:
        return float(trajectory.success)
    return sum(trajectory.rewards) if trajectory.rewards else None


def _group(trajectory: Trajectory, name: str, where: str) -> str:
    own = name in ("environment", "split", "task", "ended", "success")
    value = getattr(trajectory, name) if own else lookup(trajectory.meta, name)
    if isinstance(value, (dict, list)):
        raise DataError(f"{where}: group {name} is {type(value).__name__}; name a field that holds one value")
    return "(none)" if value is None else str(value)


@dataclass(frozen=True)
class Steps:
    """The steps of some rows in order, all [N]."""

    row: NDArray[np.int64]  # which of the rows
    depth: NDArray[np.int64]  # 1 for the first
    length: NDArray[np.int64]  # steps of its trajectory
    task: NDArray[np.int64]  # in [0, count)
    count: int  # tasks of these rows


def steps_of(rows: Sequence[ScoredTrajectory]) -> Steps:
    lengths = np.array([len(row.promises[0]) for row in rows], int)
    row = np.repeat(np.arange(len(rows)), lengths)
    depth = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    names, task = np.unique([one.task for one in rows], return_inverse=True)
    return Steps(row, depth, lengths[row], task[row], len(names))


def returns(row: ScoredTrajectory, discount: float) -> Array:
    """What the promise of each step estimates: the discounted sum of the rewards from there on [S]."""
    count = len(row.promises[0])
    rewards = list(row.rewards) if row.rewards else [0.0] * (count - 1) + [row.outcome]
    found, total = np.zeros(count), 0.0
    for index in reversed(range(count)):
        total = rewards[index] + discount * total
        found[index] = total
    return found
