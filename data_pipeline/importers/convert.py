"""Import of rows in another format as a trajectory file: streamed and checked row by row.

Only a few bytes per row stay in memory: digests of ids, and the split of every task.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline import splits
from data_pipeline.conversations import chat
from data_pipeline.errors import DataError, SplitError, one_line
from data_pipeline.importers import fields, labels, registry
from data_pipeline.importers.inputs import InputFile, find_files, read_file
from data_pipeline.importers.reader import Context, Notes, Parsed, Reader, note, refuse_media
from data_pipeline.importers.report import ImportReport, check_counts, to_text
from data_pipeline.locks import locked
from data_pipeline.output import staged_file, staging_file_of, write_errors
from data_pipeline.paths import Named, check_paths
from data_pipeline.preferences import Preference, parse_preference, to_line
from data_pipeline.source import SourceRow
from data_pipeline.trajectory import Trajectory, check_steps, parse_line

__all__ = ["ImportReport", "Options", "import_trajectories", "to_text"]

# Trajectory fields that are copied from a row. Its unused fields go into `meta`.
_COPIED = ("environment", "split", "ended", "rewards", "step_labels", "policy")
# What a row may call its outcome: named in the report if no outcome was read.
_OUTCOMES = ("reward", "score", "resolved", "success", "correct", "final_answer_correct", "is_correct")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of an import. Fields are dotted paths; None is the format's usual path, if a row has it.

    `split_by` is the field by whose values rows are split: None for no split, "" for the task. `skip_bad` leaves bad
    rows out. `roles` are our roles by those of the rows, in addition to the usual ones.
    """

    format: str = registry.AUTO
    messages: str | None = None
    tools: str | None = None
    step_labels: str | None = None
    outcome: str | None = None
    success: str | None = None
    id: str | None = None
    task: str | None = None
    scale: fields.Scale = fields.Scale()
    roles: dict[str, str] = {}
    split_by: str | None = None
    validation_share: float = splits.VALIDATION_SHARE
    seed: int = 0
    skip_bad: bool = False


def parse_roles(arguments: Sequence[str]) -> dict[str, str]:
    """Our role by a row's, from arguments ROLE=NAME,NAME. `context` is an assistant whose messages are no steps."""
    ours = (*dict.fromkeys(chat.ROLES.values()), chat.CONTEXT)
    roles: dict[str, str] = {}
    for argument in arguments:
        role, equals, names = argument.partition("=")
        if role not in ours or not equals or not all(names.split(",")):
            raise DataError(f"--roles {argument!r}: write it as ROLE=NAME,NAME with a ROLE of {', '.join(ours)}")
        roles |= dict.fromkeys(names.split(","), role)
    return roles


def import_trajectories(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: Options,
    *,
    progress: Callable[[int, int], None] | None = None,
    before_output: Callable[[ImportReport], None] | None = None,
) -> ImportReport:
    """Writes the trajectories of `inputs` to the new trajectory file `output`, in their order.

    Args:
      progress: called with (bytes read, all bytes).
      before_output: called with the report before `output` appears, to write what belongs to it.

    Raises:
      DataError: the output exists, is an input, is written by another process or cannot be written, an input cannot be
        read, a row is bad and bad rows are not skipped, no row is left, or a field named in `options` is in no row.
        Then there is no output.
    """
    output = Path(output)
    check_paths([Named("input", Path(path)) for path in inputs], [Named("output", output)])
    converter = _Converter(options)
    files, others = find_files(inputs)
    # A missing file is an error of `read_file`, which names it.
    sizes = [file.path.stat().st_size if file.path.is_file() else 0 for file in files]
    report, before = converter.report, 0
    report.files, report.other_files = len(files), others
    # `read_file` raises DataError, so an OSError in this block is one of writing.
    with locked(output, staging=[staging_file_of(output)]), write_errors(output), staged_file(output) as target:
        for file, size in zip(files, sizes, strict=True):
            for row, is_only in _with_only(read_file(file)):
                report.rows += 1
                try:
                    lines = converter.convert(row, file, is_only)
                # No bad row: leaving it out would hide that the other rows are split wrongly.
                except SplitError:
                    raise
                except _UnknownShape as error:
                    # In a folder there are files that are no trajectories, such as results and configs.
                    report.unknown.append(str(error))
                except DataError as error:
                    if not options.skip_bad:
                        raise DataError(f"{error}; fix the row, or leave bad rows out with --skip-bad") from None
                    report.skipped += 1
                    report.bad.append(" ".join(str(error).split()))
                else:
                    for line in lines:
                        target.write(line + b"\n")
                if progress:
                    progress(before + row.bytes_read, sum(sizes))
            before += size
        if not report.written:
            first = f", all bad, the first: {report.bad[0]}" if report.bad else ""
            first = first or (f", the first: {report.unknown[0]}" if report.unknown else "")
            raise DataError(f"no trajectory in {', '.join(map(str, inputs))}: {report.rows} rows{first}")
        converter.check_fields()
        check_counts(report)
        if before_output:
            before_output(report)
    return report


