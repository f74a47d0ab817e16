"""What sections are made of: a figure with legend, caption and numbers, two things side by side, a section's frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from jaxprm.report import html, panels
from jaxprm.report.figures import Panel, draw
from jaxprm.report.labels import THIN_SPACE, name, number, plural
from jaxprm.report.results import ReportedEstimate, RunResults
from jaxprm.report.svg import inline_svg, themed_colour

MAX_ROWS = 24
BAND = f"95{THIN_SPACE}% bootstrap interval over tasks and seeds"


def section(ident: str, title: str, intro: str, body: str) -> str:
    return (
        f'<section id="{ident}" aria-labelledby="{ident}-title"><h2 id="{ident}-title">{escape(title)}</h2>'
        f'<p class="intro">{escape(intro)}</p>{body}</section>'
    )


def side(left: str, right: str) -> str:
    """Two pieces side by side where the window is wide enough; one alone stays as it is."""
    return f'<div class="side"><div>{left}</div><div>{right}</div></div>' if left and right else left + right


def figure(
    found: Sequence[Panel],
    prefix: str,
    words: str,
    *,
    labels: Sequence[str] | None = None,
    variants: Sequence[tuple[str, bool]] = (),
    titled: bool = True,
) -> str:
    """Panels under one legend, with a caption in words and the numbers behind them in a table.

    `labels` are the methods of the legend (all that are drawn, if not given), `variants` (text, hollow) its other
    lines. A panel that its section's heading describes needs no title. Panels that stand three in a row are drawn
    narrower, so that their text keeps its size.
    """
    small = len(found) == 3 or len(found) > 4
    drawings = "".join(_drawing(panel, f"{prefix}{i}", small, titled) for i, panel in enumerate(found))
    shape = "thirds" if small else f"count-{len(found)}"
    legend = html.legend(_drawn(found) if labels is None else labels, variants=variants)
    numbers = "".join(_numbers(panel) for panel in found)
    return (
        f'<figure id="figure-{prefix}">{legend}<div class="panels {shape}">{drawings}</div>'
        f"<figcaption>{escape(words.strip())}</figcaption>"
        f"{html.fold('The numbers in this figure', numbers)}</figure>"
    )


def sample_words(results: RunResults, estimates: Sequence[ReportedEstimate]) -> str:
    """Over what means were taken, for a caption: " (120 tasks, 3 seeds)"; empty when neither is known."""
    counts = sorted({estimate.n for estimate in estimates if estimate.n is not None})
    words = []
    if counts:
        span = plural(counts[0], "task") if len(counts) == 1 else f"{number(counts[0])} to {number(counts[-1])} tasks"
        words.append(span)
    seeds = results.provenance.get("seeds") if isinstance(results.provenance, dict) else None
    if isinstance(seeds, list) and seeds:
        words.append(plural(len(seeds), "seed"))
    return f" ({', '.join(words)})" if words else ""


def panel_sample(results: RunResults, found: Sequence[Panel]) -> str:
    """`sample_words` of everything drawn in these panels."""
    return sample_words(results, [point for panel in found for series in panel.series for point in series.points])


def level_words(results: RunResults) -> str:
    """A caption's sentence on the horizontal lines."""
    known = {level.label for level in panels.levels(results)}
    forms = {"policy": "the solid horizontal line is the plain policy", "greedy": "the dotted one the greedy policy"}
    words = ", ".join(text for label, text in forms.items() if label in known)
    return f" {words[0].upper()}{words[1:]}." if words else ""


def _drawing(panel: Panel, prefix: str, small: bool, titled: bool) -> str:
    shown = panel if titled else replace(panel, title="")
    drawn, titles = draw(shown, colour=themed_colour, width=320 if small else 390, height=264)
    names = list(dict.fromkeys(name(series.label) for series in panel.series if series.xs))
    axes = f"{panel.y_label or 'value'} against {panel.x_label}"
    label = f"{panel.title}: {axes}, for {', '.join(names)}. The numbers are in the table below the figure."
    return inline_svg(drawn, prefix, label, titles)


def _numbers(panel: Panel) -> str:
    ticks = dict(panel.ticks)
    columns = [series for series in panel.series if series.xs]
    shown = html.share if panel.fractions else html.plain
    heads = [escape(panel.x_label), *(f"{html.method(each.label)} {escape(each.note)}" for each in columns)]
    points = [dict(zip(series.xs, series.points, strict=True)) for series in columns]
    places = sorted({x for curve in points for x in curve})
    rows = [
        [escape(ticks.get(x, number(x))), *(shown(curve.get(x)) for curve in points)]
        for x in panels.thin(places, MAX_ROWS)
    ]
    caption = panel.title if len(places) <= MAX_ROWS else f"{panel.title} ({MAX_ROWS} of {len(places)} rows)"
    return html.table(heads, rows, caption=caption)


def _drawn(found: Sequence[Panel]) -> list[str]:
    series = [each.label for panel in found for each in panel.series if each.xs]
    return list(dict.fromkeys([*series, *(level.label for panel in found for level in panel.levels)]))
