"""Scores a file of trajectories: one line of output for each row of input, resumable, in bounded memory."""

from __future__ import annotations

import errno
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data_pipeline import typed_json
from data_pipeline.chat_template import fingerprint_text, read_template
from data_pipeline.encode import Encoded, Reasoning, SpecialTokens
from data_pipeline.errors import DataError, one_line
from data_pipeline.output import record_of, staging_file_of
from data_pipeline.paths import Named, check_paths
from data_pipeline.source import count_texts, read_texts
from data_pipeline.trajectory import Parsed, Trajectory, parse_with_origins
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.progress import bar
from jaxprm.scoring.engine import bucket_of
from jaxprm.scoring.scorer import Scorer
from jaxprm.scoring.sources import Source, reward_model

FORMAT = 1


class LineCounts(NamedTuple):
    """Numbers of lines written: with scores, and with an error in place of them.

    longer: lines with scores that have more tokens than any conversation that the model was trained on.
    """

    scored: int
    errors: int
    longer: int = 0


class InputRow(NamedTuple):
    """A row of a file of trajectories, not parsed.

    Args:
      number: of the row in its file, from 1; of the line, in a file of lines.
      where: name of the row in messages.
      text: its JSON, or why it cannot be read.
    """

    number: int
    where: str
    text: bytes | DataError

    def parse(self) -> Parsed:
        """The trajectory and the origins of its messages. Raises DataError if it is malformed."""
        if isinstance(self.text, DataError):
            raise self.text
        return parse_with_origins(self.text, where=self.where)


class ScoredLine(NamedTuple):
    """A row of a file of trajectories: scored, or with an error.

    Args:
      number: of the row in its file, see InputRow.
      messages: index of the message of each step in its row, [S].
      promises: of the steps, float32 [S].
      tokens: of the conversation.
    """

    number: int
    trajectory: Trajectory | None = None
    messages: Sequence[int] = ()
    promises: np.ndarray | None = None
    error: str | None = None
    tokens: int = 0


class _Written(msgspec.Struct):
    """The fields of an output line that resuming needs."""

    id: str | None
    error: str | None = None
    tokens: int | None = None


