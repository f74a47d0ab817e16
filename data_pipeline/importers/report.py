"""The counts of an import, and how they are printed."""

from __future__ import annotations

from collections import Counter
from os import PathLike

import msgspec

from data_pipeline.errors import MOST_LISTED, DataError
from data_pipeline.terminal import escape


class ImportReport(msgspec.Struct, kw_only=True):
    """Counts of an import. rows + additional = written + skipped + unknown; `bad` holds the error of each skipped row.

    `written` counts trajectories and pairs; `additional` are those beyond the first of a row. `unknown` are rows of
    files in folders that have no known shape. `without_outcome` rows have neither outcome nor rewards, and `unused`
    counts their fields that could be one. `notes` counts changes and omissions in written rows, `splits` trajectories
    by split, "" without one, and `formats` rows by format, for which `reasons` says how it was recognised.
    """

    files: int = 0
    other_files: int = 0
    rows: int = 0
    written: int = 0
    additional: int = 0
    pairs: int = 0
    skipped: int = 0
    without_outcome: int = 0
    repeated_ids: int = 0
    resplit: int = 0
    splits: Counter[str] = msgspec.field(default_factory=Counter)
    formats: Counter[str] = msgspec.field(default_factory=Counter)
    reasons: dict[str, str] = msgspec.field(default_factory=dict)
    unused: Counter[str] = msgspec.field(default_factory=Counter)
    notes: Counter[str] = msgspec.field(default_factory=Counter)
    unknown: list[str] = msgspec.field(default_factory=list)
    bad: list[str] = msgspec.field(default_factory=list)


def check_counts(report: ImportReport) -> None:
    """Raises DataError for a file of both trajectories and pairs, which nothing reads.

    Every row is counted once: as written, as bad, or as unknown.
    """
    assert report.rows + report.additional == report.written + report.skipped + len(report.unknown)
    if 0 < report.pairs < report.written:
        raise DataError(
            f"{report.pairs} preference pairs and {report.written - report.pairs} trajectories: a file holds one of "
            "them; import their files one by one"
        )


def to_text(report: ImportReport, output: str | PathLike[str]) -> list[str]:
    """The report as lines for a terminal, without the bad rows."""
    what = "preference pairs" if report.pairs else "trajectories"
    left_out = report.skipped + len(report.unknown)
    lines = [f"{report.written} {what} of {report.rows} rows written, {left_out} left out: {output}"]
    for name, count in report.formats.items():
        lines.append(f"  {count} rows in format {name}: {report.reasons[name]}")
    lines += [f"  {count} in {split or 'no split'}" for split, count in sorted(report.splits.items())]
    hint = " or ".join(f"--outcome-field {name}" for name, _ in report.unused.most_common(3))
    for count, description in (
        (report.additional, "more trajectories than rows, because a row may hold several"),
        (
            report.without_outcome,
            "without an outcome: trained on only by their step labels, if they have any"
            + (f"; they may have one in {hint}" if hint else ""),
        ),
        (report.repeated_ids, "had the id of an earlier row, and got a number appended to it"),
        (report.resplit, "named another split before"),
        (report.other_files, "files of folders have another kind and were not read"),
    ):
        lines += [f"  {count} {description}"] if count else []
    lines += [f"  {count} {description}" for description, count in sorted(report.notes.items())]
    if report.unknown:
        lines.append(f"  {len(report.unknown)} rows of files in folders have no known shape and were left out:")
        lines += [f"    {line}" for line in report.unknown[:MOST_LISTED]]
        if len(report.unknown) > MOST_LISTED:
            lines.append(f"    ... and {len(report.unknown) - MOST_LISTED} more")
    # A name in a log may hold a line end, and must not make a line of its own.
    return [escape(line.replace("\n", "\\n")) for line in lines]
