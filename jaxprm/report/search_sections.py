"""What guided search achieved: the headline's evidence, beam search, scaling, paired differences.

Each function returns its HTML, or an empty string where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from jaxprm.report import html, panels
from jaxprm.report.blocks import BAND, figure, level_words, panel_sample, sample_words, section, side
from jaxprm.report.headline import headline
from jaxprm.report.labels import ALIASES, look, name, plural, search_name, size_name, split_search
from jaxprm.report.results import AGGREGATED, TREE_SEARCHES, Paired, ReportedEstimate, RunResults, size_key

AXIS_STEP = 0.2
MIN_REACH = 0.05
ONE_TABLE = 12
BASELINES = ("policy", "greedy", "random", "oracle")


def result(results: RunResults) -> str:
    """The headline's evidence: one row per way of acting, on one axis, at the headline's beam size."""
    summary = headline(results)
    rows = list(_ways(results, summary.size))
    if not rows:
        return ""
    marks = _axis_marks(max(value.mean if value.high is None else value.high for _, _, value in rows))
    plain = results.baseline("sampled")
    body = "".join(
        f'<tr{" class=chosen" if label == summary.label else ""}><th scope="row">{html.method(label)}'
        f'<span class="how">{escape(how)}</span></th>'
        f"<td>{html.track(value, look(label), marks[0], marks[-1], marks=marks, reference=plain and plain.mean)}</td>"
        f'<td class="number">{html.share(value)}</td></tr>'
        for label, how, value in rows
    )
    sample = sample_words(results, [value for _, _, value in rows])
    caption = f"Share of held-out tasks solved{sample}. The bar is the {BAND}."
    if plain:
        caption += " The dashed line is the plain policy."
    if any(label == "random" for label, _, _ in rows):
        caption += " Random scores show what the same search does without judgement."
    return (
        f'<figure class="ladder"><table aria-label="Tasks solved by each way of acting"><tbody>{body}</tbody>'
        f'<tfoot aria-hidden="true"><tr><td></td><td>{html.axis(marks)}</td><td></td></tr></tfoot></table>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _ways(results: RunResults, size: str | None) -> Iterator[tuple[str, str, ReportedEstimate]]:
    """(label, how it acts, success), from the least to the most help: the baselines, the beam searches, the oracle."""
    for label, key, how in (("policy", "sampled", "one sample"), ("greedy", "greedy", "temperature 0")):
        if value := results.baseline(key):
            yield label, how, value
    known = [label for label in results.with_search("beam") if size and results.at(label, "beam", size)]
    for label in sorted(known, key=lambda each: (each != "random", each == "agentprm")):
        yield label, search_name(f"beam {size}"), results.at(label, "beam", size)
    for count, value in list(results.oracle_curve().items())[-1:]:
        yield "oracle", f"any of {count} samples succeeds", value


def _axis_marks(top: float) -> list[float]:
    limit = AXIS_STEP
    while limit < top - 1e-9:
        limit += AXIS_STEP
    return [limit * part / 4 for part in range(5)]


def beam(results: RunResults) -> str:
    """Beam search: figure, and a table of method by size with what to compare it with."""
    panel = panels.beam_panel(results)
    if panel.empty:
        return ""
    sizes = sorted({size for label in results.methods for size in results.curve(label, "beam")}, key=size_key)
    rows = [
        [html.method(label), *(html.share(results.at(label, "beam", size)) for size in sizes)]
        for label in results.with_search("beam")
    ]
    heads = ["Method", *(escape(size_name(size)) for size in sizes)]
    caption = f"Tasks solved with beam search, in per cent, with the {BAND}."
    words = (
        "At every round each kept path tries several actions; the reward model scores them and the best are kept. "
        f"Marks are means, bars the {BAND}{panel_sample(results, [panel])}.{level_words(results)}"
    )
    numbers = html.table(heads, rows, caption=caption, totals=_references(results))
    intro = "More guided search, more tasks solved? Random scores are the control: the same search without judgement."
    return section("beam", "Beam search", intro, side(figure([panel], "beam", words, titled=False), numbers))


def _references(results: RunResults) -> list[tuple[str, str]]:
    known = {"policy": results.baseline("sampled"), "greedy": results.baseline("greedy")}
    rows = [(html.method(label), html.share(value)) for label, value in known.items() if value]
    for n, value in list(results.oracle_curve().items())[-1:]:
        rows.append((f'{html.method("oracle")} <span class="how">any of {escape(n)}</span>', html.share(value)))
    return rows


def scaling(results: RunResults) -> str:
    """Success against the number of samples a method chooses from."""
    found = panels.scaling_panels(results)
    if not found:
        return ""
    words = (
        "The reward model picks one of N. Whole trajectories show their outcome in their last step, so that is easy; "
        "choosing among half-finished ones, which the policy then finishes, asks for foresight. "
        f"Lines are means, bands the {BAND}{panel_sample(results, found)}.{level_words(results)}"
    )
    if results.oracle_curve():
        words += " The oracle counts a task when any of the N succeeds: no choice can do better."
    intro = "How success grows with the number of candidates to choose from."
    body = figure(found, "scaling", words)
    body += _size_table(results, AGGREGATED, "Best of N by other scores of a trajectory than its final step's")
    caption = "Diverse beams, beams that look ahead (paths x actions x steps), and tree search by simulations x actions"
    body += _size_table(results, (*TREE_SEARCHES, *results.searches), caption)
    return section("scaling", "More samples to choose from", intro, body)


def _size_table(results: RunResults, searches: Sequence[str], caption: str) -> str:
    """A row for each label and search that was measured, a column for each size."""
    curves = {(label, search): results.curve(label, search) for label in results.methods for search in searches}
    curves = {key: curve for key, curve in curves.items() if curve}
    if not curves:
        return ""
    sizes = sorted({size for curve in curves.values() for size in curve}, key=size_key)
    how = lambda search: escape(search.removeprefix("best_of_n_").replace("_", " "))
    rows = [
        [
            f'{html.method(label)} <span class="how">{how(search)}</span>',
            *(html.share(curve.get(size)) for size in sizes),
        ]
        for (label, search), curve in curves.items()
    ]
    return html.table(["Method", *map(size_name, sizes)], rows, caption=caption)


def pairs(results: RunResults) -> str:
    """Paired differences with their interval on one axis."""
    known = [pair for pair in results.paired if pair.mean is not None]
    if not known:
        return ""
    intro = "The same tasks under two ways of acting. A difference whose interval includes zero is not a finding."
    first, *others = _by_search(results, known)
    body = _pair_table(results, first)
    for group in others:
        title = f"{search_name(group[0].at, results.custom_labels)}: {plural(len(group), 'difference')}"
        body += html.fold(title, _pair_table(results, group))
    return section("pairs", "Differences, paired by task", intro, body)


def _by_search(results: RunResults, known: list[Paired]) -> list[list[Paired]]:
    """Few differences in one table; many in one for each search, the headline's search first."""
    if len(known) <= ONE_TABLE:
        return [known]
    groups: dict[tuple[str, str], list[Paired]] = {}
    for pair in known:
        groups.setdefault(split_search(pair.at, results.searches), []).append(pair)
    headlined = ("beam", headline(results).size)
    return [groups[search] for search in sorted(groups, key=lambda search: search != headlined)]


