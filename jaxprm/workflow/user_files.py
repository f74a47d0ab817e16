"""Trajectories from a user's files in the place of sampled ones: validated, split by task, put where stages look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from data_pipeline.errors import DataError, SplitError
from data_pipeline.output import staged_file, write_errors
from data_pipeline.splits import Splits, check_share, named_split, parse_inputs, split_of
from data_pipeline.trajectory import Trajectory, check_steps, count_rows, read_numbered, to_line
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.progress import bar


class ImportedFiles(msgspec.Struct, kw_only=True):
    """What became of the rows: trajectories by split, of which only those in `outputs` are used, and bad rows."""

    splits: Counter[str] = msgspec.field(default_factory=Counter)
    bad: list[str] = msgspec.field(default_factory=list)


def import_files(
    arguments: Sequence[str], outputs: Mapping[str, Path], *, validation_share: float, seed: int, skip_bad: bool
) -> ImportedFiles:
    """Writes the rows of `[SPLIT=]FILE` to the output of their split, in their order.

    A row is in the split its file was given for, else in the one it names, else in training or validation by a hash of
    its task. Task and success, where the outcome tells it, are filled in: later stages count by them.

    Raises UserError or DataError: for a bad row unless they are skipped, a task in two splits, a split without a row.
    """
    inputs = parse_inputs(arguments)
    check_share(validation_share)
    taken, tasks = ImportedFiles(), Splits()
    total = sum(count_rows(path) for paths in inputs.values() for path in paths)
    with ExitStack() as stack, bar("read trajectories", total, unit="trajectory") as progress:
        streams = {}
        for split, output in outputs.items():
            stack.enter_context(write_errors(output))
            # A run that was killed between the renames of two splits has written one of them before.
            streams[split] = stack.enter_context(staged_file(output, overwrite=True))

        def bad(error: DataError) -> None:
            if isinstance(error, SplitError):
                raise error
            if not skip_bad:
                raise DataError(f"{error}; mend the row, or leave bad rows out with --skip-bad")
            taken.bad.append(str(error))
            progress.update()

        for given, paths in inputs.items():
            for path in paths:
                for where, trajectory in read_numbered(path, skip_bad=bad):
                    row = f"{where} ({trajectory.id})"
                    try:
                        check_steps(trajectory.messages, row)
                        split = _split(trajectory, given, row, validation_share, seed)
                        tasks.add(trajectory.task_id, split)
                    except SplitError as error:
                        raise SplitError(f"{row}: {error}") from None
                    except DataError as error:
                        bad(error)
                        continue
                    taken.splits[split] += 1
                    if split in streams:
                        streams[split].write(to_line(_complete(trajectory, split)).encode() + b"\n")
                    progress.update()
        _check_all_there(taken, outputs, validation_share)
    return taken


def identity(arguments: Sequence[str]) -> list[dict[str, str | None]]:
    """What the files hold, by split, for a stage's inputs: the same files elsewhere are the same."""
    return [
        {"split": split, "sha256": files.sha256(Path(path))}
        for split, paths in parse_inputs(arguments).items()
        for path in paths
    ]


def _split(trajectory: Trajectory, given: str | None, row: str, share: float, seed: int) -> str:
    named = named_split(trajectory.split, given, row)
    return named or split_of(trajectory.task_id, validation_share=share, seed=seed)


def _complete(trajectory: Trajectory, split: str) -> Trajectory:
    success = trajectory.success
    if success is None and trajectory.outcome is not None:
        success = trajectory.outcome > 0.5
    return msgspec.structs.replace(trajectory, split=split, task=trajectory.task_id, success=success)


def _check_all_there(taken: ImportedFiles, outputs: Mapping[str, Path], share: float) -> None:
    for split in outputs:
        if not taken.splits[split]:
            found = ", ".join(f"{count} in {name}" for name, count in sorted(taken.splits.items())) or "no row at all"
            raise UserError(
                f"collection.files: no trajectory for {split} ({found}, {len(taken.bad)} bad); name the split of rows "
                f"or files (validation=FILE), or change collection.validation_share = {share:g} of the tasks"
            )
