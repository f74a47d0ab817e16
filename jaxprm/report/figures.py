"""Figures as data (panels of series), and their drawing by matplotlib. Nothing here reads files or knows HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxprm.report.labels import compact, method_style, percent
from jaxprm.report.results import ReportedEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = Callable[[str], str]
Titles = dict[str, list[str]]
# Our sizes are in points, matplotlib's in inches.
POINTS_PER_INCH = 72
# Half of it is the least distance of a value from an end of the axis: without it 0.3 would be on the frame.
MARGIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Series:
    """One method's points: positions `xs` and the estimates measured there.

    Where one method has two lines, `variant` (solid with filled marks, dashed with hollow ones) and the words of `note`
    tell them apart.
    """

    label: str
    xs: Sequence[float]
    points: Sequence[ReportedEstimate]
    variant: Literal["", "solid", "hollow"] = ""
    note: str = ""
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line with its interval: a baseline, the same at every x."""

    label: str
    value: ReportedEstimate


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

    ticks: names of x positions (categories or powers of two). limits, reach: the range of y and of x. fractions: y is
    a share, written in per cent. diagonal: a dotted line at y = x. bars: dodged marks instead of lines. chance: a
    dotted line at this y. unit: the word for x in tooltips.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series] = ()
    levels: Sequence[Level] = ()
    ticks: Sequence[tuple[float, str]] = ()
    limits: tuple[float, float] | None = None
    reach: tuple[float, float] | None = None
    fractions: bool = True
    diagonal: bool = False
    bars: bool = False
    chance: float | None = None
    log_x: bool = False
    unit: str = ""

    @property
    def empty(self) -> bool:
        return not any(len(series.xs) for series in self.series)


def shared_limits(panels: Sequence[Panel]) -> tuple[float, float] | None:
    """One y range, in steps of 10 %, that holds every point, interval and level of the panels."""
    values = [
        bound
        for panel in panels
        for point in [*(p for s in panel.series for p in s.points), *(level.value for level in panel.levels)]
        for bound in (point.mean, point.low, point.high)
        if bound is not None
    ]
    if not values:
        return None
    low = math.floor((min(values) - MARGIN / 2) * 10) / 10
    high = math.ceil((max(values) + MARGIN / 2) * 10) / 10
    # The margin must not open the axis to shares below 0 or above 1, unless values are there.
    return (max(0.0, low) if min(values) >= 0 else low, min(1.0, high) if max(values) <= 1 else high)


def draw(panel: Panel, *, colour: Colour, width: float, height: float) -> tuple[Figure, Titles]:
    """The panel as a figure of `width` x `height` points, and the tooltips of its markers by artist gid."""
    figure, (axes,) = canvas(1, colour=colour, width=width, height=height)
    return figure, draw_on(axes, panel, colour=colour)


