"""Figures of the page: drawings of their panels, a legend, and the numbers behind them as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxprm.report.figures import Panel, draw
from jaxprm.report.headline import sample_words
from jaxprm.report.labels import method_name, number
from jaxprm.report.panels import evenly_spaced
from jaxprm.report.results import ReportedEstimate, RunResults
from jaxprm.report.svg import inline_svg, themed_colour

# Of a table below a figure: training curves have hundreds of points.
MAX_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class NumbersTable:
    """The numbers of a panel: a column for each series, (label, note), and a row for each x."""

    caption: str
    x_label: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[ReportedEstimate | None]]]
    fractions: bool


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """What the template of a figure shows.

    `labels` are the methods of its legend and `variants` (text, hollow) the legend's other lines. `sample` and
    `levels` are for its caption: how many tasks and seeds, and what the horizontal lines are.
    """

    id: str
    labels: list[str]
    variants: Sequence[tuple[str, bool]]
    layout: str
    drawings: list[str]
    tables: list[NumbersTable]
    sample: str
    levels: str


def figure_data(
    results: RunResults,
    panels: Sequence[Panel],
    ident: str,
    *,
    labels: list[str] | None = None,
    variants: Sequence[tuple[str, bool]] = (),
    titled: bool = True,
) -> PageFigure | None:
    """The figure of these panels, None if there are none.

    `labels` replaces the labels of all drawn methods in the legend. A panel that its section's heading describes needs
    no title.
    """
    if not panels:
        return None
    # Panels three in a row are drawn narrower, not scaled down, so that their text keeps its size.
    small = len(panels) == 3 or len(panels) > 4
    points = [point for panel in panels for series in panel.series for point in series.points]
    return PageFigure(
        id=ident,
        labels=_drawn_labels(panels) if labels is None else labels,
        variants=variants,
        layout="thirds" if small else f"count-{len(panels)}",
        drawings=[_drawing(panel, f"{ident}{index}", small, titled) for index, panel in enumerate(panels)],
        tables=[_numbers(panel) for panel in panels],
        sample=sample_words(results, points),
        levels=_level_words(panels),
    )


def _drawn_labels(panels: Sequence[Panel]) -> list[str]:
    series = [each.label for panel in panels for each in panel.series if each.xs]
    return list(dict.fromkeys([*series, *(level.label for panel in panels for level in panel.levels)]))


def _drawing(panel: Panel, prefix: str, small: bool, titled: bool) -> str:
    shown = panel if titled else replace(panel, title="")
    drawn, titles = draw(shown, colour=themed_colour, width=320 if small else 390, height=264)
    # A method may have several lines: one for each seed, or two variants.
    names = list(dict.fromkeys(method_name(series.label) for series in panel.series if series.xs))
    axes = f"{panel.y_label or 'value'} against {panel.x_label}"
    label = f"{panel.title}: {axes}, for {', '.join(names)}. The numbers are in the table below the figure."
    return inline_svg(drawn, prefix, label, titles)


def _numbers(panel: Panel) -> NumbersTable:
    ticks = dict(panel.ticks)
    columns = [series for series in panel.series if series.xs]
    curves = [dict(zip(series.xs, series.points, strict=True)) for series in columns]
    xs = sorted({x for curve in curves for x in curve})
    return NumbersTable(
        caption=panel.title if len(xs) <= MAX_ROWS else f"{panel.title} ({MAX_ROWS} of {len(xs)} rows)",
        x_label=panel.x_label,
        columns=[(series.label, series.note) for series in columns],
        rows=[(ticks.get(x, number(x)), [curve.get(x) for curve in curves]) for x in evenly_spaced(xs, MAX_ROWS)],
        fractions=panel.fractions,
    )


def _level_words(panels: Sequence[Panel]) -> str:
    """A caption's sentence on the horizontal lines."""
    drawn = {level.label for panel in panels for level in panel.levels}
    forms = {"policy": "the solid horizontal line is the plain policy", "greedy": "the dotted one the greedy policy"}
    words = ", ".join(text for label, text in forms.items() if label in drawn)
    return f"{words[0].upper()}{words[1:]}." if words else ""
