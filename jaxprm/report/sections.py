"""The data of each section of the page; the templates of the same names turn it into HTML.

Each function returns the variables of its template, or None where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from jaxprm.report import panels
from jaxprm.report.headline import headline, sample_words
from jaxprm.report.labels import ALIASES, METRICS, method_name, number, percent, plural, search_name, split_search
from jaxprm.report.page_figures import figure_data
from jaxprm.report.results import AGGREGATED, TREE_SEARCHES, Paired, ReportedEstimate, RunResults, is_number, size_key

AXIS_STEP = 0.2
# Half the width of an axis of differences: at least five points, so that tiny differences look tiny.
MIN_REACH = 0.05
MAX_PAIRS_IN_ONE_TABLE = 12
BASELINES = ("policy", "greedy", "random", "oracle")
MAX_FACT_LENGTH = 60
# What the numbers in a size count, for searches that share a table.
SIZES = {"diverse": "paths×actions", "lookahead": "paths×actions×steps", "mcts": "simulations×actions"}

Context = dict[str, Any]


class WayOfActing(NamedTuple):
    """A row of the headline's evidence: a method, the search it guides in words, and the tasks it solves."""

    label: str
    how: str
    success: ReportedEstimate


class Fact(NamedTuple):
    """A named text, and the exact number where the text is one."""

    name: str
    text: str
    value: float | None = None


def result(results: RunResults) -> Context | None:
    """The headline's evidence: one row for each way of acting, at the headline's beam size."""
    summary = headline(results)
    rows = list(_ways_of_acting(results, summary.size))
    if not rows:
        return None
    estimates = [row.success for row in rows]
    sampled = results.baseline("sampled")
    return {
        "rows": rows,
        "chosen": summary.label,
        "marks": _axis_marks(max(each.mean if each.high is None else each.high for each in estimates)),
        "reference": sampled and sampled.mean,
        "sample": sample_words(results, estimates),
    }


def _ways_of_acting(results: RunResults, size: str | None) -> Iterator[WayOfActing]:
    """From the least to the most help: the baselines, the beam searches, the oracle."""
    for label, key, how in (("policy", "sampled", "one sample"), ("greedy", "greedy", "temperature 0")):
        if success := results.baseline(key):
            yield WayOfActing(label, how, success)
    searched = [label for label in results.with_search("beam") if size and results.at(label, "beam", size)]
    # Random scores come first, as the control, and AgentPRM last; the sort keeps the others in the file's order.
    for label in sorted(searched, key=lambda each: (each != "random", each == "agentprm")):
        yield WayOfActing(label, search_name(f"beam {size}"), results.at(label, "beam", size))
    for count, success in list(results.oracle_curve().items())[-1:]:
        yield WayOfActing("oracle", f"any of {count} samples succeeds", success)


def _axis_marks(top: float) -> list[float]:
    limit = AXIS_STEP
    # The tolerance keeps a top of 0.6, which is below 3 * 0.2 in floating point, from adding an empty step.
    while limit < top - 1e-9:
        limit += AXIS_STEP
    return [limit * part / 4 for part in range(5)]


def beam(results: RunResults) -> Context | None:
    """Beam search: a figure, and a table of methods by sizes with what to compare them with."""
    panel = panels.beam_panel(results)
    if panel.empty:
        return None
    sizes = sorted({size for label in results.methods for size in results.curve(label, "beam")}, key=size_key)
    baselines = {"policy": results.baseline("sampled"), "greedy": results.baseline("greedy")}
    references = [(label, "", success) for label, success in baselines.items() if success]
    references += [("oracle", f"any of {n}", success) for n, success in list(results.oracle_curve().items())[-1:]]
    return {
        "figure": figure_data(results, [panel], "beam", titled=False),
        "sizes": sizes,
        "rows": [(label, [results.at(label, "beam", size) for size in sizes]) for label in results.with_search("beam")],
        "references": references,
    }


