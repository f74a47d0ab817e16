"""Scores of a file of trajectories: one line out for each line in, resumable, in bounded memory."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from data_pipeline.errors import DataError
from data_pipeline.trajectory import Trajectory, parse_line
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.progress import bar
from jaxprm.scoring import loading
from jaxprm.scoring.engine import bucket_of
from jaxprm.scoring.scorer import Scorer

FORMAT = 1


class Counts(NamedTuple):
    """Lines written: with scores, and with an error in their place."""

    scored: int
    errors: int


class _Written(msgspec.Struct):
    """What is read back of a line of our own."""

    id: str | None
    error: str | None = None


def score_file(model: Path, input: Path, output: Path, *, chunk: int = 256) -> Counts:
    """Scores every step of every trajectory of `input`; line k of `output` is about line k of `input`.

    A line is {"id", "steps": [{"message", "promise", "progress"}], "score"}, or {"id", "error"} where there is nothing
    to score; where not even an id can be read it is null, and "line" tells which line it was. Interrupted, it leaves
    OUTPUT.partial and goes on from there; with another model or another input it starts anew. OUTPUT is replaced when
    everything is written.

    chunk: trajectories held in memory at a time.

    Raises UserError for a model or a file that cannot be read, and for a full disk.
    """
    model, input, output = loading.find_model(model), Path(input), Path(output)
    _check_paths(input, output)
    digest, total = _digest_and_count(input)
    hashes = {name: files.sha256(model / name) for name in loading.MODEL_FILES if (model / name).is_file()}
    identity = {"format": FORMAT, "chunk": chunk, "input": digest, "model": hashes}
    scorer, progress = loading.load_scorer(model), loading.defines_progress(loading.read_recipe(model))
    partial = output.with_name(output.name + ".partial")
    record = output.with_name(output.name + ".partial.json")
    done = errors = 0
    try:
        done, errors = _resume(partial, record, identity, chunk)
        with (
            input.open("rb") as lines,
            partial.open("ab", buffering=0) as target,
            bar("score", total, initial=done, unit="trajectory") as shown,
        ):
            rest = enumerate(itertools.islice(lines, done, None), start=done + 1)
            while numbered := list(itertools.islice(rest, chunk)):
                results = _score_lines(scorer, numbered, input.name, progress)
                _write(target, b"".join(msgspec.json.encode(result) + b"\n" for result in results))
                done, errors = done + len(results), errors + sum("error" in result for result in results)
                shown.set_postfix(errors=errors, refresh=False)
                shown.update(len(results))
            os.fsync(target.fileno())
        os.replace(partial, output)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{partial}: no space left on the device after {done} of {total} lines; free some and run the same "
            "command again: it goes on from there"
        ) from None
    record.unlink(missing_ok=True)
    return Counts(done - errors, errors)


def _check_paths(input: Path, output: Path) -> None:
    if not input.is_file():
        raise UserError(f"input {input}: no such file; give trajectories as JSON Lines")
    if output.is_dir():
        raise UserError(f"output {output}: is a directory; name a file")
    if output.exists() and output.samefile(input):
        raise UserError(f"output {output}: is the input; name another file")
    output.parent.mkdir(parents=True, exist_ok=True)


def _digest_and_count(path: Path) -> tuple[str, int]:
    """sha256 and number of lines of a file, in one reading."""
    digest, count, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            count += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), count + (last != b"\n")


def _resume(partial: Path, record: Path, identity: dict[str, Any], chunk: int) -> tuple[int, int]:
    """(lines, errors among them) that an earlier run of the same identity left; anything else is cut off.

    Whole chunks are kept: so every trajectory is scored in the company it would have had, and gets the same bits.
    """
    if not partial.exists() or not record.exists() or record.read_bytes() != msgspec.json.encode(identity):
        partial.unlink(missing_ok=True)
        files.write_atomic(record, msgspec.json.encode(identity).decode())
        return 0, 0
    kept = kept_errors = end = lines = errors = place = 0
    with partial.open("r+b") as file:
        for line in file:
            try:
                written = msgspec.json.decode(line, type=_Written)
            except msgspec.MsgspecError:
                break
            if not line.endswith(b"\n"):
                break
            lines, errors, place = lines + 1, errors + (written.error is not None), place + len(line)
            if lines % chunk == 0:
                kept, kept_errors, end = lines, errors, place
        file.truncate(end)
    return kept, kept_errors


def _score_lines(
    scorer: Scorer, lines: Sequence[tuple[int, bytes]], source: str, progress: bool
) -> Iterable[dict[str, Any]]:
    """The result of each (number, line), in order."""
    results: list[dict[str, Any]] = []
    encoded, places = [], []
    for number, line in lines:
        where = f"{source}:{number}"
        try:
            trajectory = parse_line(line, where=where)
            encoded.append(_encode(scorer, trajectory, where))
            places.append(len(results))
            results.append({"id": trajectory.id})
        except (DataError, UserError) as error:
            results.append(_failed(line, number, str(error)))
    for place, one, promises in zip(places, encoded, scorer.score_encoded(encoded, [""] * len(encoded)), strict=True):
        results[place] |= loading.step_table(one.message_indices, promises, progress=progress)
    return results


def _encode(scorer: Scorer, trajectory: Trajectory, where: str):
    one = scorer.encoder.trajectory(trajectory.messages, row=where, tools=trajectory.tools)
    bucket_of(len(one.tokens), where)  # refuses one that is too long here, where it costs only its own line
    return one


def _failed(line: bytes, number: int, error: str) -> dict[str, Any]:
    try:
        id = msgspec.json.decode(line, type=dict[str, Any]).get("id")
    except (msgspec.MsgspecError, UnicodeDecodeError):
        id = None
    known = {"id": id} if isinstance(id, str) else {"id": None, "line": number}
    return known | {"error": " ".join(error.split())}


def _write(target: BinaryIO, data: bytes) -> None:
    """All of it: on a disk that is nearly full, an unbuffered write may take a part only, without an error."""
    rest = memoryview(data)
    while rest:
        rest = rest[target.write(rest) :]
