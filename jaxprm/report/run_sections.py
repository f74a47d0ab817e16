"""What the run cost, and everything needed to make it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec

from jaxprm.report import html, panels
from jaxprm.report.blocks import BAND, figure, level_words, panel_sample, section, side
from jaxprm.report.labels import duration, search_name
from jaxprm.report.results import Budget, RunResults, is_number

FOLD_ROWS = 10
SHORT_TEXT = 60


def cost(results: RunResults) -> str:
    """Tokens and environment steps spent, and the time of each stage."""
    spent = panels.present([panels.compute_panel(results)])
    drawn = ""
    if spent:
        words = (
            "Beam search, small to large, against the tokens it read and wrote. "
            f"Bands and bars: {BAND}{panel_sample(results, spent)}.{level_words(results)}"
        )
        drawn = figure(spent, "cost", words, titled=False)
    body = side(drawn, _seconds_table(results.seconds)) + _compute_table(results.compute, results.custom_labels)
    body += _equal_table(results.budget, results.custom_labels) + _needed_table(results.budget)
    return section("cost", "What it cost", "Counted, not estimated.", body) if body else ""


def _equal_table(budget: Budget, custom: Mapping[str, str]) -> str:
    """Each search beside the best-of-N that costs as much, in tokens, and in FLOPs where they differ from those."""
    rows = [
        [
            f'{html.method(row.label)} <span class="how">{escape(search_name(row.at, custom))}</span>',
            row.unit,
            html.data(row.n, f"{'more than ' if row.capped else ''}{row.n:.1f}"),
            html.share(row.searched),
            html.share(row.best_of_n),
            html.difference(row.difference),
        ]
        for row in budget.equal
    ]
    if not rows:
        return ""
    heads = ["Search", "Equal", "Pays for best of", "Search", "Best of N", "Difference"]
    table = html.table(heads, rows, caption="Searches against best-of-N by the final step, at equal cost")
    return html.fold(f"At equal budgets, {len(rows)} comparisons", table) if len(rows) > FOLD_ROWS else table


def _needed_table(budget: Budget) -> str:
    rows = []
    for row in budget.needed:
        if row.mean is None:
            continue
        ratio = html.data(row.mean, f"{row.mean:.2f}" if row.mean else "does not")
        if row.low is not None and row.high is not None:
            ratio += f' <span class="interval">[{row.low:.2f}, {row.high:.2f}]</span>'
        rows.append([html.method(row.a), f"{html.method(row.b)} best of {row.at}", ratio])
    caption = "How many times less budget best-of-N needs to reach another's score; 0 where it does not in the pool"
    return html.table(["Best of N by", "reaches", "at a budget smaller by"], rows, caption=caption) if rows else ""


def _compute_table(compute: Any, custom: Mapping[str, str]) -> str:
    """Counts by method and size, `compute["methods"]` in results.json; what else is a number there as facts."""
    if not isinstance(compute, Mapping):
        return ""
    facts = html.facts((key, html.count(value)) for key, value in compute.items() if is_number(value))
    counted = [(path, values) for path, values in _counts(compute.get("methods"), ()) if path]
    if not counted:
        return facts
    columns = list(dict.fromkeys(key for _, values in counted for key in values))
    heads = ["Spent by", *(escape(column.replace("_", " ")) for column in columns)]
    rows = []
    for (label, *search), values in counted:
        cells = [html.count(values[column]) if column in values else html.NOT_MEASURED for column in columns]
        how = "one sample" if label == "policy" else search_name(" ".join(search), custom)
        rows.append([f'{html.method(label)} <span class="how">{escape(how)}</span>', *cells])
    unit = compute.get("unit")
    caption = f"Counts {unit}" if isinstance(unit, str) else "Counts"
    counts = html.table(heads, rows, caption=caption)
    if len(rows) > FOLD_ROWS:
        counts = html.fold(f"{caption}, for {len(rows)} ways of acting", counts)
    return counts + facts


def _counts(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Every object with numbers in it, however deep, with its path."""
    if not isinstance(node, Mapping):
        return
    if values := {key: value for key, value in node.items() if is_number(value)}:
        yield path, values
    for key, value in node.items():
        yield from _counts(value, (*path, key))


def _seconds_table(seconds: Mapping[str, Any]) -> str:
    """Time by kind of stage ("train" holds train-agentprm-0 and the like), and every stage on demand."""
    stages = {stage: float(value) for stage, value in seconds.items() if is_number(value)}
    if not stages:
        return ""
    kinds: dict[str, float] = {}
    for stage, value in stages.items():
        kind = stage.split("-")[0]
        kinds[kind] = kinds.get(kind, 0.0) + value
    body = _bars(kinds, "Wall-clock time of each stage.")
    if len(kinds) < len(stages):
        body += html.fold(f"All {len(stages)} parts", _bars(stages, "Wall-clock time of each part."))
    return body


def _bars(seconds: Mapping[str, float], caption: str) -> str:
    longest = max(seconds.values()) or 1.0
    rows = [
        [escape(stage.replace("_", " ")), html.bar(value / longest), html.data(value, duration(value))]
        for stage, value in seconds.items()
    ]
    total = sum(seconds.values())
    rows.append(["together", "", html.data(total, duration(total))])
    return html.table(["Stage", "", "Time"], rows, caption=caption, numeric_from=2)


def provenance(results: RunResults) -> str:
    """Short facts at once; config, versions and fingerprints folded away."""
    if not results.provenance:
        return ""
    found = results.provenance if isinstance(results.provenance, Mapping) else {"provenance": results.provenance}
    short = {key: text for key, value in found.items() if (text := _short(value)) is not None}
    folded = "".join(
        f"<details><summary>{escape(str(key))}</summary><pre>{escape(_pretty(value))}</pre></details>"
        for key, value in found.items()
        if key not in short
    )
    body = html.facts((key, escape(text)) for key, text in short.items()) + f'<div class="provenance">{folded}</div>'
    return section("provenance", "Provenance", "Everything needed to make these numbers again.", body)


def _short(value: Any) -> str | None:
    if isinstance(value, list) and all(is_number(item) for item in value):
        return ", ".join(f"{item:g}" for item in value)
    if is_number(value):
        return f"{value:g}"
    return value if isinstance(value, str) and len(value) < SHORT_TEXT and "\n" not in value else None


def _pretty(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
