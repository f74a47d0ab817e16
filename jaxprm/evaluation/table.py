"""The results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxprm import files


def results_table(path: Path) -> str:
    """Success of every method, mean and 95 % interval, from a results.json."""
    results = files.read_json(path)
    methods = results["methods"]
    columns = [("beam", name) for name in _names(methods, "beam")]
    columns += [("stepwise", name) for name in _names(methods, "stepwise")]
    columns += [(kind, names[-1]) for kind in ("prefix_best_of_n", "best_of_n") if (names := _names(methods, kind))]
    titles = {
        "beam": "beam {}",
        "stepwise": "best of {} steps",
        "prefix_best_of_n": "best of {} prefixes",
        "best_of_n": "best of {}",
    }
    header = ["success, %", *(titles[kind].format(name) for kind, name in columns)]
    rows = [header]
    for label, found in methods.items():
        rows.append([label, *(cell(found.get(kind, {}).get(name)) for kind, name in columns)])
    lines = grid(rows)
    policy = results["policy"]
    oracle = list(results["oracle"].items())[-1]
    lines += ["", f"plain policy {cell(policy['sampled'])}   greedy {cell(policy['greedy'])}"]
    lines += [f"any of {oracle[0]} samples succeeds {cell(oracle[1])}"]
    return "\n".join(lines)


def _names(methods: dict, kind: str) -> list[str]:
    return list(dict.fromkeys(name for found in methods.values() for name in found.get(kind, {})))


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first row is the header."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(one.ljust(width) for one, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def cell(estimate: dict | None, *, scale: float = 100, digits: int = 1) -> str:
    """Mean and interval, in per cent unless told otherwise."""
    if estimate is None or estimate["mean"] is None:
        return "-"
    mean, low, high = (f"{scale * estimate[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