def canvas(columns: int, *, colour: Colour, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure with `columns` styled axes side by side."""
    # Imported here, as in the other functions: matplotlib is slow to import, and few commands draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.05)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for each in axes:
        _style(each, colour)
    return figure, axes


def draw_on(axes: Axes, panel: Panel, *, colour: Colour) -> Titles:
    """Draw a panel on styled axes; returns the tooltips of its markers by artist gid."""
    if panel.log_x:
        axes.set_xscale("log")
    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color=colour("muted"), linewidth=1, dashes=(2, 3), zorder=1)
    if panel.chance is not None:
        axes.axhline(panel.chance, color=colour("muted"), linewidth=1, dashes=(2, 3), zorder=1)
    for level in panel.levels:
        _draw_level(axes, level, colour)
    titles = {}
    for index, series in enumerate(panel.series):
        gid = f"points-{index}"
        draw_series = _draw_dodged if panel.bars else _draw_line
        draw_series(axes, series, gid, colour, _dodge(index, len(panel.series)))
        titles[gid] = [_tooltip(series, x, point, panel) for x, point in zip(series.xs, series.points, strict=True)]
    _finish(axes, panel, colour)
    return titles


def legend_on(figure: Figure, panels: Sequence[Panel], *, colour: Colour) -> None:
    """Draw one legend below all axes. The page has its legends in HTML; a figure in a file needs its own."""
    from matplotlib.lines import Line2D

    labels = [each.label for panel in panels for each in panel.series if each.xs]
    labels += [level.label for panel in panels for level in panel.levels]
    handles = []
    for label in dict.fromkeys(labels):
        style = method_style(label)
        tint = colour(style.role)
        line = Line2D(
            [], [], color=tint, linewidth=2, marker=style.marker or "none", markersize=7, label=_literal(style.name)
        )
        line.set_markeredgecolor(colour("surface"))
        if style.dash:
            line.set_dashes(style.dash)
        handles.append(line)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=11,
        labelcolor=colour("ink"),
        handlelength=3,
    )


def _style(axes: Axes, colour: Colour) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("rule"))
    axes.tick_params(length=0, labelsize=10.5, labelcolor=colour("muted"), pad=5)
    axes.minorticks_off()
    axes.grid(axis="y", color=colour("grid"), linewidth=1)
    axes.set_axisbelow(True)


def _draw_level(axes: Axes, level: Level, colour: Colour) -> None:
    style = method_style(level.label)
    if level.value.has_interval and not style.dash:
        axes.axhspan(level.value.low, level.value.high, color=colour(style.role), alpha=0.07, linewidth=0, zorder=1)
    line = axes.axhline(level.value.mean, color=colour(style.role), linewidth=1.6, zorder=2)
    if style.dash:
        line.set_dashes(style.dash)


def _draw_line(axes: Axes, series: Series, gid: str, colour: Colour, _: float) -> None:
    style = method_style(series.label)
    tint = colour(style.role)
    points = series.points
    # Two lines of one method have its colour, so their dashes must differ; the method's own dash is not used.
    dash = {"hollow": (3, 2.5), "solid": ()}.get(series.variant, style.dash)
    # A band needs an interval at every point; otherwise each interval is a bar.
    if len(points) > 1 and all(point.has_interval for point in points):
        lows, highs = [point.low for point in points], [point.high for point in points]
        axes.fill_between(series.xs, lows, highs, color=tint, alpha=0.11, linewidth=0, zorder=2)
    elif any(point.has_interval for point in points):
        _draw_bars(axes, series.xs, points, tint)
    means = [point.mean for point in points]
    (line,) = axes.plot(series.xs, means, color=tint, linewidth=1 if series.faint else 2, zorder=3)
    if dash:
        line.set_dashes(dash)
    if series.faint:
        line.set_alpha(0.75)
    # A line of a single point would be invisible.
    if not series.faint or len(points) == 1:
        _draw_markers(axes, series, series.xs, gid, colour)


def _draw_dodged(axes: Axes, series: Series, gid: str, colour: Colour, offset: float) -> None:
    xs = [x + offset for x in series.xs]
    _draw_bars(axes, xs, series.points, colour(method_style(series.label).role))
    _draw_markers(axes, series, xs, gid, colour)


def _draw_bars(axes: Axes, xs: Sequence[float], points: Sequence[ReportedEstimate], tint: str) -> None:
    bounded = [(x, point) for x, point in zip(xs, points, strict=True) if point.has_interval]
    lows, highs = [point.low for _, point in bounded], [point.high for _, point in bounded]
    axes.vlines([x for x, _ in bounded], lows, highs, color=tint, linewidth=2)


def _draw_markers(axes: Axes, series: Series, xs: Sequence[float], gid: str, colour: Colour) -> None:
    style = method_style(series.label)
    tint = colour(style.role)
    # A mark has an outline in the colour of the ground, which keeps overlapping marks apart.
    face = colour("surface") if series.variant == "hollow" else tint
    edge = colour("surface") if face == tint else tint
    # Marks are a separate artist: its gid finds them in the SVG, where they get their tooltips.
    axes.plot(
        xs,
        [point.mean for point in series.points],
        linestyle="none",
        marker=style.marker or "o",
        markersize=8 if style.marker in "X^vP*" else 7,
        markerfacecolor=face,
        markeredgecolor=edge,
        markeredgewidth=1.2 if series.variant == "hollow" else 0.8,
        zorder=4,
        gid=gid,
    )


def _dodge(index: int, count: int) -> float:
    # At most 0.6 wide: categories are 1 apart, and a gap between them has to stay.
    return 0.0 if count < 2 else (index / (count - 1) - 0.5) * min(0.6, 0.13 * count)


def _finish(axes: Axes, panel: Panel, colour: Colour) -> None:
    text = {"fontsize": 11, "color": colour("muted")}
    axes.set_xlabel(panel.x_label, labelpad=6, **text)
    if panel.title:
        axes.set_title(_literal(panel.title), loc="left", fontsize=12.5, color=colour("ink"), fontweight="bold", pad=10)
    if panel.y_label:
        axes.set_ylabel(panel.y_label, **text)
    if panel.ticks:
        axes.set_xticks([x for x, _ in panel.ticks], [_literal(name) for _, name in panel.ticks])
        axes.minorticks_off()
    if panel.log_x:
        _log_ticks(axes)
    elif not panel.ticks and not panel.diagonal:
        _integer_ticks(axes, {x for series in panel.series for x in series.xs})
    if panel.bars:
        positions = [x for x, _ in panel.ticks]
        axes.set_xlim(min(positions) - 0.5, max(positions) + 0.5)
    if panel.limits and panel.limits[0] < panel.limits[1]:
        axes.set_ylim(*panel.limits)
    if panel.reach:
        axes.set_xlim(*panel.reach)
    if panel.diagonal:
        axes.xaxis.set_major_formatter(lambda value, _: percent(value, 0))
    if panel.fractions:
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))


def _literal(text: str) -> str:
    """Text from users, with its dollar signs escaped: matplotlib would read a formula."""
    return text.replace("$", r"\$")


def _integer_ticks(axes: Axes, xs: set[float]) -> None:
    # For a single x the locator would choose ticks between integers.
    if len(xs) == 1:
        axes.set_xticks(list(xs))
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)


def _log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))


def _tooltip(series: Series, x: float, point: ReportedEstimate, panel: Panel) -> str:
    tick = dict(panel.ticks).get(x) or (percent(x) if panel.diagonal else f"{x:g}")
    shown = percent if panel.fractions else "{:.3g}".format
    interval = f" [{shown(point.low)}, {shown(point.high)}]" if point.has_interval else ""
    who = f"{method_style(series.label).name} {series.note}".strip()
    return f"{who}, {panel.unit or panel.x_label} {tick}: {shown(point.mean)}{interval}"
