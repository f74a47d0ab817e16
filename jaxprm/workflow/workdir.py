"""Stages of a work directory: done ones are skipped, interrupted ones go on, changed ones are refused or redone."""

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
    """A run's files. A stage is recorded with what went into it, in stages/<name>.json."""

    def __init__(self, path: Path, *, redo: bool = False):
        self.path, self._redo = path, redo
        if path.exists() and not path.is_dir():
            raise UserError(f"work directory {path}: is a file; name a directory")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"work directory {path}: cannot be made ({error.strerror})") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out. The lock falls with its process, however that ends.

        Raises UserError when another process holds it.
        """
        with open(self / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"work directory {self.path}: process {file.read() or 'unknown'} works in it; wait until it is "
                    "done, or use another --workdir"
                ) from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def check(self, inputs: dict[str, dict[str, Any]]) -> None:
        """Raises UserError when one of these stages was begun with other inputs, before any work is spent on it."""
        for name, given in inputs.items():
            record = self._record(name)
            if record is not None and record["inputs"] != files.plain(given) and not self._redo:
                raise UserError(
                    f"work directory {self.path}: stage {name} was made with {_difference(record['inputs'], given)}; "
                    "use another --workdir, or --redo to make it again"
                )

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any], outputs: list[Path]) -> Iterator[bool]:
        """Enters a stage: yields whether there is work to do, and records it as finished if nothing was raised.

        inputs: everything the outputs depend on. A finished stage that lost an output has work to do again. Raises
        UserError when the stage was begun with other inputs, unless the directory was opened with `redo`, which removes
        the outputs and begins again.
        """
        self.check({name: inputs})
        record_path, record = self._path(name), self._record(name)
        if record is not None and record["inputs"] != files.plain(inputs):
            for output in outputs:
                _remove(output)
            record = None
        if record is not None and record["finished"] and all(output.exists() for output in outputs):
            yield False
            return
        seconds = record["seconds"] if record else 0.0
        files.write_json(record_path, {"inputs": inputs, "finished": False, "seconds": seconds})
        started = time.monotonic()
        try:
            yield True
        finally:
            trim_malloc()
            seconds = round(seconds + time.monotonic() - started, 2)
            files.write_json(record_path, {"inputs": inputs, "finished": False, "seconds": seconds})
        files.write_json(record_path, {"inputs": inputs, "finished": True, "seconds": seconds})

    def _path(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        return files.read_json(self._path(name)) if self._path(name).exists() else None

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage, interruptions added up."""
        folder = self.path / "stages"
        records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder.exists() else []
        return {path.stem: files.read_json(path)["seconds"] for path in records}


def identity(*parts: Any) -> str:
    """A short name for inputs, to be part of later stages' inputs."""
    return fingerprint(parts)[:16]


def _remove(path: Path) -> None:
    for found in [path, path.with_name(path.name + ".partial")]:
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def _difference(before: Any, now: Any, where: str = "") -> str:
    """The first place where two plain values differ, with both values."""
    now = files.plain(now)
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            name = f"{where}.{key}" if where else key
            if key not in now or key not in before:
                return f"{name} = {before[key]!r}, now without it" if key in before else f"no {name}, now {now[key]!r}"
            if before[key] != now[key]:
                return _difference(before[key], now[key], name)
    return f"{where} = {before!r}, now {now!r}"
