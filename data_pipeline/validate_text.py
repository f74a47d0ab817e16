"""The report of `validate` as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.errors import listed
from data_pipeline.metadata import length_range
from data_pipeline.validate import Groups, Report, SplitCounts, Spread

_BAR = 40


def to_text(report: Report) -> str:
    """What a user wants to know before training, the bad rows at the end."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.rows} rows, {report.trajectories} trajectories, {len(report.bad)} bad"
    for name, counts in report.splits.items():
        yield f"  {name or 'no split'}: {_split(counts)}"
    if report.trajectories:
        yield from _about_trajectories(report)
    if report.leaks:
        yield f"{len(report.leaks)} tasks in two splits:"
        yield from (f"  {line}" for line in listed(report.leaks)[1:])
    yield from listed(report.bad)


def _split(counts: SplitCounts) -> str:
    parts = [f"{counts.trajectories} trajectories of {counts.tasks} tasks"]
    if counts.mean_outcome is not None:
        parts.append(
            f"mean outcome {counts.mean_outcome:.3f} ({counts.failed} failed, {counts.partial} between, "
            f"{counts.full} full)"
        )
    if counts.with_success:
        parts.append(f"success {counts.successes / counts.with_success:.1%} of {counts.with_success}")
    if left := counts.trajectories - counts.trainable:
        parts.append(f"{left} not to be trained on (no outcome, or ended in an error)")
    return ", ".join(parts)


def _about_trajectories(report: Report) -> Iterator[str]:
    yield f"steps per trajectory: {_spread(report.steps)}"
    if report.tokens is not None and report.lengths is not None:
        yield f"tokens per trajectory: {_spread(report.tokens)}"
        yield from _histogram(report.lengths)
        if report.too_long is not None:
            yield f"  longer than {report.max_length} tokens: {report.too_long}"
    yield _groups(report.groups)
    ended = ", ".join(f"{count} {kind or 'not said'}" for kind, count in sorted(report.ended.items()))
    yield f"ended: {ended}"
    if report.equal or report.repeated_ids:
        yield f"repeated: {report.equal} equal trajectories, {report.repeated_ids} ids that were there before"
    if report.step_labels is not None:
        yield (
            f"step labels: {report.step_labels.count} in {report.with_step_labels} trajectories, "
            f"{_spread(report.step_labels, '.3g')}"
        )


def _groups(groups: Groups) -> str:
    if not groups.repeated:
        return f"tasks: {groups.tasks}, one attempt each: a reward model learns more from attempts that differ"
    return (
        f"tasks: {groups.tasks}, {groups.repeated} with several attempts (per task {_spread(groups.attempts)}); "
        f"in {groups.differing} ({groups.differing / groups.repeated:.1%}) their outcomes differ"
    )


def _spread(spread: Spread, form: str = ".0f") -> str:
    shown = {"0": "least", "50": "median", "90": "90 %", "99": "99 %", "100": "most"}
    named = ", ".join(f"{name} {spread.percentiles[key]:{form}}" for key, name in shown.items())
    return f"mean {spread.mean:.3g}, {named}"


def _histogram(lengths: dict[str, int]) -> Iterator[str]:
    most = max(lengths.values())
    for low, count in lengths.items():
        yield f"  {length_range(low):>16}  {count:>8}  {'#' * max(1, round(_BAR * count / most))}"
