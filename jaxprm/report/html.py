"""Small pieces of HTML. Every text is escaped here; no piece has an inline style, the page's policy forbids it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from jaxprm.report.labels import Look, decimal, look, number, percent, signed_points
from jaxprm.report.results import ReportedEstimate

NOT_MEASURED = '<span class="absent" title="not measured">–</span>'
SHAPES = {
    "o": '<circle r="4.5"/>',
    "s": '<rect x="-4" y="-4" width="8" height="8"/>',
    "D": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>',
    "^": '<path d="M0-5 5 4.5-5 4.5z"/>',
    "v": '<path d="M0 5 5-4.5-5-4.5z"/>',
    "X": '<path d="M-5-2.5-2.5-5 0-2.5 2.5-5 5-2.5 2.5 0 5 2.5 2.5 5 0 2.5-2.5 5-5 2.5-2.5 0z"/>',
    "P": '<path d="M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    "h": '<path d="M0-5 4.5-2.5v5L0 5-4.5 2.5v-5z"/>',
    "*": '<path d="M0-6 1.6-2 6-1.8 2.5.9 3.7 5 0 2.6-3.7 5-2.5.9-6-1.8-1.6-2z"/>',
    "": '<circle r="4.5"/>',
}


def data(value: float, text: str) -> str:
    """A number as people read it, with the exact value in the markup."""
    return f'<data value="{value!r}">{escape(text)}</data>'


def share(estimate: ReportedEstimate | None) -> str:
    """A cell's content: mean and 95 % interval in per cent."""
    return _with_interval(estimate, percent, lambda value: f"{value * 100:.1f}")


def plain(estimate: ReportedEstimate | None) -> str:
    """A cell's content: mean and 95 % interval as plain numbers."""
    return _with_interval(estimate, decimal, decimal)


def difference(estimate: ReportedEstimate | None) -> str:
    """A cell's content: a difference in percentage points and its 95 % interval."""
    return _with_interval(estimate, signed_points, signed_points)


def count(value: float) -> str:
    return data(value, number(value))


def _with_interval(
    estimate: ReportedEstimate | None, shown: Callable[[float], str], bound: Callable[[float], str]
) -> str:
    if estimate is None or estimate.mean is None:
        return NOT_MEASURED
    text = data(estimate.mean, shown(estimate.mean))
    if estimate.has_interval:
        low, high = data(estimate.low, bound(estimate.low)), data(estimate.high, bound(estimate.high))
        text += f' <span class="interval">[{low}, {high}]</span>'
    return text


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    numeric_from: int = 1,
    totals: Iterable[tuple[str, str]] = (),
) -> str:
    """A table whose cells are HTML already; columns from `numeric_from` on are numbers, the first names the row.

    `totals` are rows below that have one value for all columns. The table scrolls sideways in a box that the keyboard
    can reach.
    """
    kinds = ["number" if index >= numeric_from else "text" for index in range(len(heads))]
    head = "".join(f'<th scope="col" class="{kind}">{text}</th>' for kind, text in zip(kinds, heads, strict=True))
    body = "".join(f"<tr>{_row(row, kinds)}</tr>" for row in rows)
    blank = f'<td colspan="{len(heads) - 2}"></td>' if len(heads) > 2 else ""
    foot = "".join(
        f'<tr><th scope="row">{first}</th><td class="number">{cell}</td>{blank}</tr>' for first, cell in totals
    )
    if foot:
        body += f'</tbody><tbody class="totals">{foot}'
    name = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {name}">'
        f'<table aria-label="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="caption">{name}</p>'
    )


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds[1:], rest, strict=True))
    return f'<th scope="row">{first}</th>{cells}'


def fold(title: str, body: str) -> str:
    """Something that opens on demand."""
    return f'<details class="fold"><summary>{escape(title)}</summary>{body}</details>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of (name, HTML of the value), nothing for an empty one."""
    items = "".join(f"<div><dt>{escape(k.replace('_', ' '))}</dt><dd>{v}</dd></div>" for k, v in pairs)
    return f'<dl class="facts">{items}</dl>' if items else ""


