"""Statistics and malformed rows of trajectory files. Rows are read once and counted in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from data_pipeline.errors import DataError, listed
from data_pipeline.metadata import length_histogram, length_range
from data_pipeline.preferences import Preference, read_rows
from data_pipeline.records import steps_of_pairs
from data_pipeline.splits import Inputs, named_split
from data_pipeline.terminal import escape
from data_pipeline.trajectory import Trajectory, check_steps, count_rows

if TYPE_CHECKING:
    from data_pipeline.encode import Encoder

PERCENTILES = (0, 10, 50, 90, 99, 100)
_BAR_WIDTH = 40


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a distribution: its mean, and PERCENTILES by name ("0" is the minimum, "100" the maximum)."""

    count: int
    mean: float
    percentiles: dict[str, float]


class SplitCounts(msgspec.Struct, kw_only=True):
    """Counts of one split. `failed`, `partial` and `full` are trajectories with outcome 0, between 0 and 1, and 1.

    `with_success` trajectories have a `success` field, and it is true in `successes` of them. `trainable` ones have an
    outcome or rewards and did not end in an error; `only_labels` have step labels alone. `pairs` are rows with a chosen
    and `rejected` rejected actions.
    """

    trajectories: int = 0
    tasks: int = 0
    trainable: int = 0
    only_labels: int = 0
    pairs: int = 0
    rejected: int = 0
    failed: int = 0
    partial: int = 0
    full: int = 0
    mean_outcome: float | None = None
    with_success: int = 0
    successes: int = 0


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts by task. `repeated` tasks have several attempts; in `differing` of these the outcomes differ."""

    tasks: int
    repeated: int
    differing: int
    attempts: Spread


class ValidationReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `validate`. rows = trajectories + pairs + bad; `leaks` names the tasks that are in two splits.

    `tokens`, `lengths` (metadata.length_histogram) and `too_long` need a tokenizer. They count pairs too: a pair is its
    state once and then its actions. `equal` counts trajectories with the task, conversation and return of an earlier
    one, `repeated_ids` those with the id of an earlier one. `with_reasoning` messages have some; `reasoning_dropped` of
    them are encoded without it, and special tokens are broken up in `special_tokens_broken` messages.
    """

    files: list[str]
    rows: int
    trajectories: int
    splits: dict[str, SplitCounts]
    ended: dict[str, int]
    steps: Spread
    tokens: Spread | None
    lengths: dict[str, int] | None
    max_length: int | None
    too_long: int | None
    groups: Groups
    equal: int
    repeated_ids: int
    with_step_labels: int
    step_labels: Spread | None
    leaks: list[str]
    bad: list[str]
    pairs: int = 0
    with_reasoning: int = 0
    reasoning_dropped: int = 0
    special_tokens_broken: int = 0


class _Task(NamedTuple):
    """Attempts at a task so far: their first split, their number, and the range of their returns."""

    split: str
    attempts: int
    low: float
    high: float


