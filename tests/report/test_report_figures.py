"""Figures draw what they are given, follow the theme, and stay readable as text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprm.report import labels
from jaxprm.report.figures import Level, Panel, Series, draw, shared_limits
from jaxprm.report.panels import thin
from jaxprm.report.results import ReportedEstimate, size_key
from jaxprm.report.svg import inline_svg, light_colour, standalone_svg, themed_colour

PANEL = Panel(
    title="Best of N & <more>",
    x_label="N",
    y_label="tasks solved",
    series=[
        Series(
            label="agentprm", xs=[0, 1, 2], points=[ReportedEstimate(m, m - 0.1, m + 0.1, 50) for m in (0.4, 0.5, 0.6)]
        ),
        Series(label="pvm", xs=[0, 2], points=[ReportedEstimate(0.41), ReportedEstimate(0.44)]),
    ],
    levels=[Level(label="policy", value=ReportedEstimate(0.4, 0.35, 0.45, 50))],
    ticks=[(0, "1"), (1, "2"), (2, "4")],
)


@pytest.fixture(scope="module")
def drawing() -> ElementTree.Element:
    figure, titles = draw(PANEL, colour=themed_colour, width=400, height=300)
    return ElementTree.fromstring(inline_svg(figure, "p0", "described", titles))


def test_colours_are_the_theme_s_variables(drawing: ElementTree.Element) -> None:
    paints = {e.get(name) for e in drawing.iter() for name in ("fill", "stroke") if e.get(name)}
    assert {"var(--agentprm)", "var(--pvm)", "var(--ink)", "var(--muted)", "none"} <= paints
    assert all(paint == "none" or re.fullmatch(r"var\(--[a-z0-9]+\)", paint) for paint in paints)
    assert {paint[6:-1] for paint in paints - {"none"}} <= set(labels.COLOURS)


def test_there_is_no_inline_style_and_no_metadata(drawing: ElementTree.Element) -> None:
    assert not [e for e in drawing.iter() if "style" in e.attrib or e.tag in ("style", "metadata")]
    assert drawing.get("role") == "img" and drawing.get("aria-label") == "described"


def test_text_is_text(drawing: ElementTree.Element) -> None:
    texts = ["".join(e.itertext()).strip() for e in drawing.iter("text")]
    assert {"Best of N & <more>", "N", "tasks solved", "1", "2", "4"} <= set(texts)
    assert not [e for e in drawing.iter("text") if "font-family" in e.attrib]


def test_every_marker_says_its_number(drawing: ElementTree.Element) -> None:
    titles = [e.text.replace("\u202f", " ") for e in drawing.iter("title")]
    assert "AgentPRM, N 2: 50.0 % [40.0 %, 60.0 %]" in titles
    assert "PVM, N 4: 44.0 %" in titles
    assert len(titles) == 5


def test_references_inside_a_drawing_are_its_own(drawing: ElementTree.Element) -> None:
    ids = {e.get("id") for e in drawing.iter() if e.get("id")}
    links = {e.get("href")[1:] for e in drawing.iter() if e.get("href")}
    clips = {e.get("clip-path")[5:-1] for e in drawing.iter() if e.get("clip-path")}
    assert links and clips and links | clips == ids
    assert all(each.startswith("p0-") for each in ids)


def test_a_standalone_drawing_defines_both_themes() -> None:
    figure, _ = draw(PANEL, colour=themed_colour, width=400, height=300)
    root = ElementTree.fromstring(standalone_svg(figure, "described"))
    style = root.find("{http://www.w3.org/2000/svg}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert f"--agentprm: {labels.COLOURS['agentprm'][0]};" in light
    assert f"--agentprm: {labels.COLOURS['agentprm'][1]};" in dark


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["paper", "surface", "sunken"])
def test_text_and_marks_stand_out_from_every_ground(theme: int, ground: str) -> None:
    behind = labels.COLOURS[ground][theme]
    for role in ("ink", "muted", "good", "bad"):
        assert contrast(labels.COLOURS[role][theme], behind) >= 4.5, role
    for role in {style.role for style in labels.LOOKS.values()} | {"extra1", "extra2", "extra3"}:
        assert contrast(labels.COLOURS[role][theme], behind) >= 3, role


def test_methods_differ_by_more_than_colour() -> None:
    shapes = [(style.marker, style.dash) for style in labels.LOOKS.values()]
    assert len(shapes) == len(set(shapes))
    assert light_colour("pvm") != light_colour("orm")


@given(st.lists(st.integers(0, 1000).map(lambda mean: mean / 1000), min_size=1, max_size=6))
def test_shared_limits_hold_every_point(means: list[float]) -> None:
    panel = Panel(
        title="",
        x_label="",
        y_label="",
        series=[Series(label="a", xs=means, points=[ReportedEstimate(m) for m in means])],
    )
    low, high = shared_limits([panel])
    assert 0 <= low <= min(means) and max(means) <= high <= 1 and low < high


@given(st.integers(0, 500), st.integers(2, 50))
def test_thinning_keeps_both_ends_and_the_order(length: int, most: int) -> None:
    kept = thin(range(length), most)
    assert len(kept) == min(length, most)
    assert kept == sorted(set(kept))
    assert not length or (kept[0] == 0 and kept[-1] == length - 1)


def test_sizes_sort_by_number() -> None:
    assert sorted(["16", "8", "128", "1"], key=size_key) == ["1", "8", "16", "128"]
    assert sorted(["8x8", "12x4", "2x2", "deep"], key=size_key) == ["2x2", "8x8", "12x4", "deep"]


def test_numbers_are_written_for_people() -> None:
    assert labels.percent(0.41251) == "41.3\u202f%"
    assert labels.signed_points(-0.0512) == "−5.1"
    assert labels.signed_points(0.0) == "+0.0"
    assert labels.number(12345) == "12,345"
    assert labels.number(0.12345) == "0.123"
    assert labels.number(3.2e12) == "3.20×10¹²"
    assert labels.decimal(-0.2984) == "−0.298"
    assert [labels.duration(s) for s in (8.4, 59.97, 71.2, 7300)] == ["8.4 s", "1 min 0 s", "1 min 11 s", "2 h 1 min"]
    assert [labels.compact(c) for c in (500, 20000, 3e6)] == ["500", "20k", "3M"]
    assert labels.search_name("prefix_best_of_n/16") == "best of 16 prefixes"
    assert labels.search_name("something else") == "something else"