class _UnknownShape(DataError):
    """A row of a folder's file whose shape no reader knows."""


def _with_only(rows: Iterator[SourceRow]) -> Iterator[tuple[SourceRow, bool]]:
    """Each row, and whether it is the only one."""
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    yield first, second is None
    if second is not None:
        yield second, False
        for row in rows:
            yield row, False


class _Converter:
    """Converts rows, and keeps ids unique and every task in one split."""

    def __init__(self, options: Options):
        self.report = ImportReport()
        self._options = options
        self._named = {name: _path(getattr(options, name)) for name in ("messages", "tools", "step_labels")}
        self._roles = {**chat.ROLES, **options.roles} if options.roles else chat.ROLES
        self._paths: dict[str, dict[str, list[fields.Path]]] = {}  # by reader and field
        self._group = _path(options.split_by or None)
        self._rows_with: Counter[str] = Counter()
        self._ids: set[bytes] = set()
        # The next number to try for a repeated id, or every repetition would try all earlier ones.
        self._next: dict[bytes, int] = {}
        self._splits = splits.Splits()
        self._groups: set[bytes] = set()  # at most two: to see whether all rows are in one
        if options.split_by is not None:
            splits.check_share(options.validation_share)
        if options.format not in registry.FORMATS:
            raise DataError(f"--format {options.format}: must be one of {', '.join(registry.FORMATS)}")

    def convert(self, row: SourceRow, file: InputFile, is_only: bool = False) -> list[bytes]:
        """The lines of a row's trajectories.

        Raises DataError that names a bad row, which is then in none of the counts.

        is_only: the row is a file of its own, and is called after it.
        """
        if isinstance(row.value, DataError):
            raise row.value
        notes: Notes = Counter(row.repairs)
        default = file.name if is_only and _is_one_file(file) else f"{file.name}:{row.number}"
        try:
            reader, reason = self._reader(row, file)
            context = self._context(reader, notes, file)
            refuse_media(row.value)
            parsed = reader.parse(row.value, context)
            if not parsed:
                raise DataError("there is no conversation in it")
            converted = [self._convert(conversation, reader, row.value, context, default) for conversation in parsed]
        except _UnknownShape:
            raise
        except RecursionError:
            raise DataError(f"{row.where}: nested too deeply") from None
        # msgspec encodes no integer beyond 64 bits and no lone surrogate.
        except (DataError, OverflowError, UnicodeError) as error:
            raise DataError(f"{row.where}: {error}") from None
        # Readers take what a format promises as it is, and a file may break any of it.
        except (AttributeError, LookupError, TypeError) as error:
            raise DataError(
                f"{row.where}: a value is missing, or has another type than its format says: {one_line(error):.120}"
            ) from None
        finished = []
        for plain, present in converted:
            finished.append((*self._checked(plain, row), present))
        # All that can raise comes before the first count.
        lines = []
        for trajectory, pair, resplit, present in finished:
            self._rows_with.update(present)
            self.report.without_outcome += trajectory.outcome is None and trajectory.rewards is None and pair is None
            self.report.resplit += resplit
            self.report.pairs += pair is not None
            lines.append(to_line(self._with_unique_id(trajectory if pair is None else pair)).encode())
        # A pair has no outcome to name.
        if all(row.outcome is None and row.rewards is None and pair is None for row, pair, *_ in finished):
            self.report.unused.update(key for key in _OUTCOMES if _is_outcome(row.value.get(key)))
        for description, count in notes.items():
            note(self.report.notes, description, count)
        self.report.formats[reader.name] += 1
        self.report.reasons.setdefault(reader.name, reason)
        self.report.written += len(lines)
        self.report.additional += len(lines) - 1
        return lines

    def _reader(self, row: SourceRow, file: InputFile) -> tuple[Reader, str]:
        if self._options.format != registry.AUTO:
            return registry.BY_NAME[self._options.format], "as requested"
        try:
            return registry.detect(row.value, self._named["messages"])
        except DataError as error:
            if file.is_listed:
                raise
            raise _UnknownShape(f"{row.where}: {error}") from None

    def _context(self, reader: Reader, notes: Notes, file: InputFile) -> Context:
        messages = self._named["messages"] or _path(reader.messages)
        return Context(messages, notes, self._named["tools"], self._roles, file.path)

    def _checked(self, plain: dict[str, Any], row: SourceRow) -> tuple[Trajectory, Preference | None, bool]:
        """(trajectory, pair that it is, whether its split is another than before) of a converted row.

        The trajectory of a pair ends with the chosen action.
        """
        rejected = plain.pop("rejected", None)
        if rejected is not None:
            plain = _without_outcome(plain)
        try:
            line = msgspec.json.encode(plain)
        except (TypeError, OverflowError, UnicodeError, RecursionError) as error:
            raise DataError(f"{row.where}: {error}") from None
        # Parsed from its JSON, so that an imported row passes the same checks as a line of a trajectory file.
        trajectory = parse_line(line, where=row.where)
        check_steps(trajectory.messages, row.where)
        splits.named_split(trajectory.split, None, row.where)
        trajectory, resplit = self._split(trajectory, row)
        return trajectory, None if rejected is None else _pair(trajectory, rejected, row.where), resplit

    def check_fields(self) -> None:
        """Raises DataError if a field named in the options is in no row, or if all rows are in one group of a split."""
        for name in ("outcome", "success", "step_labels", "tools"):
            path = getattr(self._options, name)
            if path is not None and not self._rows_with[name]:
                option = name.replace("_", "-")
                raise DataError(f"--{option}-field {path}: no row has it, of {self.report.written} that could be read")
        if len(self._groups) == 1 and self.report.written > 1:
            by = self._options.split_by or "task"
            raise DataError(
                f"--split-by {by}: all {self.report.written} trajectories have the same {by}, so one split would be "
                "empty; name another field, such as --split-by id, or the tasks with --task-field"
            )

    def _convert(
        self, parsed: Parsed, reader: Reader, row: dict[str, Any], context: Context, id: str
    ) -> tuple[dict[str, Any], set[str]]:
        used = {*parsed.used, *_COPIED}
        converted = {name: row[name] for name in _COPIED if row.get(name) is not None and name not in parsed.used}
        # A policy that is no object goes into `meta` like an unknown field, and so do rewards by name.
        for name, kind in (("policy", dict), ("rewards", list)):
            if not isinstance(converted.get(name, kind()), kind):
                used.discard(name)
                del converted[name]
        for name in converted.keys() & parsed.fields.keys():
            if converted[name] != parsed.fields[name]:
                raise DataError(f"`{name}` is given twice, in the row and by its {reader.name} form; keep one")
        converted |= parsed.fields
        present = {"tools"} if parsed.fields.get("tools") else set()
        for name, paths in self._paths_of(reader).items():
            path, value = next(((path, value) for path in paths if (value := path.find(row)) is not None), (None, None))
            option = getattr(self._options, name)
            if path is not None and (option is not None or name not in parsed.fields):
                converted[name] = self._value(name, path.text, value)
                # Counted only if the row is written, so that `check_fields` finds fields that no row has.
                present.add(name)
                used.add(path.key)
            elif name in parsed.fields:
                converted[name] = self._value(name, name, parsed.fields[name])
            elif name in ("id", "task") and option is not None:
                raise DataError(f"field {option}, which names its {name}, is missing")
        self._add_labels(converted, parsed, row, used, present)
        _check_finite(converted)
        converted.setdefault("id", id)
        converted["messages"] = [*parsed.messages, *([parsed.chosen] if parsed.chosen else [])]
        if parsed.chosen is not None:
            converted["rejected"] = list(parsed.rejected)
        if meta := self._meta(parsed, row, context, used):
            converted["meta"] = meta
        return converted, present

    def _paths_of(self, reader: Reader) -> dict[str, list[fields.Path]]:
        if reader.name not in self._paths:
            self._paths[reader.name] = {
                name: [fields.Path.parse(path) for path in ([option] if option is not None else usual)]
                for name, option, usual in (
                    ("outcome", self._options.outcome, reader.outcome),
                    ("success", self._options.success, ("success",)),
                    ("id", self._options.id, reader.id),
                    ("task", self._options.task, reader.task),
                )
            }
        return self._paths[reader.name]

    def _add_labels(
        self, converted: dict[str, Any], parsed: Parsed, row: dict[str, Any], used: set[str], present: set[str]
    ) -> None:
        path = self._named["step_labels"]
        value = path.find(row) if path is not None else converted.get("step_labels")
        # Labels next to a pair are data of its source: a pair has none.
        if value is None or parsed.chosen is not None:
            return
        name = path.text if path is not None else "step_labels"
        # Labels of a reader are one for each step already.
        if path is not None or "step_labels" not in parsed.fields:
            converted["step_labels"] = labels.step_labels(value, parsed, name)
        if path is not None:
            present.add("step_labels")
            # A first error says more than its labels, and `evaluate` reads it from meta.
            if path.key is not None and not labels.is_first_error(value):
                used.add(path.key)

    def _meta(self, parsed: Parsed, row: dict[str, Any], context: Context, used: set[str]) -> dict[str, Any]:
        others = context.messages.without(row) if context.messages is not None else row
        for path in [field for field in used if field and field not in row and "." in field]:
            others = fields.Path.parse(path).without(others)
        meta = {}
        for key, value in others.items():
            # An object that held nothing but the conversation is empty now.
            if key in used or value is None or (value == {} and row[key] != {}):
                continue
            if parsed.origins and (by_message := labels.moved(value, parsed.origins)) is not None:
                note(context.notes, f"labels by message in `{key:.40}`, moved with their messages")
                value = by_message
            meta[key] = value
        return {**_meta(meta), **parsed.meta}

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
            # A reader may have found it elsewhere: the name of a trial is in another file.
            if value is None and self._group.text in ("id", "environment"):
                value = getattr(trajectory, self._group.text)
            if value is None:
                raise DataError(f"{row.where}: field {self._group.text}, to split by, is missing")
            # As JSON, or the number 1 and the text "1" would be one group.
            group = msgspec.json.encode(value).decode()
        if len(self._groups) < 2:
            self._groups.add(_digest(group))
        split = splits.split_of(group, validation_share=self._options.validation_share, seed=self._options.seed)
        try:
            self._splits.add(trajectory.task_id, split)
        except SplitError as error:
            raise SplitError(f"{row.where}: {error}, or by a field whose values share no task") from None
        return msgspec.structs.replace(trajectory, split=split), trajectory.split not in (None, split)

    def _with_unique_id(self, trajectory: Trajectory | Preference) -> Trajectory | Preference:
        """The row with an id of its own: the second one with the same id gets id#2, and so on."""
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