def method(label: str) -> str:
    """A method's name after its mark."""
    style = look(label)
    return f'<span class="method">{swatch(style)}{escape(style.name)}</span>'


def swatch(style: Look, *, hollow: bool = False) -> str:
    """The line and the mark a method has in the figures."""
    dash = (3, 2.5) if hollow else style.dash
    dashes = f' stroke-dasharray="{" ".join(f"{part:g}" for part in dash)}"' if dash else ""
    mark = marker(style, hollow=hollow) if style.marker else ""
    return (
        f'<svg class="swatch" viewBox="-15 -7 30 14" width="30" height="14" aria-hidden="true">'
        f'<line x1="-14" x2="14" stroke="var(--{style.role})" stroke-width="2"{dashes}/>{mark}</svg>'
    )


def marker(style: Look, *, hollow: bool = False) -> str:
    fill = "var(--surface)" if hollow else f"var(--{style.role})"
    edge = f"var(--{style.role})" if hollow else "var(--surface)"
    return f'<g fill="{fill}" stroke="{edge}" stroke-width="1.2">{SHAPES[style.marker]}</g>'


def legend(labels: Iterable[str], *, variants: Sequence[tuple[str, bool]] = ()) -> str:
    """The marks used in a group of figures, once; `variants` are (text, hollow) for the two lines of one method."""
    items = [method(label) for label in dict.fromkeys(labels)]
    neutral = Look("", "muted", "o")
    items += [
        f'<span class="method">{swatch(neutral, hollow=hollow)}{escape(text)}</span>' for text, hollow in variants
    ]
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def track(
    estimate: ReportedEstimate,
    style: Look,
    low: float,
    high: float,
    *,
    marks: Sequence[float],
    reference: float | None = None,
) -> str:
    """Mean and interval on a horizontal axis from `low` to `high`, as wide as its cell.

    Thin lines stand at `marks`, a dashed one at `reference`.
    """

    def at(value: float) -> str:
        return f"{(min(max(value, low), high) - low) / (high - low) * 100:.2f}%"

    def upright(value: float, paint: str) -> str:
        return f'<line x1="{at(value)}" x2="{at(value)}" y1="0" y2="100%" {paint}/>'

    lines = "".join(upright(mark, 'stroke="var(--rule)"') for mark in marks)
    if reference is not None:
        lines += upright(reference, 'stroke="var(--muted)" stroke-dasharray="3 3"')
    if estimate.has_interval:
        ends = f'x1="{at(estimate.low)}" x2="{at(estimate.high)}" y1="50%" y2="50%"'
        lines += f'<line {ends} stroke="var(--{style.role})" stroke-width="3" stroke-linecap="round"/>'
    dot = f'<svg x="{at(estimate.mean)}" y="50%" overflow="visible">{marker(style)}</svg>'
    return f'<svg class="track" aria-hidden="true">{lines}{dot}</svg>'


def axis(marks: Sequence[float]) -> str:
    """The labels below a column of tracks that begin at the first of `marks` and end at the last."""
    last = len(marks) - 1
    anchors = ["start", *["middle"] * (last - 1), "end"]
    texts = "".join(
        f'<text x="{index / last * 100:g}%" y="1em" text-anchor="{anchor}">{percent(mark, 0)}</text>'
        for index, (mark, anchor) in enumerate(zip(marks, anchors, strict=True))
    )
    return f'<svg class="axis" aria-hidden="true">{texts}</svg>'


def bar(share: float) -> str:
    """A bar as long as this share of its cell."""
    rect = f'<rect y="30%" height="40%" width="{share * 100:.2f}%" rx="2" fill="var(--muted)"/>'
    return f'<svg class="track" aria-hidden="true">{rect}</svg>'
