"""Imports the user's log into the work directory, once: after a disconnect the notebook uses the imported file."""

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

OURS = "jaxprm"  # the LOG_FORMAT of trajectories that need no import


def import_log(
    session: Session, work: Path, *, log: str, form: str, outcome_field: str, validation_share: float
) -> Path:
    """Imports a log as `work`/trajectories.jsonl and returns that path; does nothing if the file exists.

    log: a path; "upload", to ask for a file in Colab; or "", for the synthetic log of docs/first-hour.md.

    Raises Stop if the log is missing, if it cannot be imported, or if a log was imported with other settings before.
    """
    settings = {"log": log, "form": form, "outcome_field": outcome_field, "validation_share": validation_share}
    output, record = work / "trajectories.jsonl", work / "log.json"
    if output.exists():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        if differs := [name for name in settings if earlier[name] != settings[name]]:
            before, now = earlier[differs[0]], settings[differs[0]]
            raise Stop(f"{output} was imported with {differs[0]} = {before!r}, now {now!r}: use another WORKDIR")
        print(f"{output} exists and is used")
        return output
    # Before the import, so that every imported file has its settings.
    record.write_text(json.dumps(settings), encoding="utf-8")
    if form == OURS:
        _copy(_source(session.root, work, log), output)
        return output
    outcome_options = ["--outcome-field", outcome_field] if outcome_field else []
    session.jaxprm(
        "import-trajectories",
        "--format",
        form,
        "--input",
        _source(session.root, work, log),
        "--output",
        output,
        *outcome_options,
        "--split-by",
        "task",
        "--validation-share",
        validation_share,
    )
    return output


def show(trajectories: Path, scores: Path, *, tasks: int = 1) -> None:
    """Prints the scores of each step of the best and the worst attempt, for the first `tasks` tasks with both."""
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
                action = _one_line(rows[index]["messages"][step["message"]])
                print(f"  promise {step['promise']:6.3f}  progress {progress:>6}  {action[:80]}")
        tasks -= 1
        if not tasks:
            return
    print("no task has attempts of different outcomes")


def secret(name: str) -> str:
    """Value of an environment variable or, if that is empty, of a secret in Colab. Raises Stop if both are missing."""
    value = os.environ.get(name, "")
    if not value and on_colab():
        from google.colab import userdata

        try:
            value = userdata.get(name) or ""
        except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
            value = ""
    if not value:
        raise Stop(
            f"secret {name} is missing or closed to this notebook: add or allow it under Secrets (the key symbol)"
        )
    return value


def first(source: Path, output: Path, count: int) -> Path:
    """Copies the first `count` lines of a file; returns the copy."""
    output.write_text("".join(_lines(source)[:count]), encoding="utf-8")
    return output


def _source(root: Path, work: Path, log: str) -> Path:
    synthetic = work / "log.jsonl"
    if log == "":
        _write_synthetic(root, synthetic)
        return synthetic
    if log == "upload":
        return _uploaded()
    if not Path(log).is_file():
        raise Stop(f"LOG {log}: no such file; set it to a path, to upload, or to nothing for a synthetic log")
    return Path(log)


def _write_synthetic(root: Path, output: Path) -> None:
    page = (root / "docs" / "first-hour.md").read_text(encoding="utf-8")
    script = re.search(r"^```python make_log\.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
        _copy(Path(folder, "log.jsonl"), output)


def _uploaded() -> Path:
    if not on_colab():
        raise Stop("LOG is upload, which works only in Colab: set it to a path")
    from google.colab import files

    names = list(files.upload())
    if len(names) != 1:
        raise Stop(f"LOG is upload: select one file, not {len(names)}; run this cell again")
    return Path(names[0])


def _copy(source: Path, output: Path) -> None:
    """Copies a file. If the notebook is interrupted, the copy is complete or absent."""
    with source.open("rb") as file, staged_file(output, overwrite=True) as staged:
        shutil.copyfileobj(file, staged)


def _lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _one_line(message: dict) -> str:
    """An assistant message in one line."""
    if calls := message.get("tool_calls"):
        return ", ".join(f"{call['function']['name']}({call['function']['arguments']})" for call in calls)
    return " ".join(str(message.get("content")).split())