def scaling(results: RunResults) -> Context | None:
    """Success against the number of samples a method chooses from."""
    shown = panels.scaling_panels(results)
    if not shown:
        return None
    searches = [search for search in (*TREE_SEARCHES, *results.searches) if results.with_search(search)]
    tables = [
        _size_table(results, AGGREGATED, "Best of N by other scores of a trajectory than its final step's"),
        _size_table(results, searches, f"Other searches: {', '.join(_search_words(results, searches))}"),
    ]
    return {
        "figure": figure_data(results, shown, "scaling"),
        "has_oracle": bool(results.oracle_curve()),
        "tables": [table for table in tables if table],
    }


def _search_words(results: RunResults, searches: Sequence[str]) -> Iterator[str]:
    """Each search by its label, with what its sizes count; a search from outside the package also by its kind."""
    for search in dict.fromkeys(searches):
        words = search_name(f"{search} {SIZES.get(search, 'N')}", results.custom_labels)
        yield f"{words} ({search})" if search in results.searches else words


def _size_table(results: RunResults, searches: Sequence[str], caption: str) -> Context | None:
    """A row for each label and search that was measured, a column for each size."""
    curves = {(label, search): results.curve(label, search) for label in results.methods for search in searches}
    curves = {key: curve for key, curve in curves.items() if curve}
    if not curves:
        return None
    sizes = sorted({size for curve in curves.values() for size in curve}, key=size_key)
    rows = [
        {
            "label": label,
            "how": search.removeprefix("best_of_n_").replace("_", " "),
            "estimates": [curve.get(size) for size in sizes],
        }
        for (label, search), curve in curves.items()
    ]
    return {"caption": caption, "sizes": sizes, "rows": rows}


def pairs(results: RunResults) -> Context | None:
    """Paired differences with their interval on one axis: few in one table, many in one for each search."""
    measured = [pair for pair in results.paired if pair.mean is not None]
    if not measured:
        return None
    groups = [measured] if len(measured) <= MAX_PAIRS_IN_ONE_TABLE else _by_search(results, measured)
    custom = results.custom_labels
    return {"groups": [_pair_group(group, custom) for group in groups], "sample": sample_words(results, [])}


def _by_search(results: RunResults, measured: Sequence[Paired]) -> list[list[Paired]]:
    """The pairs of each search, the headline's search first."""
    groups: dict[tuple[str, str], list[Paired]] = {}
    for pair in measured:
        groups.setdefault(split_search(pair.at, results.searches), []).append(pair)
    headlined = ("beam", headline(results).size)
    return [groups[search] for search in sorted(groups, key=lambda search: search != headlined)]


def _pair_group(group: Sequence[Paired], custom: Mapping[str, str]) -> Context:
    bounds = [bound for pair in group for bound in (pair.mean, pair.low, pair.high) if bound is not None]
    return {
        "title": f"{search_name(group[0].at, custom)}: {plural(len(group), 'difference')}",
        "reach": max(MIN_REACH, *(abs(bound) for bound in bounds)),
        "pairs": [_pair_row(pair, custom) for pair in group],
    }


def _pair_row(pair: Paired, custom: Mapping[str, str]) -> Context:
    a, b = (ALIASES.get(side, side) for side in (pair.a, pair.b))
    against = method_name(b).lower() if b in BASELINES else method_name(b)
    return {"a": a, "against": against, "search": search_name(pair.at, custom), "estimate": pair.estimate}


def judgement(results: RunResults) -> Context | None:
    """Step values of successful against failed trajectories, AUROC by step, calibration, validation."""
    variants = (("succeeded", False), ("failed", True))
    context = {
        # Its panels are titled by method, so the legend need only tell the two lines of a panel apart.
        "values": figure_data(results, panels.value_panels(results), "values", labels=[], variants=variants),
        "auroc": figure_data(results, panels.auroc_panels(results), "auroc"),
        "calibration": figure_data(
            results, panels.non_empty([panels.calibration_panel(results)]), "calibration", titled=False
        ),
        "validation": _validation(results),
    }
    return context if any(context.values()) else None


def _validation(results: RunResults) -> Context | None:
    by_label = {label: values for label, values in results.validation.items() if isinstance(values, Mapping)}
    metrics = [metric for metric in METRICS if any(_estimate(values.get(metric)) for values in by_label.values())]
    if not metrics:
        return None
    return {
        # The same key is the training loss in a figure of training.
        "metrics": ["Loss" if metric == "loss" else METRICS[metric] for metric in metrics],
        "rows": [(label, [_estimate(values.get(metric)) for metric in metrics]) for label, values in by_label.items()],
    }


