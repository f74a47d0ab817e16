"""Trajectories from a user's files instead of sampled ones: validated and split by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from data_pipeline.errors import DataError, SplitError
from data_pipeline.output import staged_file, write_errors
from data_pipeline.preferences import Preference, read_rows, to_line
from data_pipeline.splits import Splits, check_share, named_split, parse_inputs, split_of
from data_pipeline.trajectory import Trajectory, check_steps, count_rows
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.progress import bar


class ImportedFiles(msgspec.Struct, kw_only=True):
    """Counts of an import: trajectories by split, also splits that are not used, and the errors of bad rows."""

    splits: Counter[str] = msgspec.field(default_factory=Counter)
    bad: list[str] = msgspec.field(default_factory=list)


def import_files(
    arguments: Sequence[str], outputs: Mapping[str, Path], *, validation_share: float, seed: int, skip_bad: bool
) -> ImportedFiles:
    """Writes the rows of user files to the output of their split, in their order.

    The split of a row is that of its file, else the one it names, else train or validation by a hash of its task.
    Missing fields `task` and `success` are filled in, because later stages count by them; `success` from the outcome.

    Args:
      arguments: `[SPLIT=]FILE`.
      outputs: files to write, by split. Rows of other splits are only counted.
      validation_share: share of the tasks without a named split that are held out.
      seed: of the hash.
      skip_bad: leaves bad rows out instead of raising.

    Raises:
      DataError: a row is bad, a task is in two splits, or a file cannot be read or written.
      UserError: a split of `outputs` has no row.
    """
    inputs = parse_inputs(arguments)
    check_share(validation_share)
    imported, tasks = ImportedFiles(), Splits()
    total = sum(count_rows(path) for paths in inputs.values() for path in paths)
    with ExitStack() as stack, bar("read trajectories", total, unit="trajectory") as progress:
        streams = {}
        for split, output in outputs.items():
            stack.enter_context(write_errors(output))
            # A run that was killed between the renames of two splits has written one of them before.
            streams[split] = stack.enter_context(staged_file(output, overwrite=True))

        def bad(error: DataError) -> None:
            # Never skipped: the mistake is in the splits, not in a row, and leaving out rows would hide a leak from
            # training into validation.
            if isinstance(error, SplitError):
                raise error
            if not skip_bad:
                raise DataError(f"{error}; fix the row, or leave bad rows out with --skip-bad")
            imported.bad.append(str(error))
            progress.update()

        for file_split, paths in inputs.items():
            for path in paths:
                for where, trajectory in read_rows(path, skip_bad=bad):
                    row = f"{where} ({trajectory.id})"
                    try:
                        if isinstance(trajectory, Trajectory):
                            check_steps(trajectory.messages, row)
                        split = _split(trajectory, file_split, row, validation_share, seed)
                        tasks.add(trajectory.task_id, split)
                    except SplitError as error:
                        raise SplitError(f"{row}: {error}") from None
                    except DataError as error:
                        bad(error)
                        continue
                    imported.splits[split] += 1
                    if split in streams:
                        streams[split].write(to_line(_complete(trajectory, split)).encode() + b"\n")
                    progress.update()
        # Inside the block: the outputs appear only if every split has rows.
        _check_not_empty(imported, outputs, validation_share)
    return imported


def identity(arguments: Sequence[str]) -> list[dict[str, str | None]]:
    """Digests of the files by split, for the inputs of a stage. The paths of the files do not matter."""
    return [
        {"split": split, "sha256": files.sha256(Path(path))}
        for split, paths in parse_inputs(arguments).items()
        for path in paths
    ]


def _split(trajectory: Trajectory | Preference, file_split: str | None, row: str, share: float, seed: int) -> str:
    named = named_split(trajectory.split, file_split, row)
    return named or split_of(trajectory.task_id, validation_share=share, seed=seed)


def _complete(trajectory: Trajectory | Preference, split: str) -> Trajectory | Preference:
    if isinstance(trajectory, Preference):
        return msgspec.structs.replace(trajectory, split=split, task=trajectory.task_id)
    success = trajectory.success
    if success is None and trajectory.outcome is not None:
        success = trajectory.outcome > 0.5
    return msgspec.structs.replace(trajectory, split=split, task=trajectory.task_id, success=success)


def _check_not_empty(imported: ImportedFiles, outputs: Mapping[str, Path], share: float) -> None:
    for split in outputs:
        if not imported.splits[split]:
            counts = ", ".join(f"{count} in {name}" for name, count in sorted(imported.splits.items())) or "no row"
            raise UserError(
                f"collection.files: no trajectory for {split} ({counts}, {len(imported.bad)} bad); name the split of "
                f"rows or files (validation=FILE), or change collection.validation_share = {share:g} of the tasks"
            )