def _path(text: str | None) -> fields.Path | None:
    return None if text is None else fields.Path.parse(text)


def _is_one_file(file: InputFile) -> bool:
    """Whether files of this kind hold one trajectory each."""
    return any(suffix in (".json", ".traj", ".eval") for suffix in file.path.suffixes) or not file.is_listed


def _is_outcome(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _check_finite(converted: Mapping[str, Any]) -> None:
    rewards = converted.get("rewards")
    for index, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        if isinstance(reward, float) and not math.isfinite(reward):
            raise DataError(f"rewards[{index}] is {reward}; it must be a number")


def _without_outcome(plain: dict[str, Any]) -> dict[str, Any]:
    """A converted row whose fields of a trajectory that a pair lacks are in `meta`."""
    names = plain.keys() & set(Trajectory.__struct_fields__) - set(Preference.__struct_fields__)
    if not names:
        return plain
    others = {name: plain[name] for name in sorted(names)}
    kept = {name: value for name, value in plain.items() if name not in names}
    return kept | {"meta": others | kept.get("meta", {})}


def _pair(trajectory: Trajectory, rejected: list[dict[str, Any]], where: str) -> Preference:
    """The preference pair whose chosen action is the last message. Raises DataError for actions that are no steps."""
    plain = msgspec.to_builtins(trajectory)
    *state, chosen = plain.pop("messages")
    line = msgspec.json.encode(plain | {"messages": state, "chosen": chosen, "rejected": rejected})
    return parse_preference(line, where=where)


def _meta(unused: dict[str, Any]) -> dict[str, Any]:
    """The unused fields of a row. A `meta` object among them is merged in, unless a field would be lost."""
    inner = unused.get("meta")
    if isinstance(inner, dict) and not inner.keys() & (unused.keys() - {"meta"}):
        return {key: value for key, value in unused.items() if key != "meta"} | inner
    return unused


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()
