"""Results of a run and of `evaluate` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprm import files
from jaxprm.evaluation.labels import KINDS


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


SHOWN_DEPTHS, SHOWN_ERRORS = 12, 5

_OUTCOMES = ("auroc", "auroc_within_task", "explained_variance", "mse", "brier", "calibration_error")
_STEPS = (
    "step_accuracy",
    "balanced_accuracy",
    "ternary_accuracy",
    "auroc",
    "auroc_within_task",
    "correlation",
    "rank_correlation",
    "mse",
)
_FIRST_ERRORS = ("first_error_accuracy", "f1", "accuracy_on_erroneous", "accuracy_on_correct")
_BY_DEPTH = ("success", "failure", "auroc", "auroc_within_task", "calibration_error")
_CHOICES = ("random", "final", "mean", "min", "oracle", "gain")
# Shares and AUROCs are shown in per cent, everything else as it is.
_PLAIN = {
    "explained_variance",
    "mse",
    "brier",
    "calibration_error",
    "correlation",
    "rank_correlation",
    "success",
    "failure",
}


def judge_table(report: Mapping[str, Any]) -> str:
    """Everything that fits a terminal; the rest is in the JSON."""
    lines = [*_head(report), *_sections(report, report, by_depth=True)]
    for name, group in report["groups"].items():
        counts = group["counts"]
        lines += ["", f"== {name}: {counts['trajectories']} trajectories of {counts['tasks']} tasks"]
        lines += _sections(group, report, by_depth=False)
    if report["paired"]:
        rows = [["a - b", "", "difference"]]
        rows += [
            [f"{one['a']} - {one['b']}", _title(one["metric"]), _shown(one, one["metric"])] for one in report["paired"]
        ]
        lines += ["", "Paired by task", *grid(rows)]
    return "\n".join(lines)


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    source, counts = report["input"], report["counts"]
    yield (
        f"{source.get('file', 'input')}: {counts['trajectories']} trajectories of {counts['tasks']} tasks, "
        f"{counts['steps']} steps; {counts['with_outcome']} with an outcome, {counts['with_labels']} with step labels"
    )
    if counts["ended_in_error"]:
        yield f"{counts['ended_in_error']} ended in an error: not compared with their outcome"
    if counts["null_labels"]:
        yield f"{counts['null_labels']} steps of labelled trajectories have no label: ignored"
    if source["errors"]:
        yield f"{source['errors']} of {source['lines']} lines could not be used:"
        yield from (f"  {error}" for error in source["examples"][:SHOWN_ERRORS])
        if source["errors"] > SHOWN_ERRORS:
            yield f"  ... and {source['errors'] - SHOWN_ERRORS} more"


def _sections(part: Mapping[str, Any], report: Mapping[str, Any], *, by_depth: bool) -> Iterator[str]:
    if part["outcomes"] is not None:
        yield from _outcomes(part["outcomes"], by_depth=by_depth)
    if part["step_labels"] is not None:
        yield from _labels(part["step_labels"], report["labels"])


def _outcomes(found: Mapping[str, Any], *, by_depth: bool) -> Iterator[str]:
    rows = {name: one["summary"] for name, one in found["models"].items()}
    rows |= {_title(name): one for name, one in found["baselines"].items()}
    yield from ["", "Against outcomes, over all steps"]
    yield from _estimates("", rows, _OUTCOMES)
    for name, one in found["models"].items():
        if one["best_of_n"]:
            yield from ["", f"Best of n attempts at a task, outcome in %: {name}"]
            rows = {f"{row['n']} ({row['random']['n']} tasks)": row for row in one["best_of_n"]}
            yield from _estimates("n", rows, _CHOICES)
        if not by_depth:
            continue
        for title, key in (("step", "by_depth"), ("quarter", "by_relative_depth")):
            rows = {str(row.get("depth", row.get("quarter"))): row for row in one[key][:SHOWN_DEPTHS]}
            yield from ["", f"By {title} of the trajectory: {name}"]
            yield from _estimates(title, rows, [column for column in _BY_DEPTH if column in one[key][0]])
            if len(one[key]) > SHOWN_DEPTHS:
                yield f"... and {len(one[key]) - SHOWN_DEPTHS} more, see --json"
        yield from ["", f"Calibration: {name}"]
        bins = [["mean promise", "mean outcome"]]
        bins += [[f"{row['predicted']:.3f}", cell(row["observed"], scale=1, digits=3)] for row in one["calibration"]]
        yield from grid(bins)


def _labels(found: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[str]:
    validation, test = about["parts"]["validation"], about["parts"]["test"]
    how = f"thresholds from {validation['tasks']} tasks, numbers from {test['tasks']} others"
    if about["kind"] == "soft":
        how = f"{test['tasks']} tasks"
    elif about["threshold"] is not None:
        how = f"wrong is a promise below {about['threshold']:g}; {test['tasks']} tasks"
    yield from ["", f"Against {about['field']} ({about['kind']}: {KINDS[about['kind']]}); {how}"]
    rows = {
        f"{name}, {criterion}": one for name, criteria in found["models"].items() for criterion, one in criteria.items()
    }
    rows |= {_title(name): one for name, one in found["baselines"].items()}
    metrics = {name: one["metrics"] for name, one in rows.items()}
    held = lambda columns: [column for column in columns if any(column in one for one in metrics.values())]
    yield from _estimates("steps", metrics, held(_STEPS))
    if about["kind"] != "soft":
        thresholds = ["threshold", "", *(_number(one["thresholds"].get("f1")) for one in rows.values())]
        lines = _estimates("first errors", metrics, held(_FIRST_ERRORS))
        width = max(map(len, lines))
        yield ""
        yield from (f"{line.ljust(width)}  {one}".rstrip() for line, one in zip(lines, thresholds, strict=True))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _estimates(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    header = [corner, *(_title(column) for column in columns)]
    return grid([header, *([name, *(_shown(row.get(one), one) for one in columns)] for name, row in rows.items())])


def _shown(estimate: dict | None, metric: str) -> str:
    plain = metric.rpartition(" ")[2] in _PLAIN
    return cell(estimate, scale=1, digits=3) if plain else cell(estimate)


def _title(name: str) -> str:
    return name.replace("_", " ").replace("auroc", "AUROC").replace("f1", "F1")
