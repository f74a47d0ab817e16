"""The work directory of a run. Finished stages are skipped, interrupted ones resume, changed ones are refused.

Every stage has a record, WORKDIR/stages/<name>.json: {"inputs", "finished", "seconds"}.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxprm import files
from jaxprm.config import fingerprint
from jaxprm.errors import UserError
from jaxprm.host_memory import trim_malloc


class WorkDirectory:
    """The files of a run. `work / "name"` is a path in it.

    Args:
        redo: stages whose inputs have changed are run again, and their old outputs removed.

    Raises UserError if the path is a file or cannot be created.
    """

    def __init__(self, path: Path, *, redo: bool = False):
        self.path, self._redo = path, redo
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

        Raises UserError if another process holds it.
        """
        # "a+" creates the file but does not empty it: it may hold the id of the process that has the lock.
        with open(self / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"work directory {self.path}: process {file.read() or 'unknown'} works in it; wait until it ends, "
                    "or use another --workdir"
                ) from None
            except OSError:
                # Some network file systems have no locks. A run there is not protected, and must still be possible.
                pass
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def check(self, inputs: dict[str, dict[str, Any]]) -> None:
        """Raises UserError if one of these stages was begun with other inputs, unless `redo` is set."""
        for name, fields in inputs.items():
            record = self._record(name)
            if record is not None and record["inputs"] != files.plain(fields) and not self._redo:
                raise UserError(
                    f"work directory {self.path}: stage {name} was made with {_difference(record['inputs'], fields)}; "
                    "use another --workdir, or --redo to make it again"
                )

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any], outputs: list[Path]) -> Iterator[bool]:
        """Enters a stage: yields whether it has to run, and records it as finished if its block raises nothing.

        A finished stage that lost an output has to run again. With `redo`, a stage that was begun with other inputs
        loses its outputs and starts from nothing.

        Args:
            inputs: everything that the outputs depend on, as plain JSON.
            outputs: files and directories that the stage leaves; each may have a `.partial` file while it runs.

        Raises UserError if the stage was begun with other inputs and `redo` is not set.
        """
        self.check({name: inputs})
        record_path, record = self._path(name), self._record(name)
        # Only with redo, otherwise `check` has raised. The old record is replaced after the outputs are gone, so that a
        # kill in between leaves it and the next run removes the rest.
        if record is not None and record["inputs"] != files.plain(inputs):
            for output in outputs:
                _remove(output)
            record = None
        if record is not None and record["finished"] and all(output.exists() for output in outputs):
            yield False
            return
        seconds = record["seconds"] if record else 0.0
        # Recorded before the work: a killed process leaves an unfinished record, which still holds the inputs.
        files.write_json(record_path, {"inputs": inputs, "finished": False, "seconds": seconds})
        started = time.monotonic()
        try:
            yield True
        finally:
            # Stages differ in what they allocate: what this one freed is of no use to the next.
            trim_malloc()
            # Also after an exception: the time of interrupted runs adds up.
            seconds = round(seconds + time.monotonic() - started, 2)
            files.write_json(record_path, {"inputs": inputs, "finished": False, "seconds": seconds})
        files.write_json(record_path, {"inputs": inputs, "finished": True, "seconds": seconds})

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage in the order of their last change, added up over interruptions."""
        folder = self.path / "stages"
        records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder.exists() else []
        return {path.stem: files.read_json(path)["seconds"] for path in records}

    def _path(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        return files.read_json(self._path(name)) if self._path(name).exists() else None


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