def score_file(
    model: Path | Source,
    input: Path,
    output: Path,
    *,
    chunk: int = 256,
    dtype: str = "float32",
    template: str | None = None,
    reasoning: Reasoning | None = None,
    special_tokens: SpecialTokens | None = None,
    mesh: config_lib.MeshConfig | None = None,
) -> LineCounts:
    """Scores every step of every trajectory of `input`; line k of `output` is about row k of `input`.

    The input is in any form that `data_pipeline.source.read_texts` reads. Blank lines are no rows.

    A line is {"id", "steps": [{"message", "promise", "progress"}], "score"}, or {"id", "error"} if it cannot be
    scored. If even the id cannot be read, it is null, and "line" is the number of the line, or row. A conversation
    longer than all in the model's training also has "tokens". An interrupted call leaves OUTPUT.partial and resumes
    from it, with the same model and input. OUTPUT is replaced at the end.

    Args:
        model: a location of a reward model, as in `find_model`, or another source of scores.
        chunk: trajectories held in memory at a time.
        dtype: of the arithmetic, "float32" or "bfloat16".
        template: a chat template instead of the model's own, as in Encoder.load.
        reasoning, special_tokens: as in loading.load_encoder.
        mesh: over this process's devices; None uses one device.

    Raises UserError for a model or file that cannot be read, for an OUTPUT.partial of another model or input, for an
    output that is an input or that another process is writing, for an input that changed meanwhile, and for a full
    disk.
    """
    source = model if isinstance(model, Source) else reward_model(model)
    input, output = Path(input), Path(output)
    _check_paths(source, input, output, template)
    size = input.stat().st_size
    digest, total, lines = digest_and_count(input)
    run_identity: dict[str, Any] = {
        "format": FORMAT,
        "chunk": chunk,
        "dtype": dtype,
        "input": digest,
        "model": source.identity,
    }
    text = read_template(template)
    run_identity["chat_template"] = None if text is None else fingerprint_text(text)
    # Recorded only where they change a score, so that what earlier versions began resumes.
    if reasoning not in (None, source.reasoning):
        run_identity["reasoning"] = reasoning
    if special_tokens is not None:
        run_identity["special_tokens"] = special_tokens
    # Earlier versions wrote a line for each line of the input, blank ones too.
    if total != lines:
        run_identity["rows"] = total
    record = record_of(output)
    target = files.ResumableLines(output, staging=[staging_file_of(record)])
    done = errors = longer = 0
    try:
        with target:
            # Within the lock: a second process is refused before it loads the model.
            choices = {"reasoning": reasoning, "special_tokens": special_tokens}
            scorer = source.load(dtype=dtype, template=template, mesh=mesh, **choices)
            done, errors, longer = _resume(target, record, run_identity, chunk)
            remaining = itertools.islice(read_input(input), done, total)
            with bar("score", total, initial=done, unit="trajectory") as shown:
                while rows := list(itertools.islice(remaining, chunk)):
                    scored = score_lines(scorer, rows)
                    results = [_result(item, row, source) for item, row in zip(scored, rows, strict=True)]
                    # One write for a chunk, since resuming keeps complete chunks only.
                    target.append_bytes(b"".join(msgspec.json.encode(result) + b"\n" for result in results))
                    done, errors = done + len(results), errors + sum("error" in result for result in results)
                    longer += sum("tokens" in result for result in results)
                    shown.set_postfix(errors=errors, refresh=False)
                    shown.update(len(results))
            if _digest(input, size) != digest:
                # They are scores of lines that are in no file any more.
                target.discard()
                record.unlink(missing_ok=True)
                raise UserError(
                    f"input {input}: changed while it was scored ({done} lines of {total} were there); nothing was "
                    "written to the output, run the same command again"
                )
            if input.stat().st_size > size:
                print(f"{input}: grew while it was scored; {output} has its first {total} rows", file=sys.stderr)
            target.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{target.partial}: no space left on the device after {done} of {total} rows; free some and run the same "
            "command again: it resumes there"
        ) from None
    # Last: a record without its .partial file does no harm, the next call replaces it.
    record.unlink(missing_ok=True)
    return LineCounts(done - errors, errors, longer)


def _check_paths(source: Source, input: Path, output: Path, template: str | None) -> None:
    if not input.is_file():
        raise UserError(f"input {input}: no such file; give trajectories as JSON Lines")
    if output.is_dir():
        raise UserError(f"output {output}: is a directory; name a file")
    reads = [Named("input", input), *(Named("model", directory) for directory in source.directories)]
    reads += [Named("chat template", Path(template))] if template else []
    with files.user_errors():
        check_paths(reads, [Named("output", output)])


