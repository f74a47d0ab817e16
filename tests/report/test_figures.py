"""Drawings show the numbers of their panel, follow the theme, and keep text as text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprm.report import labels
from jaxprm.report.figures import Level, Panel, Series, draw, shared_limits
from jaxprm.report.results import ReportedEstimate
from jaxprm.report.svg import inline_svg, standalone_svg, themed_colour

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


def test_every_marker_has_its_number_as_a_tooltip(drawing: ElementTree.Element) -> None:
    titles = [e.text.replace("\u202f", " ") for e in drawing.iter("title")]
    assert "AgentPRM, N 2: 50.0 % [40.0 %, 60.0 %]" in titles
    assert "PVM, N 4: 44.0 %" in titles
    assert len(titles) == 5


def test_references_inside_a_drawing_have_its_prefix(drawing: ElementTree.Element) -> None:
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
