"""Import of rows in another format as a trajectory file: streamed and checked row by row.

Only a few bytes per row stay in memory: digests of ids, and the split of every task.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from data_pipeline import splits
from data_pipeline.errors import DataError, SplitError
from data_pipeline.importers import fields, openai, sharegpt, trl
from data_pipeline.source import SourceRow, read_rows
from data_pipeline.output import staged_file, write_errors
from data_pipeline.trajectory import Trajectory, check_steps, parse_line, to_line

FormatName = Literal["openai", "sharegpt", "agentgym", "trl-prm"]
# Trajectory fields that are copied from a row. Its unused fields go into `meta`.
_COPIED = ("environment", "split", "ended", "rewards", "step_labels", "policy")


class Format(NamedTuple):
    """Parser of a format's rows, and the usual paths of their messages and outcome."""

    parse: Callable[[dict[str, Any], fields.Path, openai.Notes], openai.Parsed]
    messages: str
    outcome: tuple[str, ...] = ("outcome",)


FORMATS: dict[FormatName, Format] = {
    "openai": Format(openai.parse, "messages"),
    "sharegpt": Format(sharegpt.parse, "conversations"),
    "agentgym": Format(sharegpt.parse_agentgym, "conversations", ("outcome", "reward", "score")),
    "trl-prm": Format(trl.parse, "prompt"),
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of an import. Fields are dotted paths; None is the format's usual path, if a row has it.

    `split_by` is the field by whose values rows are split: None for no split, "" for the task. `skip_bad` leaves bad
    rows out.
    """

    format: FormatName
    messages: str | None = None
    outcome: str | None = None
    success: str | None = None
    id: str | None = None
    task: str | None = None
    scale: fields.Scale = fields.Scale()
    split_by: str | None = None
    validation_share: float = splits.VALIDATION_SHARE
    seed: int = 0
    skip_bad: bool = False


class ImportReport(msgspec.Struct, kw_only=True):
    """Counts of an import. rows = written + skipped; `bad` holds the error of each skipped row.

    `without_outcome` rows have neither outcome nor rewards. `notes` counts changes and omissions in written rows, and
    `splits` trajectories by split, "" without one.
    """

    rows: int = 0
    written: int = 0
    skipped: int = 0
    without_outcome: int = 0
    repeated_ids: int = 0
    resplit: int = 0
    splits: Counter[str] = msgspec.field(default_factory=Counter)
    notes: Counter[str] = msgspec.field(default_factory=Counter)
    bad: list[str] = msgspec.field(default_factory=list)


def import_trajectories(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: Options,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Writes the trajectories of `inputs` to the new trajectory file `output`, in their order.

    Args:
      progress: called with (bytes read, all bytes).

    Raises:
      DataError: the output exists or cannot be written, an input cannot be read, a row is bad and bad rows are not
        skipped, no row is left, or a field named in `options` is in no row. Then there is no output.
    """
    converter = _Converter(options)
    # A missing file is an error of `read_rows`, which names it.
    sizes = [Path(path).stat().st_size if Path(path).is_file() else 0 for path in inputs]
    report, before = converter.report, 0
    # `read_rows` raises DataError, so an OSError in this block is one of writing.
    with write_errors(output), staged_file(output) as file:
        for path, size in zip(inputs, sizes, strict=True):
            for row in read_rows(path):
                report.rows += 1
                try:
                    trajectory = converter.convert(row, Path(path).stem)
                # No bad row: leaving it out would hide that the other rows are split wrongly.
                except SplitError:
                    raise
                except DataError as error:
                    if not options.skip_bad:
                        raise DataError(f"{error}; fix the row, or leave bad rows out with --skip-bad") from None
                    report.skipped += 1
                    report.bad.append(" ".join(str(error).split()))
                else:
                    file.write(to_line(trajectory).encode() + b"\n")
                    report.written += 1
                if progress:
                    progress(before + row.bytes_read, sum(sizes))
            before += size
        if not report.written:
            first = f", all bad, the first: {report.bad[0]}" if report.bad else ""
            raise DataError(f"no trajectory in {', '.join(map(str, inputs))}: {report.rows} rows{first}")
        converter.check_fields()
    return report


def to_text(report: ImportReport, output: str | PathLike[str]) -> list[str]:
    """The report as lines for a terminal, without the bad rows."""
    lines = [f"{report.written} trajectories of {report.rows} rows written, {report.skipped} left out: {output}"]
    lines += [f"  {count} in {split or 'no split'}" for split, count in sorted(report.splits.items())]
    for count, description in (
        (report.without_outcome, "without an outcome: to be scored, but not trained on"),
        (report.repeated_ids, "had the id of an earlier row, and got a number appended to it"),
        (report.resplit, "named another split before"),
    ):
        lines += [f"  {count} {description}"] if count else []
    return lines + [f"  {count} {description}" for description, count in sorted(report.notes.items())]


class _Converter:
    """Converts rows, and keeps ids unique and every task in one split."""

    def __init__(self, options: Options):
        self.report = ImportReport()
        self._options, self._format = options, FORMATS[options.format]
        self._messages = fields.Path.parse(options.messages or self._format.messages)
        self._paths = {
            name: [fields.Path.parse(path) for path in ([option] if option is not None else usual)]
            for name, option, usual in (
                ("outcome", options.outcome, self._format.outcome),
                ("success", options.success, ("success",)),
                ("id", options.id, ("id",)),
                ("task", options.task, ("task",)),
            )
        }
        self._group = fields.Path.parse(options.split_by) if options.split_by else None
        self._rows_with: Counter[str] = Counter()
        self._ids: set[bytes] = set()
        # The next number to try for a repeated id, or every repetition would try all earlier ones.
        self._next: dict[bytes, int] = {}
        self._splits = splits.Splits()
        if options.split_by is not None:
            splits.check_share(options.validation_share)

    def convert(self, row: SourceRow, source: str) -> Trajectory:
        """The trajectory of a row. Raises DataError that names a bad row, which is then in none of the counts."""
        if isinstance(row.value, DataError):
            raise row.value
        notes: openai.Notes = Counter()
        try:
            converted, present = self._parse(row.value, f"{source}:{row.number}", notes)
            line = msgspec.json.encode(converted)
        except RecursionError:
            raise DataError(f"{row.where}: nested too deeply") from None
        # msgspec encodes no integer beyond 64 bits and no lone surrogate.
        except (DataError, TypeError, OverflowError, UnicodeError) as error:
            raise DataError(f"{row.where}: {error}") from None
        # Parsed from its JSON, so that an imported row passes the same checks as a line of a trajectory file.
        trajectory = parse_line(line, where=row.where)
        check_steps(trajectory.messages, row.where)
        splits.named_split(trajectory.split, None, row.where)
        trajectory, resplit = self._split(trajectory, row)
        # All that can raise comes before the first count.
        self._count(trajectory, present, notes, resplit)
        return self._with_unique_id(trajectory)

    def check_fields(self) -> None:
        """Raises DataError if a field named in the options is in no row, which is most likely a typing mistake."""
        for name in ("outcome", "success"):
            path = getattr(self._options, name)
            if path is not None and not self._rows_with[name]:
                raise DataError(f"--{name}-field {path}: no row has it, of {self.report.written} that could be read")

    def _parse(self, row: dict[str, Any], id: str, notes: openai.Notes) -> tuple[dict[str, Any], set[str]]:
        parsed = self._format.parse(row, self._messages, notes)
        used = {*parsed.used, *_COPIED}
        converted = {name: row[name] for name in _COPIED if row.get(name) is not None and name not in parsed.used}
        # A policy that is no object goes into `meta` like an unknown field.
        if not isinstance(converted.get("policy", {}), dict):
            used.discard("policy")
            del converted["policy"]
        for name in converted.keys() & parsed.fields.keys():
            if converted[name] != parsed.fields[name]:
                raise DataError(f"`{name}` is given twice, in the row and by its {self._options.format} form; keep one")
        converted |= parsed.fields
        present = set()
        for name, paths in self._paths.items():
            path, value = next(((path, value) for path in paths if (value := path.find(row)) is not None), (None, None))
            if path is not None:
                converted[name] = self._value(name, path.text, value)
                # Counted only if the row is written, so that `check_fields` finds fields that no row has.
                present.add(name)
                used.add(path.key)
            elif name in ("id", "task") and getattr(self._options, name) is not None:
                raise DataError(f"field {getattr(self._options, name)}, which names its {name}, is missing")
        converted.setdefault("id", id)
        converted["messages"] = parsed.messages
        others = self._messages.without(row)
        if meta := _meta({key: value for key, value in others.items() if key not in used and value is not None}):
            converted["meta"] = meta
        return converted, present

    def _value(self, name: str, path: str, value: Any) -> Any:
        if name == "outcome":
            return fields.outcome(value, path, self._options.scale)
        return fields.success(value, path) if name == "success" else fields.name(value, path)

    def _split(self, trajectory: Trajectory, row: SourceRow) -> tuple[Trajectory, bool]:
        """The trajectory with its split, and whether that replaces another split the row had named."""
        if self._options.split_by is None:
            return trajectory, False
        group = trajectory.task_id
        if self._group is not None:
            value = self._group.find(row.value)
            if value is None:
                raise DataError(f"{row.where}: field {self._group.text}, to split by, is missing")
            # As JSON, or the number 1 and the text "1" would be one group.
            group = msgspec.json.encode(value).decode()
        split = splits.split_of(group, validation_share=self._options.validation_share, seed=self._options.seed)
        try:
            self._splits.add(trajectory.task_id, split)
        except SplitError as error:
            raise SplitError(f"{row.where}: {error}, or by a field whose values share no task") from None
        return msgspec.structs.replace(trajectory, split=split), trajectory.split not in (None, split)

    def _count(self, trajectory: Trajectory, present: set[str], notes: openai.Notes, resplit: bool) -> None:
        self._rows_with.update(present)
        for description, count in notes.items():
            openai.note(self.report.notes, description, count)
        self.report.without_outcome += trajectory.outcome is None and trajectory.rewards is None
        self.report.resplit += resplit

    def _with_unique_id(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with an id of its own: the second one with the same id gets id#2, and so on."""
        self.report.splits[trajectory.split or ""] += 1
        # Attempts are often logged under the name of their task.
        key = _digest(trajectory.id)
        if key not in self._ids:
            self._ids.add(key)
            return trajectory
        self.report.repeated_ids += 1
        number = self._next.get(key, 2)
        while (other := _digest(f"{trajectory.id}#{number}")) in self._ids:
            number += 1
        self._next[key] = number + 1
        self._ids.add(other)
        return msgspec.structs.replace(trajectory, id=f"{trajectory.id}#{number}")


def _meta(unused: dict[str, Any]) -> dict[str, Any]:
    """The unused fields of a row. A `meta` object among them is merged in, unless a field would be lost."""
    inner = unused.get("meta")
    if isinstance(inner, dict) and not inner.keys() & (unused.keys() - {"meta"}):
        return {key: value for key, value in unused.items() if key != "meta"} | inner
    return unused


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()