def _pair_table(results: RunResults, known: list[Paired]) -> str:
    bounds = [bound for pair in known for bound in (pair.mean, pair.low, pair.high) if bound is not None]
    reach = max(MIN_REACH, *(abs(bound) for bound in bounds))
    heads = ["Difference", "Points [interval]", "Zero", "below zero | above", "Tasks"]
    caption = f"Mean difference in percentage points{sample_words(results, [])}, with the {BAND}."
    return html.table(heads, [_pair_row(pair, reach, results.custom_labels) for pair in known], caption=caption)


def _pair_row(pair: Paired, reach: float, custom: Mapping[str, str]) -> list[str]:
    a, b = (ALIASES.get(side, side) for side in (pair.a, pair.b))
    against = name(b) if b not in BASELINES else name(b).lower()
    return [
        f'{html.method(a)} <span class="versus">against {escape(against)}</span>'
        f'<span class="how">{escape(search_name(pair.at, custom))}</span>',
        html.difference(pair.estimate),
        _zero(pair.estimate),
        html.track(pair.estimate, look(a), -reach, reach, marks=[0.0]),
        html.NOT_MEASURED if pair.n is None else html.count(pair.n),
    ]


def _zero(estimate: ReportedEstimate) -> str:
    if not estimate.has_interval:
        return html.NOT_MEASURED
    if estimate.low > 0:
        return '<span class="verdict good">▲ clear, above</span>'
    return '<span class="verdict bad">▼ clear, below</span>' if estimate.high < 0 else "○ included"
