"""The work directory of a run. Finished stages are skipped, interrupted ones resume, changed ones are refused.

Every stage has a record, WORKDIR/stages/<name>.json: see `jaxprm.workflow.records`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.locks import Busy, LockFile
from jaxprm import files
from jaxprm.config import fingerprint
from jaxprm.errors import UserError
from jaxprm.host_memory import trim_malloc
from jaxprm.workflow.records import StageRecord, read_record, record_files, verify, write_record


class WorkDirectory:
    """The files of a run. `work / "name"` is a path in it.

    Args:
        redo: stages whose inputs have changed are run again, and their old outputs removed.

    Raises UserError if the path is a file or cannot be created.
    """

    def __init__(self, path: Path, *, redo: bool = False):
        self.path, self._redo = path, redo
        self._verified: set[str] = set()
        if path.exists() and not path.is_dir():
            raise UserError(f"work directory {path}: is a file; name a directory")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"work directory {path}: cannot be created ({error.strerror}); name another one") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Excludes other processes. The operating system releases the lock when the process ends, even if it is killed.

        Raises UserError if another process holds it, or the directory cannot be written.
        """
        try:
            lock = LockFile(self / "lock")
        except Busy as holder:
            raise UserError(
                f"work directory {self.path}: {holder} works in it; wait until it ends, or use another --workdir"
            ) from None
        except OSError as error:
            raise UserError(
                f"work directory {self.path}: cannot be written ({error.strerror}); name another one"
            ) from None
        try:
            yield
        finally:
            lock.release(remove=False)

    def check(self, inputs: dict[str, dict[str, Any]]) -> None:
        """Checks stages against their records: their inputs, and once in a process the files that they left.

        Raises UserError if one was begun with other inputs, unless `redo` is set, or if a file of one has changed.
        """
        for name, fields in inputs.items():
            record = self._record(name)
            if record is None:
                continue
            if record.inputs == files.plain(fields):
                if record.finished and name not in self._verified:
                    verify(self.path, name, record)
                    self._verified.add(name)
            # What failed before it left anything binds nobody: the user may fix the input and try again.
            elif not self._redo and record.left_something(self.path):
                raise UserError(
                    f"work directory {self.path}: stage {name} was made with {_difference(record.inputs, fields)}; "
                    "use another --workdir, or --redo to make it again"
                )

    def has_begun(self, name: str) -> bool:
        """Whether a stage was finished, or has left something to resume from."""
        record = self._record(name)
        return record is not None and record.left_something(self.path)

    def forget(self, name: str, inputs: dict[str, Any], field: str, outputs: list[Path]) -> bool:
        """Removes outputs and record of a stage whose inputs differ in one field only; returns whether it did."""
        record, now = self._record(name), files.plain(inputs)
        if record is None or record.inputs == now or record.inputs | {field: now[field]} != now:
            return False
        # The record last: a kill in between must leave what says that the outputs are of other inputs.
        for output in outputs:
            _remove(output)
        self._path(name).unlink()
        return True

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any], outputs: list[Path]) -> Iterator[bool]:
        """Enters a stage: yields whether it has to run, and records it as finished if its block raises nothing.

        A finished stage that lost an output has to run again. With `redo`, a stage that was begun with other inputs
        loses its outputs and starts from nothing. The record of a finished stage has size and digest of its files.

        Args:
            inputs: everything that the outputs depend on, as plain JSON.
            outputs: files and directories that the stage leaves; each may have a `.partial` file while it runs.

        Raises UserError if the stage was begun with other inputs and `redo` is not set, or if its files changed.
        """
        self.check({name: inputs})
        record_path, record = self._path(name), self._record(name)
        # Only with redo or if nothing was left, otherwise `check` has raised. The old record is replaced after the
        # outputs are gone, so that a kill in between leaves it and the next run removes the rest.
        if record is not None and record.inputs != files.plain(inputs):
            for output in outputs:
                _remove(output)
            record = None
        if record is not None and record.finished and all(output.exists() for output in outputs):
            yield False
            return
        before = record.files if record else None
        record = StageRecord(
            inputs=inputs,
            finished=False,
            seconds=record.seconds if record else 0.0,
            outputs=[str(output.relative_to(self.path)) for output in outputs],
            files=before,
        )
        # Recorded before the work: a killed process leaves an unfinished record, which still holds the inputs.
        write_record(record_path, record)
        seconds, started = record.seconds, time.monotonic()
        try:
            yield True
        finally:
            # Stages differ in what they allocate: what this one freed is of no use to the next.
            trim_malloc()
            # Also after an exception: the time of interrupted runs adds up.
            record.seconds = round(seconds + time.monotonic() - started, 2)
            write_record(record_path, record)
        record.finished, record.files = True, record_files(self.path, outputs)
        write_record(record_path, record)
        self._verified.add(name)
        if before is not None and record.files != before:
            print(
                f"stage {name}: was made again, with another result; stages after it may still be of the earlier one: "
                "delete their outputs, or use another --workdir",
                file=sys.stderr,
            )

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage in the order of their last change, added up over interruptions."""
        folder = self.path / "stages"
        records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder.exists() else []
        return {path.stem: record.seconds for path in records if (record := read_record(path)) is not None}

    def _path(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _record(self, name: str) -> StageRecord | None:
        return read_record(self._path(name))


def identity(*parts: Any) -> str:
    """A short hash of a stage's inputs, recorded among the inputs of later stages."""
    return fingerprint(parts)[:16]


def _remove(output: Path) -> None:
    for path in [output, output.with_name(output.name + ".partial")]:
        # A link to a directory is removed as a link: what it points to is not the run's.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _difference(before: Any, now: Any, where: str = "") -> str:
    """The first field in which two plain values differ, with both values."""
    now = files.plain(now)
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            name = f"{where}.{key}" if where else key
            if key not in now or key not in before:
                return f"{name} = {before[key]!r}, now without it" if key in before else f"no {name}, now {now[key]!r}"
            if before[key] != now[key]:
                return _difference(before[key], now[key], name)
    return f"{where} = {before!r}, now {now!r}"
