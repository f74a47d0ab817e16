"""From the user's log to trajectories in the work directory, once: a notebook that comes back finds them there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.output import staged_file
from notebooks.colab import Session, Stop, on_colab

OURS = "jaxprm"  # a LOG_FORMAT: trajectories already


def take(session: Session, work: Path, *, log: str, form: str, outcome_field: str, validation_share: float) -> Path:
    """Imports a log as `work`/trajectories.jsonl; returns that file, at once where it is there.

    log: a path; "upload", to be asked for a file by Colab; or "", for the made-up log of docs/first-hour.md.

    Raises Stop where there is no such log, where it cannot be imported, and where another one was imported before.
    """
    asked = {"log": log, "form": form, "outcome_field": outcome_field, "validation_share": validation_share}
    output, record = work / "trajectories.jsonl", work / "log.json"
    if output.exists():
        taken = json.loads(record.read_text(encoding="utf-8"))
        if differs := [name for name in asked if taken[name] != asked[name]]:
            was, now = taken[differs[0]], asked[differs[0]]
            raise Stop(f"{output} was made with {differs[0]} = {was!r}, now {now!r}: take another WORKDIR")
        print(f"{output} is there, and used")
        return output
    record.write_text(json.dumps(asked), encoding="utf-8")
    if form == OURS:
        _copy(_source(session.root, work, log), output)
        return output
    given = ["--outcome-field", outcome_field] if outcome_field else []
    session.jaxprm(
        "import-trajectories",
        "--format",
        form,
        "--input",
        _source(session.root, work, log),
        "--output",
        output,
        *given,
        "--split-by",
        "task",
        "--validation-share",
        validation_share,
    )
    return output


def show(trajectories: Path, scores: Path, *, tasks: int = 1) -> None:
    """Prints the scores of a task's best and worst attempt, step by step, for the first tasks that have both."""
    rows = [json.loads(line) for line in _lines(trajectories)]
    scored = [json.loads(line) for line in _lines(scores)]
    attempts: dict[str, list[int]] = {}
    for index, (row, score) in enumerate(zip(rows, scored, strict=True)):
        if row.get("outcome") is not None and "steps" in score:
            attempts.setdefault(row.get("task") or row["id"], []).append(index)
    for indices in attempts.values():
        order = sorted(indices, key=lambda index: rows[index]["outcome"])
        if rows[order[0]]["outcome"] == rows[order[-1]]["outcome"]:
            continue
        for index in (order[-1], order[0]):
            print(f"{rows[index]['id']}, outcome {rows[index]['outcome']:g}")
            for step in scored[index]["steps"]:
                progress = "" if step["progress"] is None else f"{step['progress']:+.3f}"
                said = _said(rows[index]["messages"][step["message"]])
                print(f"  promise {step['promise']:6.3f}  progress {progress:>6}  {said[:80]}")
        tasks -= 1
        if not tasks:
            return
    print("no task has attempts of different outcomes")


def secret(name: str) -> str:
    """A secret of Colab's key symbol, or a variable of the environment. Raises Stop where it is neither."""
    value = os.environ.get(name, "")
    if not value and on_colab():
        from google.colab import userdata

        try:
            value = userdata.get(name) or ""
        except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
            value = ""
    if not value:
        raise Stop(f"no secret {name} that this notebook may read: add it, or allow it, under Secrets (the key symbol)")
    return value


def first(source: Path, output: Path, count: int) -> Path:
    """The first lines of a file, as another one."""
    output.write_text("".join(_lines(source)[:count]), encoding="utf-8")
    return output


def _source(root: Path, work: Path, log: str) -> Path:
    kept = work / "log.jsonl"
    if log == "":
        _made_up(root, kept)
        return kept
    if log == "upload":
        return _uploaded()
    if not Path(log).is_file():
        raise Stop(f"LOG {log}: no such file; give a path, upload, or nothing for a made-up log")
    return Path(log)


def _made_up(root: Path, output: Path) -> None:
    page = (root / "docs" / "first-hour.md").read_text(encoding="utf-8")
    script = re.search(r"^```python make_log\.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
        _copy(Path(folder, "log.jsonl"), output)


def _uploaded() -> Path:
    if not on_colab():
        raise Stop("LOG is upload, which only Colab can do: give a path")
    from google.colab import files

    names = list(files.upload())
    if len(names) != 1:
        raise Stop(f"LOG is upload: one file is wanted, got {len(names)}; run this cell again")
    return Path(names[0])


def _copy(source: Path, output: Path) -> None:
    """Copies a file; also where the notebook is cut off in the middle, the copy is complete or absent."""
    with source.open("rb") as file, staged_file(output, overwrite=True) as copy:
        shutil.copyfileobj(file, copy)


def _lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _said(message: dict) -> str:
    """An assistant message in one line."""
    if calls := message.get("tool_calls"):
        return ", ".join(f"{call['function']['name']}({call['function']['arguments']})" for call in calls)
    return " ".join(str(message.get("content")).split())