def _estimate(value: Any) -> ReportedEstimate | None:
    if is_number(value):
        return ReportedEstimate(float(value))
    if isinstance(value, Mapping) and is_number(value.get("mean")):
        return msgspec.convert({key: part for key, part in value.items() if is_number(part)}, ReportedEstimate)
    return None


def training(results: RunResults) -> Context | None:
    """Training curves and what the models were trained on."""
    context = {
        "figure": figure_data(results, panels.training_panels(results), "training"),
        "facts": list(_leaves(results.data)),
    }
    if not any(context.values()):
        return None
    seeds = max((len(runs) for runs in results.training.values()), default=0)
    return context | {"seeds": seeds, "max_points": panels.MAX_POINTS}


def _leaves(node: Any, path: str = "") -> Iterator[Fact]:
    """Every number and text in nested objects, named by its path; lists are left out."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path} · {key}" if path else str(key))
    elif is_number(node):
        is_rate = path.endswith("rate") and 0 <= node <= 1
        yield Fact(path, percent(node) if is_rate else number(node), node)
    elif isinstance(node, str):
        yield Fact(path, node)


def cost(results: RunResults) -> Context | None:
    """Tokens and environment steps spent, the time of each stage, and methods at equal cost."""
    compute = results.compute if isinstance(results.compute, Mapping) else {}
    parts = {part: float(value) for part, value in results.seconds.items() if is_number(value)}
    # train-agentprm-0, train-pvm-0 and the like are parts of the stage "train".
    stages: dict[str, float] = {}
    for part, value in parts.items():
        stage = part.split("-")[0]
        stages[stage] = stages.get(stage, 0.0) + value
    context = {
        "figure": figure_data(results, panels.non_empty([panels.compute_panel(results)]), "cost", titled=False),
        "stages": stages,
        "parts": parts,
        "counts": _counts(compute, results.custom_labels),
        "facts": [Fact(key, number(value), value) for key, value in compute.items() if is_number(value)],
        "equal": results.budget.equal,
        "needed": [row for row in results.budget.needed if row.mean is not None],
    }
    return context | {"custom": results.custom_labels} if any(context.values()) else None


def _counts(compute: Mapping[str, Any], custom: Mapping[str, str]) -> Context | None:
    """Counts by method and size, `compute["methods"]` in results.json; a count that is missing in a row is None."""
    counted = [(path, values) for path, values in _numbers_below(compute.get("methods"), ()) if path]
    if not counted:
        return None
    columns = list(dict.fromkeys(key for _, values in counted for key in values))
    rows = [
        {
            "label": label,
            "how": "one sample" if label == "policy" else search_name(" ".join(search), custom),
            "counts": [values.get(column) for column in columns],
        }
        for (label, *search), values in counted
    ]
    unit = compute.get("unit")
    return {
        "caption": f"Counts {unit}" if isinstance(unit, str) else "Counts",
        "columns": [column.replace("_", " ") for column in columns],
        "rows": rows,
    }


def _numbers_below(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Every object that holds numbers, however deep, with its path."""
    if not isinstance(node, Mapping):
        return
    if values := {key: value for key, value in node.items() if is_number(value)}:
        yield path, values
    for key, value in node.items():
        yield from _numbers_below(value, (*path, key))


def provenance(results: RunResults) -> Context | None:
    """Short facts at once; config, versions and fingerprints folded away."""
    if not results.provenance:
        return None
    entries = results.provenance if isinstance(results.provenance, Mapping) else {"provenance": results.provenance}
    short = {key: text for key, value in entries.items() if (text := _short_text(value)) is not None}
    return {
        "facts": [Fact(key, text) for key, text in short.items()],
        "folded": [(key, _pretty(value)) for key, value in entries.items() if key not in short],
    }


def _short_text(value: Any) -> str | None:
    if isinstance(value, list) and all(is_number(item) for item in value):
        return ", ".join(f"{item:g}" for item in value)
    if is_number(value):
        return f"{value:g}"
    return value if isinstance(value, str) and len(value) < MAX_FACT_LENGTH and "\n" not in value else None


def _pretty(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
