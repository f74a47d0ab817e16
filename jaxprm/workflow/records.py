"""stages/<name>.json: what went into a stage, whether it finished, and what its files are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from jaxprm import files
from jaxprm.errors import UserError

# Files of a training output that no later stage reads. The user may remove checkpoints to save space.
_UNRECORDED = {"checkpoints", "profile", "tensorboard", "wandb", "wandb.json", "timing.jsonl"}


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file as its stage left it."""

    bytes: int
    lines: int
    sha256: str

    def size_text(self) -> str:
        return f"{self.lines} lines, {self.bytes} bytes"


class StageRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Content of stages/<name>.json.

    Attributes:
      inputs: everything that the outputs depend on, as plain JSON.
      seconds: wall time, added up over interruptions.
      outputs: files and directories that the stage leaves, relative to the work directory. Earlier versions did not
        record them, and None says so.
      files: the files in `outputs`, by path. None until the stage has finished, and in records of earlier versions.
    """

    inputs: dict[str, Any]
    finished: bool
    seconds: float
    outputs: list[str] | None = None
    files: dict[str, FileRecord] | None = None

    def left_something(self, folder: Path) -> bool:
        """Whether anything is there that the stage made of its inputs, finished or not."""
        if self.finished or self.outputs is None:
            return True
        paths = [folder / output for output in self.outputs]
        return any(path.exists() or path.with_name(path.name + ".partial").exists() for path in paths)


def read_record(path: Path) -> StageRecord | None:
    """The record in a file, None if there is none. Raises UserError if it is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=StageRecord)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged ({error}); copy it again, or delete it to accept the outputs of this stage as they are"
        ) from None


def write_record(path: Path, record: StageRecord) -> None:
    """Writes a record, completely or not at all."""
    files.write_json(path, msgspec.to_builtins(record) | {"inputs": files.plain(record.inputs)})


def record_files(folder: Path, outputs: Iterable[Path]) -> dict[str, FileRecord]:
    """Records of the files that later stages read, by path relative to the work directory."""
    return {str(path.relative_to(folder)): file_record(path) for output in outputs for path in _recorded(output)}


def file_record(path: Path) -> FileRecord:
    """Size, number of line ends and digest of a file, read once."""
    digest, size, lines = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size, lines = size + len(block), lines + block.count(b"\n")
    return FileRecord(bytes=size, lines=lines, sha256=digest.hexdigest())


def verify(folder: Path, stage: str, record: StageRecord) -> None:
    """Compares the files of a finished stage with its record: all sizes, then all contents.

    An output that is missing as a whole is no error, because the stage then runs again.
    Raises UserError that names the first file that differs.
    """
    expected = {
        folder / name: (folder / output, recorded)
        for name, recorded in (record.files or {}).items()
        for output in record.outputs or []
        if Path(name).is_relative_to(output)
        and (folder / output).exists()
        # Earlier versions recorded traces too.
        and _UNRECORDED.isdisjoint(Path(name).relative_to(output).parts)
    }
    for path, (output, recorded) in expected.items():
        if not path.is_file():
            raise UserError(f"{path}: is missing; stage {stage} wrote {recorded.size_text()}; {_advice(output)}")
        if path.stat().st_size != recorded.bytes:
            raise _differs(path, stage, recorded, output)
    for path, (output, recorded) in expected.items():
        if files.sha256(path) != recorded.sha256:
            raise _differs(path, stage, recorded, output)


def _differs(path: Path, stage: str, recorded: FileRecord, output: Path) -> UserError:
    actual = file_record(path)
    if actual.bytes != recorded.bytes:
        what = f"has {actual.size_text()}, stage {stage} wrote {recorded.size_text()}"
    else:
        what = f"has sha256 {actual.sha256[:12]}, stage {stage} wrote {recorded.sha256[:12]} (of the same size)"
    return UserError(f"{path}: {what}; {_advice(output)}")


def _advice(output: Path) -> str:
    return f"copy it again, or delete {output} to run the stage again"


def _recorded(output: Path) -> Iterator[Path]:
    if output.is_file():
        yield output
        return
    for parent, folders, names in os.walk(output):
        folders[:] = sorted(set(folders) - _UNRECORDED)
        yield from (Path(parent) / name for name in sorted(set(names) - _UNRECORDED))