def validate(
    inputs: Inputs,
    *,
    encoder: Encoder | None = None,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Reads every row of trajectory files and counts what is in them.

    Args:
      inputs: files by split. Rows of files under None are in the split they name, or are counted under "".
      encoder: if given, every conversation is encoded and verified as for training. A row that fails is bad.
      max_length: bound in tokens for `too_long`.
      progress: called with (rows done, all rows).

    Raises:
      DataError: a file cannot be read, or there is no row.
    """
    counts = _Counts(encoder)
    paths = [Path(path) for files in inputs.values() for path in files]
    # A first pass over the files, for the progress bar and to find unreadable files before the long one.
    total = sum(map(count_rows, paths))
    if not total:
        raise DataError(f"{', '.join(map(str, paths))}: empty, there is no row in it")

    def bad(error: DataError) -> None:
        counts.bad.append(" ".join(str(error).split()))
        show()

    def show() -> None:
        counts.rows += 1
        if progress:
            progress(counts.rows, total)

    for split, files in inputs.items():
        for path in files:
            for where, row in read_rows(path, skip_bad=bad):
                try:
                    if isinstance(row, Preference):
                        counts.add_pair(row, split, where)
                    else:
                        counts.add(row, split, where)
                except DataError as error:
                    bad(error)
                else:
                    show()
    return counts.report([str(path) for path in paths], max_length)


class _Counts:
    """Collects the counts of a report. Ids, contents and tasks are kept as digests of 12 bytes."""

    def __init__(self, encoder: Encoder | None):
        self.rows, self.bad = 0, []
        self._encoder = encoder
        self._splits: dict[str, SplitCounts] = {}
        self._outcomes: dict[str, float] = Counter()
        self._tasks: dict[bytes, _Task] = {}
        self._leaks: dict[bytes, str] = {}
        self._ended: Counter[str] = Counter()
        # Eight bytes per value: lists of Python numbers take four times as much.
        self._steps, self._tokens, self._labels = array("q"), array("q"), array("d")
        self._ids: set[bytes] = set()
        self._contents: set[bytes] = set()
        self._repeated_ids = self._equal = self._with_labels = self._with_reasoning = 0
        self._dropped = self._broken = 0

    def add(self, trajectory: Trajectory, split: str | None, where: str) -> None:
        """Counts a row. Raises DataError for a bad one, which is then in none of the counts."""
        row = f"{where} ({trajectory.id})"
        # All that can raise comes before the first count.
        name = named_split(trajectory.split, split, row) or ""
        table = check_steps(trajectory.messages, row)
        if self._encoder is not None:
            encoded = self._encoder.trajectory(trajectory.messages, row=row, tools=trajectory.tools)
            self._tokens.append(len(encoded.tokens))
            if self._encoder.choices:
                dropped, broken = self._encoder.changes(trajectory.messages)
                self._dropped, self._broken = self._dropped + dropped, self._broken + broken
        self._steps.append(len(table))
        self._count(trajectory, name, where)

    def add_pair(self, pair: Preference, split: str | None, where: str) -> None:
        """Counts a row with a chosen and rejected actions. Raises DataError for a bad one, as `add`."""
        row = f"{where} ({pair.id})"
        name = named_split(pair.split, split, row) or ""
        if self._encoder is not None:
            self._tokens.append(len(steps_of_pairs(self._encoder, pair, row).tokens))
        counts = self._splits.setdefault(name, SplitCounts())
        counts.pairs += 1
        counts.rejected += len(pair.worse)
        self._repeated_ids += not _is_new(self._ids, pair.id.encode())
        self._group(pair.task_id, name, None, counts, where)

    def _count(self, trajectory: Trajectory, name: str, where: str) -> None:
        split = self._splits.setdefault(name, SplitCounts())
        split.trajectories += 1
        returned = trajectory.outcome if trajectory.rewards is None else sum(trajectory.rewards)
        ended_well = trajectory.ended != "error"
        split.trainable += returned is not None and ended_well
        split.only_labels += returned is None and trajectory.step_labels is not None and ended_well
        if trajectory.outcome is not None:
            self._outcomes[name] += trajectory.outcome
            kind = {0.0: "failed", 1.0: "full"}.get(trajectory.outcome, "partial")
            setattr(split, kind, getattr(split, kind) + 1)
        if trajectory.success is not None:
            split.with_success += 1
            split.successes += trajectory.success
        self._ended[trajectory.ended or ""] += 1
        if trajectory.step_labels is not None:
            self._with_labels += 1
            self._labels.extend(label for label in trajectory.step_labels if label is not None)
        self._with_reasoning += sum(bool(message.reasoning_content) for message in trajectory.messages)
        task = trajectory.task_id
        self._group(task, name, returned, split, where)
        self._repeated_ids += not _is_new(self._ids, trajectory.id.encode())
        # Without id, policy and meta, in which copies of a trajectory may differ.
        content = msgspec.json.encode([task, trajectory.messages, trajectory.tools, returned])
        self._equal += not _is_new(self._contents, content)

    def _group(self, task: str, name: str, returned: float | None, split: SplitCounts, where: str) -> None:
        key = _digest(task.encode())
        earlier = self._tasks.get(key)
        # An attempt without a return leaves the range as it is.
        low, high = (np.inf, -np.inf) if returned is None else (returned, returned)
        if earlier is None:
            split.tasks += 1
            self._tasks[key] = _Task(name, 1, low, high)
            return
        # The first leak of a task is kept; a report that repeats it for every row would hide other tasks.
        if earlier.split != name:
            both = f"in {earlier.split or 'no split'} and, in {where}, in {name or 'no split'}"
            self._leaks.setdefault(key, f"task {task} is {both}; split by task")
        self._tasks[key] = _Task(earlier.split, earlier.attempts + 1, min(earlier.low, low), max(earlier.high, high))

    def report(self, files: list[str], max_length: int | None) -> ValidationReport:
        """The counts of all rows added so far."""
        for name, split in self._splits.items():
            if with_outcome := split.failed + split.partial + split.full:
                split.mean_outcome = self._outcomes[name] / with_outcome
        repeated = [task for task in self._tasks.values() if task.attempts > 1]
        lengths = np.asarray(self._tokens)
        return ValidationReport(
            files=files,
            rows=self.rows,
            trajectories=len(self._steps),
            splits=dict(sorted(self._splits.items())),
            ended=dict(self._ended),
            steps=_spread(self._steps),
            tokens=_spread(lengths) if self._encoder else None,
            lengths=length_histogram(lengths) if self._encoder else None,
            max_length=max_length,
            too_long=int((lengths > max_length).sum()) if self._encoder and max_length is not None else None,
            groups=Groups(
                tasks=len(self._tasks),
                repeated=len(repeated),
                differing=sum(task.low < task.high for task in repeated),
                attempts=_spread([task.attempts for task in self._tasks.values()]),
            ),
            equal=self._equal,
            repeated_ids=self._repeated_ids,
            with_step_labels=self._with_labels,
            step_labels=_spread(self._labels) if self._labels else None,
            leaks=list(self._leaks.values()),
            bad=self.bad,
            pairs=sum(split.pairs for split in self._splits.values()),
            with_reasoning=self._with_reasoning,
            reasoning_dropped=self._dropped,
            special_tokens_broken=self._broken,
        )


def _spread(values: Sequence[float] | np.ndarray) -> Spread:
    array = np.asarray(values, np.float64)
    if not len(array):
        return Spread(count=0, mean=0.0, percentiles={})
    # "nearest": the percentiles are values that occur, so that lengths stay whole numbers.
    at = np.percentile(array, PERCENTILES, method="nearest")
    named = {str(percent): float(value) for percent, value in zip(PERCENTILES, at, strict=True)}
    return Spread(count=len(array), mean=float(array.mean()), percentiles=named)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=12).digest()


def _is_new(digests: set[bytes], text: bytes) -> bool:
    before = len(digests)
    digests.add(_digest(text))
    return len(digests) > before


def to_text(report: ValidationReport) -> str:
    """The report as lines for a terminal, with the bad rows at the end."""
    return "\n".join(map(escape, _lines(report)))


def _lines(report: ValidationReport) -> Iterator[str]:
    pairs = f"{report.pairs} pairs, " if report.pairs else ""
    yield f"{report.rows} rows, {report.trajectories} trajectories, {pairs}{len(report.bad)} bad"
    for name, counts in report.splits.items():
        yield f"  {name or 'no split'}: {_split(counts)}"
    if report.trajectories:
        yield from _about_trajectories(report)
    elif report.tokens is not None and report.pairs:
        yield from _about_tokens(report, "pair, its state once")
    if report.leaks:
        yield f"{len(report.leaks)} tasks in two splits:"
        # Without the first line of `listed`, which counts bad rows.
        yield from (f"  {line}" for line in listed(report.leaks)[1:])
    yield from listed(report.bad)


def _split(counts: SplitCounts) -> str:
    kinds = [f"{counts.trajectories} trajectories"] if counts.trajectories or not counts.pairs else []
    kinds += [f"{counts.pairs} pairs with {counts.rejected} rejected actions"] if counts.pairs else []
    parts = [f"{' and '.join(kinds)} of {counts.tasks} tasks"]
    if counts.mean_outcome is not None:
        parts.append(
            f"mean outcome {counts.mean_outcome:.3f} ({counts.failed} failed, {counts.partial} between, "
            f"{counts.full} full)"
        )
    if counts.with_success:
        parts.append(f"success {counts.successes / counts.with_success:.1%} of {counts.with_success}")
    if counts.only_labels:
        parts.append(f"{counts.only_labels} with step labels and no outcome")
    if untrainable := counts.trajectories - counts.trainable - counts.only_labels:
        parts.append(f"{untrainable} not to be trained on (no outcome, or ended in an error)")
    return ", ".join(parts)


def _about_trajectories(report: ValidationReport) -> Iterator[str]:
    yield f"steps per trajectory: {_spread_line(report.steps)}"
    if report.tokens is not None:
        yield from _about_tokens(report, "row" if report.pairs else "trajectory")
    yield _groups(report.groups)
    ended = ", ".join(f"{count} {kind or 'not given'}" for kind, count in sorted(report.ended.items()))
    yield f"ended: {ended}"
    if report.equal or report.repeated_ids:
        yield f"repeated: {report.equal} equal trajectories, {report.repeated_ids} ids of earlier rows"
    if report.with_reasoning:
        dropped = f", {report.reasoning_dropped} of them encoded without it" if report.reasoning_dropped else ""
        yield f"reasoning: in {report.with_reasoning} messages{dropped}"
    if report.special_tokens_broken:
        yield f"special tokens: broken up in {report.special_tokens_broken} messages"
    if report.step_labels is not None:
        yield (
            f"step labels: {report.step_labels.count} in {report.with_step_labels} trajectories, "
            f"{_spread_line(report.step_labels, '.3g')}"
        )


def _about_tokens(report: ValidationReport, unit: str) -> Iterator[str]:
    yield f"tokens per {unit}: {_spread_line(report.tokens)}"
    yield from _histogram(report.lengths)
    if report.too_long is not None:
        yield f"  longer than {report.max_length} tokens: {report.too_long}"


def _groups(groups: Groups) -> str:
    if not groups.repeated:
        return f"tasks: {groups.tasks}, one attempt each: a reward model learns more from attempts that differ"
    return (
        f"tasks: {groups.tasks}, {groups.repeated} with several attempts (per task {_spread_line(groups.attempts)}); "
        f"in {groups.differing} ({groups.differing / groups.repeated:.1%}) their outcomes differ"
    )


def _spread_line(spread: Spread, form: str = ".0f") -> str:
    shown = {"0": "least", "50": "median", "90": "90 %", "99": "99 %", "100": "most"}
    named = ", ".join(f"{name} {spread.percentiles[key]:{form}}" for key, name in shown.items())
    return f"mean {spread.mean:.3g}, {named}"


def _histogram(lengths: dict[str, int]) -> Iterator[str]:
    largest = max(lengths.values())
    for low, count in lengths.items():
        # At least one mark: a bin of few trajectories must not look empty.
        yield f"  {length_range(low):>16}  {count:>8}  {'#' * max(1, round(_BAR_WIDTH * count / largest))}"
