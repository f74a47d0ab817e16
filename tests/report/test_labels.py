"""Styles stand out and differ by more than colour; numbers are formatted for people."""

from __future__ import annotations

import pytest

from jaxprm.report import labels


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
    for role in {style.role for style in labels.METHOD_STYLES.values()} | {"extra1", "extra2", "extra3"}:
        assert contrast(labels.COLOURS[role][theme], behind) >= 3, role


def test_methods_differ_by_more_than_colour() -> None:
    shapes = [(style.marker, style.dash) for style in labels.METHOD_STYLES.values()]
    assert len(shapes) == len(set(shapes))
    colours = [labels.COLOURS[name] for name in ("agentprm", "pvm", "orm", "random")]
    assert len(colours) == len(set(colours))


def test_numbers_are_written_for_people() -> None:
    assert labels.percent(0.41251) == "41.3\u202f%"
    assert labels.bare_percent(0.41251) == "41.3"
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