def _digest(path: Path, size: int) -> str:
    """sha256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def read_input(path: Path) -> Iterator[InputRow]:
    """The rows of a file, in order. Raises DataError if the file cannot be read."""
    for row in read_texts(path):
        yield InputRow(row.number, path.name + row.where.removeprefix(str(path)), row.text)


def digest_and_count(path: Path) -> tuple[str, int, int]:
    """(sha256, number of rows, number of lines) of a file. Raises DataError if it cannot be read."""
    digest, count, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            count += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), count_texts(path), count + (last != b"\n")


def _resume(target: files.ResumableLines, record: Path, identity: dict[str, Any], chunk: int) -> tuple[int, int, int]:
    """(lines, errors among them, `LineCounts.longer`) that an earlier run of the same identity wrote.

    Complete chunks are kept and the others cut off. So every trajectory is in the same batch as in an uninterrupted
    run, and its score is bit-identical.

    Raises UserError if the lines are from a run with another model, input, chunk or dtype.
    """
    if target.is_empty():
        if record.exists() and not _is_record(record):
            raise UserError(f"{record}: exists and is no record of an interrupted run; move it, or name another output")
        # Before the first line: lines without a record could not be resumed.
        files.write_atomic(record, msgspec.json.encode(identity).decode())
        return 0, 0, 0
    _check_record(target.partial, record, identity)
    kept, end, lines, errors, longer, size = (0, 0, 0), 0, 0, 0, 0, 0
    for line in target.raw_lines():
        try:
            written = msgspec.json.decode(line, type=_Written)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            break
        # A torn line can be valid JSON.
        if not line.endswith(b"\n"):
            break
        lines, errors, size = lines + 1, errors + (written.error is not None), size + len(line)
        longer += written.tokens is not None
        if lines % chunk == 0:
            kept, end = (lines, errors, longer), size
    target.truncate(end)
    return kept


def _is_record(path: Path) -> bool:
    try:
        # Earlier versions had no more fields than these.
        return {"chunk", "input", "model"} <= msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).keys()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False


def _check_record(partial: Path, record: Path, identity: dict[str, Any]) -> None:
    if not record.is_file():
        raise UserError(
            f"{partial}: exists but its record {record.name} is missing, so it cannot be resumed; move or delete it"
        )
    begun = typed_json.read(record, dict[str, Any], fix=f"delete it and {partial} to start again", error=UserError)
    # The fields of both: another version may record more of them, or fewer.
    for name in identity | begun:
        if begun.get(name) != identity.get(name):
            raise UserError(
                f"{partial}: belongs to a run with another {name}; finish that run, name another output, or "
                f"delete {partial.name} to start again"
            )


def score_lines(scorer: Scorer, rows: Sequence[InputRow]) -> list[ScoredLine]:
    """Scores of rows, in order. A row that cannot be scored has an error."""
    results: list[ScoredLine] = []
    encoded, indices = [], []
    for row in rows:
        try:
            trajectory, origins = row.parse()
            encoded.append(_encode(scorer, trajectory, row.where))
            indices.append(len(results))
            last = encoded[-1]
            messages = np.asarray(origins)[last.message_indices]
            results.append(ScoredLine(row.number, trajectory=trajectory, messages=messages, tokens=len(last.tokens)))
        except (DataError, UserError) as error:
            results.append(ScoredLine(row.number, error=one_line(error)))
    # Names are for errors about the length, which `_encode` has checked.
    for index, promises in zip(indices, scorer.score_encoded(encoded, [""] * len(encoded)), strict=True):
        results[index] = results[index]._replace(promises=promises)
    return results


def _result(scored: ScoredLine, row: InputRow, source: Source) -> dict[str, Any]:
    """A line of the output file."""
    if scored.error is not None:
        return _failed(row, scored.error)
    result = {"id": scored.trajectory.id} | source.table(scored.messages, scored.promises)
    is_longer = source.trained_length is not None and scored.tokens > source.trained_length
    return result | {"tokens": scored.tokens} if is_longer else result


def _encode(scorer: Scorer, trajectory: Trajectory, where: str) -> Encoded:
    encoded = scorer.encoder.trajectory(trajectory.messages, row=where, tools=trajectory.tools)
    # Raises for a conversation that is too long. Here it costs one line; while scoring it would cost the chunk.
    bucket_of(len(encoded.tokens), where)
    return encoded


def _failed(row: InputRow, error: str) -> dict[str, Any]:
    try:
        id = None if isinstance(row.text, DataError) else msgspec.json.decode(row.text, type=dict[str, Any]).get("id")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        id = None
    # type() and not isinstance(): JSON's true is an int to Python.
    id = str(id) if type(id) is int else id
    identity = {"id": id} if isinstance(id, str) else {"id": None, "line": row.number}
    return identity | {"error": error}
