"""Runs a verb on a broken file and says what became of it: an error of one line, the same output, or a fault."""

from __future__ import annotations

import io
import json
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 30  # for one input; a healthy one takes less than one, and seconds if it compiles
MAX_LINE = 1200


class Hang(BaseException):
    """The time of an input is over. No Exception, so that no `except Exception` of the program hides it."""


class Result(NamedTuple):
    """What a verb did. output: None if it raised or ended with status 2; then `line` is what it said."""

    output: Any = None
    line: str = ""
    fault: str = ""


@dataclass
class Counts:
    """Outcomes of many inputs, and the faults with the input that caused each."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        keys = ("rejected", "survived", "tracebacks", "hangs", "unclear lines", "silent differences")
        return ", ".join(f"{key} {self.outcomes[key]}" for key in keys)

    def add(self, where: str, result: Result, baseline: Any, reason: Callable[[], str | None], names: tuple) -> None:
        """Counts a result.

        Args:
            reason: why an output may differ from that of the unmutated file; None if there is no reason.
            names: an error must hold one of them.
        """
        if result.fault:
            kind = "hangs" if result.fault == "hang" else "tracebacks"
        elif result.output is None:
            kind = "rejected" if _clear(result.line, names) else "unclear lines"
        elif result.output == baseline:
            kind = "survived"
        elif why := "bad rows are reported" if _reports_bad_rows(result.output) else reason():
            kind, self.reasons = "survived", self.reasons + Counter([why])
        else:
            kind = "silent differences"
        self.outcomes[kind] += 1
        if kind not in ("rejected", "survived"):
            said = result.fault or result.line or str(result.output)[:200]
            self.faults.append(f"{kind}: {where}: {said[:1500]}")


def _reports_bad_rows(output: Any) -> bool:
    """Whether a verb ended with status 1, the first part of its output."""
    return isinstance(output, tuple) and output[0] == 1


def _clear(line: str, names: tuple[str, ...]) -> bool:
    printable = line.isprintable()
    return bool(line) and printable and len(line) <= MAX_LINE and any(name in line for name in names)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(verb: Callable[[Path], Any], directory: Path, seconds: float = SECONDS) -> Result:
    """The result of a verb, a function of the directory with its files.

    A verb returns its output, which must not be None, or raises what the command line would.
    """
    from jaxprm.cli import _one_line

    out, err = io.StringIO(), io.StringIO()
    try:
        with time_limit(seconds), redirect_stdout(out), redirect_stderr(err):
            output = verb(directory)
    except Hang:
        return Result(fault="hang")
    except SystemExit as error:
        return Result(fault=f"SystemExit: {error.code}")
    # Rust's panics are no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        line = _one_line(error) if isinstance(error, Exception) else None
        if line is None:
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
            return Result(fault=f"{type(error).__name__}: {str(error)[:200]} at {places}")
        return Result(line=line)
    return Result(output=output)


def command(*arguments: Any) -> Callable[[], int]:
    """Calls a verb of the command line without its last net: user errors are raised, and status 0 or 1 returned."""
    from jaxprm.arguments import parse
    from jaxprm.cli import VERBS

    def call() -> int:
        options = parse([str(argument) for argument in arguments])
        return VERBS[options.verb](options)

    return call


def changes(before: Any, after: Any, where: str = "$") -> Iterator[tuple[str, str]]:
    """(path, kind) of every difference of two JSON documents; the kinds are missing, extra, type and value."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            path = f"{where}.{name}"
            if name not in after:
                yield path, "missing"
            elif name not in before:
                yield path, "extra"
            else:
                yield from changes(before[name], after[name], path)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield where, "value"
        for index, pair in enumerate(zip(before, after, strict=False)):
            yield from changes(*pair, f"{where}[{index}]")
    elif _kind(before) != _kind(after):
        # A null does not show which type the field has.
        yield where, "missing" if after is None else "value" if before is None else "type"
    elif before != after:
        yield where, "value"


def _kind(value: Any) -> type:
    return float if type(value) in (int, float) else type(value)


def json_reason(before: bytes, after: bytes) -> str | None:
    """Why a changed JSON file may change the output: another value of the same type, or a field that is missing."""

    def unique(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("repeated")
        return dict(pairs)

    try:
        document = json.loads(after, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    kinds = {kind for _, kind in changes(json.loads(before), document)}
    for kind, words in (("value", "another valid value"), ("missing", "a default in place of a missing field")):
        if kind in kinds:
            return words
    return None
