"""Tables for the terminal: the results of a run, and the report of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprm import files
from jaxprm.evaluation.labels import KINDS
from jaxprm.evaluation.step_metrics import threshold_of

SHOWN_DEPTHS, SHOWN_ERRORS = 12, 5

# Columns of the table of a run, in this order: {kind of search: title of a size}.
_SEARCHES = {
    "beam": "beam {}",
    "stepwise": "best of {} steps",
    "prefix_best_of_n": "best of {} prefixes",
    "best_of_n": "best of {}",
}
_LARGEST_ONLY = ("prefix_best_of_n", "best_of_n")

# Columns of the tables of `evaluate`.
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
_FIRST_ERRORS = ("first_error_accuracy", "f1", "accuracy_on_erroneous", "accuracy_on_correct", "argmin_accuracy")
_BY_DEPTH = ("success", "failure", "auroc", "auroc_within_task", "calibration_error")
_CHOICES = ("random", "final", "mean", "min", "oracle", "gain")
# Shares and AUROCs are shown in per cent, these as they are.
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


def results_table(path: Path) -> str:
    """Success of every method, mean and 95 % interval, from a results.json."""
    results = files.read_json(path)
    methods = results["methods"]
    columns = []
    for kind in _SEARCHES:
        sizes = list(dict.fromkeys(size for numbers in methods.values() for size in numbers.get(kind, {})))
        columns += [(kind, size) for size in (sizes[-1:] if kind in _LARGEST_ONLY else sizes)]
    rows = [["success, %", *(_SEARCHES[kind].format(size) for kind, size in columns)]]
    for label, numbers in methods.items():
        rows.append([label, *(_cell(numbers.get(kind, {}).get(size)) for kind, size in columns)])
    policy = results["policy"]
    pool_size, oracle = list(results["oracle"].items())[-1]
    lines = [*_grid(rows), "", f"plain policy {_cell(policy['sampled'])}   greedy {_cell(policy['greedy'])}"]
    lines.append(f"any of {pool_size} samples succeeds {_cell(oracle)}")
    return "\n".join(lines)


def evaluation_table(report: Mapping[str, Any]) -> str:
    """The part of a report of `evaluate` that fits a terminal; --json has all of it."""
    # After a first error the steps are right or wrong, and nobody says which.
    by_depth = report["labels"] is None or report["labels"]["kind"] != "first-error"
    lines = [*_head(report), *_sections(report, report, by_depth=by_depth)]
    if not by_depth and report["outcomes"] is not None:
        lines += ["", "No tables by step: steps after the first error have no label"]
    for name, group in report["groups"].items():
        counts = group["counts"]
        lines += ["", f"== {name}: {counts['trajectories']} trajectories of {counts['tasks']} tasks"]
        lines += _sections(group, report, by_depth=False)
    if report["paired"]:
        rows = [["a - b", "", "difference"]]
        rows += [
            [f"{pair['a']} - {pair['b']}", _title(pair["metric"]), _estimate(pair, pair["metric"])]
            for pair in report["paired"]
        ]
        lines += ["", "Paired by task", *_grid(rows)]
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
    for model in report.get("models", ()):
        if model["longer"]:
            yield (
                f"{model['name']}: {model['longer']} trajectories are longer than all of its training "
                f"({model['trained_length']} tokens), the longest has {model['longest']}"
            )
    if source["errors"]:
        yield f"{source['errors']} of {source['lines']} lines could not be used:"
        yield from (f"  {error}" for error in source["examples"][:SHOWN_ERRORS])
        if source["errors"] > SHOWN_ERRORS:
            yield f"  ... and {source['errors'] - SHOWN_ERRORS} more"


def _sections(part: Mapping[str, Any], report: Mapping[str, Any], *, by_depth: bool) -> Iterator[str]:
    """Outcomes and step labels of the whole report, or of a group."""
    if part["outcomes"] is not None:
        yield from _outcomes(part["outcomes"], by_depth=by_depth)
    if part["step_labels"] is not None:
        yield from _step_labels(part["step_labels"], report["labels"])


def _outcomes(part: Mapping[str, Any], *, by_depth: bool) -> Iterator[str]:
    rows = {name: numbers["summary"] for name, numbers in part["models"].items()}
    rows |= {_title(name): numbers for name, numbers in part["baselines"].items()}
    yield from ["", "Against outcomes, over all steps"]
    yield from _estimates("", rows, _OUTCOMES)
    for name, numbers in part["models"].items():
        if numbers["best_of_n"]:
            yield from ["", f"Best of n attempts at a task, outcome in %: {name}"]
            rows = {f"{row['n']} ({row['random']['n']} tasks)": row for row in numbers["best_of_n"]}
            yield from _estimates("n", rows, _CHOICES)
        tables = (("step", "by_depth"), ("quarter", "by_relative_depth")) if by_depth else ()
        for title, key in tables:
            rows = {str(row.get("depth", row.get("quarter"))): row for row in numbers[key][:SHOWN_DEPTHS]}
            yield from ["", f"By {title} of the trajectory: {name}"]
            yield from _estimates(title, rows, [column for column in _BY_DEPTH if column in numbers[key][0]])
            if len(numbers[key]) > SHOWN_DEPTHS:
                yield f"... and {len(numbers[key]) - SHOWN_DEPTHS} more, see --json"
        # Groups have none, nor do values that are no expected outcomes.
        if not numbers.get("calibration"):
            continue
        yield from ["", f"Calibration: {name}"]
        bins = [["mean promise", "mean outcome"]]
        bins += [
            [f"{row['predicted']:.3f}", _cell(row["observed"], scale=1, digits=3)] for row in numbers["calibration"]
        ]
        yield from _grid(bins)


def _step_labels(part: Mapping[str, Any], labels: Mapping[str, Any]) -> Iterator[str]:
    validation, test = labels["parts"]["validation"], labels["parts"]["test"]
    how = f"thresholds from {validation['tasks']} tasks, numbers from {test['tasks']} others"
    if labels["kind"] == "soft":
        how = f"{test['tasks']} tasks"
    elif labels["threshold"] is not None:
        how = f"wrong is a promise below {labels['threshold']:g}; {test['tasks']} tasks"
    yield from ["", f"Against {labels['field']} ({labels['kind']}: {KINDS[labels['kind']]}); {how}"]
    rows = {
        f"{name}, {criterion}": numbers
        for name, criteria in part["models"].items()
        for criterion, numbers in criteria.items()
    }
    rows |= {_title(name): numbers for name, numbers in part["baselines"].items()}
    metrics = {name: numbers["metrics"] for name, numbers in rows.items()}
    present = lambda columns: [column for column in columns if any(column in row for row in metrics.values())]
    yield from _estimates("steps", metrics, present(_STEPS))
    if labels["kind"] != "soft":
        thresholds = [threshold_of("accuracy_on_erroneous", numbers["thresholds"]) for numbers in rows.values()]
        # Two more lines for the header and the line under it.
        column = ["threshold", "", *("-" if value is None else f"{value:.4g}" for value in thresholds)]
        lines = _estimates("first errors", metrics, present(_FIRST_ERRORS))
        width = max(map(len, lines))
        yield ""
        yield from (f"{line.ljust(width)}  {value}".rstrip() for line, value in zip(lines, column, strict=True))


def _estimates(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    header = [corner, *(_title(column) for column in columns)]
    return _grid([header, *([name, *(_estimate(row.get(key), key) for key in columns)] for name, row in rows.items())])


def _estimate(estimate: dict | None, metric: str) -> str:
    # Metrics of a pair are named "promise mse".
    plain = metric.rpartition(" ")[2] in _PLAIN
    return _cell(estimate, scale=1, digits=3) if plain else _cell(estimate)


def _title(name: str) -> str:
    return name.replace("_", " ").replace("auroc", "AUROC").replace("f1", "F1")


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first row is the header."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _cell(estimate: dict | None, *, scale: float = 100, digits: int = 1) -> str:
    """Mean and interval, by default in per cent; "-" where it is not defined."""
    if estimate is None or estimate["mean"] is None:
        return "-"
    mean, low, high = (f"{scale * estimate[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
