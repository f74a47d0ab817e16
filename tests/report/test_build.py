"""The page shows the numbers of results.json, loads nothing, runs nothing untrusted, and leaves gaps as gaps."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from jaxprm.report import build, build_report

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!-- $x_{$ {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser sees: elements with attributes, texts by section, tables as rows of texts, script bodies."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.values: list[float] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.section = ""
        self.words: dict[str, str] = {}
        self.titles: list[str] = []
        self._raw_tag = self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.append((self.section, []))
        if tag in ("th", "td") and self.rows:
            self.rows[-1][1].append("")
        if tag == "data":
            self.values.append(float(attributes["value"]))
        self._tag = tag
        if tag == "title":
            self.titles.append("")
        self._raw_tag = tag if tag in self.raw else ""
        if self._raw_tag:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw_tag = self._tag = ""
        if tag in ("tbody", "thead", "tfoot"):
            self.rows.append((self.section, []))

    def handle_data(self, data: str) -> None:
        if self._tag == "title" and self.titles:
            self.titles[-1] += data
            return
        if self._raw_tag:
            self.raw[self._raw_tag][-1] += data
            return
        self.words[self.section] = self.words.get(self.section, "") + data
        if self.rows and self.rows[-1][1]:
            self.rows[-1][1][-1] += data

    def table_row(self, section: str, first: str) -> list[str]:
        """The cells of a section's first row that begins so, without the thin spaces."""
        row = next(cells for where, cells in self.rows if where == section and cells and cells[0].startswith(first))
        return [cell.replace("\u202f", " ").strip() for cell in row]

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]

    @property
    def sections(self) -> set[str]:
        return {attrs["id"] for tag, attrs in self.elements if tag == "section"}


def estimates(node: Any) -> Iterator[float]:
    """Every mean, low and high in a part of results.json."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("mean", "low", "high") and value is not None:
                yield value
            else:
                yield from estimates(value)
    elif isinstance(node, list):
        for value in node:
            yield from estimates(value)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, full_run: Callable[[Path], Path]) -> Path:
    return build_report(full_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def page(built: Path) -> Page:
    return Page(built.read_text())


def test_writes_the_page_and_a_figure_for_a_readme(built: Path) -> None:
    assert built.name == "index.html"
    assert built.with_name("figure.png").read_bytes().startswith(b"\x89PNG")
    figure = built.with_name("figure.svg").read_text()
    assert "<text" in figure and "prefers-color-scheme: dark" in figure
    assert not list(built.parent.glob("*.tmp"))


def test_every_estimate_of_the_results_is_on_the_page(page: Page, results: dict[str, Any]) -> None:
    shown = set(page.values)
    for part in ("policy", "oracle", "methods", "paired", "value_by_depth", "calibration"):
        missing = [value for value in estimates(results[part]) if value not in shown]
        assert not missing, part


def test_the_beam_table_puts_each_number_in_its_row_and_column(page: Page, results: dict[str, Any]) -> None:
    for label, name in (("pvm", "PVM"), ("random", "Random scores"), ("agentprm", "AgentPRM")):
        _, *cells = page.table_row("beam", name)
        expected = [results["methods"][label]["beam"][size] for size in ("2x2", "4x4", "8x8")]
        for cell, want in zip(cells, expected, strict=True):
            numbers = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
            assert numbers == pytest.approx([100 * want[key] for key in ("mean", "low", "high")], abs=0.0501)


def test_paired_differences_say_whether_zero_is_inside(leave: Callable[..., Path]) -> None:
    rows = [("agentprm", 0.1, 0.02, 0.18), ("pvm", 0.02, -0.05, 0.09), ("random", -0.1, -0.2, -0.01)]
    paired = [
        {"a": a, "b": "policy", "at": "beam/4x4", "mean": mean, "low": low, "high": high, "n": 96}
        for a, mean, low, high in rows
    ]
    page = Page(build_report(leave({"paired": paired})).read_text())
    assert page.table_row("pairs", "AgentPRM")[1:3] == ["+10.0 [+2.0, +18.0]", "▲ clear, above"]
    assert page.table_row("pairs", "PVM")[1:3] == ["+2.0 [−5.0, +9.0]", "○ included"]
    assert page.table_row("pairs", "Random")[1:3] == ["−10.0 [−20.0, −1.0]", "▼ clear, below"]
    assert page.table_row("pairs", "PVM")[0] == "PVM against plain policybeam 4×4"


def test_many_differences_are_grouped_by_search_the_headline_s_first(leave: Callable[..., Path]) -> None:
    searches = ("beam 2x2", "best_of_n 16", "beam 4x4")
    labels = ("agentprm", "pvm", "orm", "random", "mc")
    paired = [
        {"a": a, "b": "policy", "at": at, "mean": 0.1, "low": 0.0, "high": 0.2} for at in searches for a in labels
    ]
    beams = {"4x4": {"mean": 0.5}}
    page = Page(build_report(leave({"paired": paired, "methods": {"agentprm": {"beam": beams}}})).read_text())
    firsts = [cells[0] for where, cells in page.rows if where == "pairs" and cells and "AgentPRM" in cells[0]]
    assert [first.split("policy")[1].strip() for first in firsts] == ["beam 4×4", "beam 2×2", "best of 16"]
    assert "best of 16: 5 differences" in page.words["pairs"]


def test_the_time_of_parts_is_added_up_by_stage(leave: Callable[..., Path]) -> None:
    seconds = {"collect": 30.0, "train-agentprm-0": 40.0, "train-pvm-0": 50.5}
    page = Page(build_report(leave({"seconds": seconds})).read_text())
    assert page.table_row("cost", "train") == ["train", "", "1 min 30 s"]
    assert page.table_row("cost", "together") == ["together", "", "2 min 0 s"]
    assert page.table_row("cost", "train-pvm-0") == ["train-pvm-0", "", "50.5 s"]


def test_compute_is_shown_for_each_way_of_acting(page: Page, results: dict[str, Any]) -> None:
    _, policy, reward, *_ = page.table_row("cost", "PVM beam 4×4")
    spent = results["compute"]["methods"]["pvm"]["4x4"]
    assert (policy, reward) == (f"{spent['policy_tokens']:,}", f"{spent['reward_tokens']:,}")
    drawn = [title for title in page.titles if title.startswith("PVM, tokens")]
    assert len(drawn) == 3


def test_nothing_is_loaded_from_anywhere(page: Page, built: Path) -> None:
    assert not page.attributes("src")
    assert all(link.startswith(("#", "data:,")) for link in page.attributes("href"))
    assert not page.attributes("xlink:href")
    urls = re.findall(r"url\(([^)]*)\)", built.read_text())
    assert urls and all(url.startswith("#") for url in urls)
    assert "@import" not in built.read_text()
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", built.read_text())


def test_the_policy_allows_the_page_s_own_script_and_style_and_no_others(page: Page) -> None:
    policy = next(
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert directives["default-src"] == "'none'"
    assert directives["style-src"] == digest(page.raw["style"][0]) and len(page.raw["style"]) == 1
    assert directives["script-src"] == digest(page.raw["script"][-1])
    assert not page.attributes("style")
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_untrusted_text_stays_text(
    leave: Callable[..., Path], results: dict[str, Any], trees: list[dict[str, Any]]
) -> None:
    node = trees[0]["nodes"][0]
    node["action"] = node["observation"] = HOSTILE
    trees[0]["goal"] = trees[0]["prompt"] = trees[0]["task"] = trees[0]["method"] = HOSTILE
    minimal = {
        "name": HOSTILE,
        "methods": {HOSTILE: {search: {HOSTILE: results["policy"]["sampled"]} for search in ("beam", "mcts")}},
        "paired": [{"a": HOSTILE, "b": HOSTILE, "at": HOSTILE, "mean": 0.1}],
        "value_by_depth": {
            HOSTILE: [{"depth": 1, "success": results["policy"]["sampled"]}],
            "pvm": [{"depth": 1, "success": results["policy"]["sampled"]}],
        },
        "training": {HOSTILE: {HOSTILE: [{"step": 1, "value_loss": 0.5}]}},
        "validation": {HOSTILE: {"loss": 0.5}},
        "budget": {
            "equal": [{"label": HOSTILE, "at": HOSTILE, "unit": HOSTILE, "n": 2.0}],
            "needed": [{"a": HOSTILE, "b": HOSTILE, "at": 16, "mean": 2.0}],
        },
        "compute": {"unit": HOSTILE, HOSTILE: 3, "methods": {HOSTILE: {HOSTILE: {HOSTILE: 3}}}},
        "seconds": {HOSTILE: 1.0},
        "data": {HOSTILE: HOSTILE},
        "provenance": {HOSTILE: HOSTILE, "config": {"x": HOSTILE}, "date": HOSTILE},
    }
    page = Page(build_report(leave(minimal, trees)).read_text())
    assert "img" not in {tag for tag, _ in page.elements}
    assert "{{ 7 * 7 }}" in page.words["pairs"] and "49" not in page.words["pairs"]
    embedded = json.loads(page.raw["script"][0])
    # A separator of lines is written out, as are marks of direction.
    assert embedded[0]["nodes"][0]["action"] == HOSTILE.replace("\u2028", "\\u2028")
    assert embedded[0]["task"] == HOSTILE.replace("\u2028", "\\u2028")
    assert len(page.raw["script"]) == 3
    assert page.sections >= {"viewer", "beam", "pairs", "judgement", "training", "cost", "provenance"}


def test_figures_are_images_with_a_description_and_unique_ids(page: Page) -> None:
    drawings = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("aria-hidden") != "true"]
    drawings = [attrs for attrs in drawings if "overflow" not in attrs]
    assert len(drawings) >= 12
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 40 for attrs in drawings)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert "120 tasks, 3 seeds" in page.words["scaling"]
    captions = [tag for tag, _ in page.elements if tag == "figcaption"]
    assert len(captions) == len([tag for tag, _ in page.elements if tag == "figure"])


@pytest.mark.parametrize(
    ("part", "sections"),
    [
        ("policy", set()),
        ("oracle", {"scaling"}),
        ("methods", {"beam", "scaling"}),
        ("paired", {"pairs"}),
        ("value_by_depth", {"judgement"}),
        ("calibration", {"judgement"}),
        ("validation", {"judgement"}),
        ("training", {"training"}),
        ("compute", {"cost"}),
        ("seconds", {"cost"}),
        ("data", {"training"}),
        ("provenance", {"provenance"}),
    ],
)
def test_a_run_with_one_part_shows_that_part_alone(
    part: str, sections: set[str], leave: Callable[..., Path], results: dict[str, Any]
) -> None:
    page = Page(build_report(leave({part: results[part]})).read_text())
    assert page.sections == sections
    assert {link[1:] for link in page.attributes("href") if link.startswith("#")} == {*sections, "main"} | {
        link[1:] for link in page.attributes("href") if re.match(r"#\w+\d-", link)
    }


def test_a_missing_measurement_is_a_dash_not_a_number(leave: Callable[..., Path], results: dict[str, Any]) -> None:
    measured = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    missing = {"mean": None, "low": None, "high": None, "n": 0}
    minimal = {
        "methods": {
            "agentprm": {"beam": {"2x2": measured, "4x4": missing, "8x8": measured}},
            "pvm": {"beam": {"2x2": measured}},
        },
        "value_by_depth": {"agentprm": [{"depth": 1, "success": measured, "failure": missing, "auroc": None}]},
        "calibration": {"agentprm": [{"predicted": 0.5, "observed": None}]},
        "training": {"agentprm": {"0": [{"step": 1, "value_loss": None}]}},
    }
    page = Page(build_report(leave(minimal)).read_text())
    assert page.table_row("beam", "PVM")[2] == "–"
    assert "4×4" not in page.words["beam"]
    assert page.sections == {"beam", "judgement"}
    assert set(page.values) == {0.5, 0.4, 0.6}


def test_an_empty_run_says_that_nothing_was_measured(leave: Callable[..., Path]) -> None:
    page = Page(build_report(leave({})).read_text())
    assert "No guided search was measured" in page.words[""]
    assert not page.values


def test_an_unknown_method_is_shown_under_its_own_name(leave: Callable[..., Path]) -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 60}
    page = Page(build_report(leave({"methods": {"my_model": {"beam": {"3x5": estimate}}}})).read_text())
    assert page.table_row("beam", "my_model")[1] == "50.0 % [40.0, 60.0]"
    assert "3×5" in page.words["beam"]


def test_the_viewer_gets_the_promise_that_looking_ahead_found(
    leave: Callable[..., Path], trees: list[dict[str, Any]]
) -> None:
    trees[0]["nodes"][0]["looked"] = 0.75
    page = Page(build_report(leave({}, trees[:1])).read_text())
    first, second, *_ = json.loads(page.raw["script"][0])[0]["nodes"]
    assert first["looked"] == 0.75
    assert "looked" not in second


def test_trees_beyond_the_budget_are_left_out_and_counted(
    leave: Callable[..., Path], trees: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(json.dumps(tree)) for tree in trees if tree["beam"] == "4x4")
    monkeypatch.setattr(build, "MAX_TREE_BYTES", size)
    page = Page(build_report(leave({}, trees)).read_text())
    shown = json.loads(page.raw["script"][0])
    assert len([tree for tree in shown if tree["beam"] == "4x4"]) == len(trees) / 2
    assert len(trees) / 2 <= len(shown) < len(trees)
    assert f"holds {len(shown)} of {len(trees)} searches" in page.words["viewer"]


def test_a_tree_that_is_too_large_leaves_the_others_and_is_named(
    leave: Callable[..., Path], trees: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    large = trees[0] | {"task": "textcraft/large", "prompt": "x" * 200_000}
    monkeypatch.setattr(build, "MAX_TREE_BYTES", 150_000)
    page = Page(build_report(leave({}, [large, *trees[1:4]])).read_text())
    assert [tree["task"] for tree in json.loads(page.raw["script"][0])] == [tree["task"] for tree in trees[1:4]]
    note = "This page holds 3 of 4 searches; all are in search/trees.json. Too large for a page, with more than 0.15 MB"
    for text in (page.words["viewer"], capsys.readouterr().err):
        assert note in text and f"textcraft/large ({large['method']}, {large['beam']})" in text
    page = Page(build_report(leave({}, [large])).read_text())
    assert "This page holds 0 of 1 searches" in page.words["viewer"] and "textcraft/large" in page.words["viewer"]
    capsys.readouterr()
    page = Page(build_report(leave({}, trees[1:3])).read_text())
    assert capsys.readouterr().err == ""


def test_characters_that_hide_or_reorder_text_are_written_out(
    leave: Callable[..., Path], trees: list[dict[str, Any]]
) -> None:
    hostile = "a\u202eb\x1b[2J\u2066\x9b \\u202e"
    trees[0]["prompt"] = trees[0]["task"] = trees[0]["nodes"][0]["action"] = hostile
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 60}
    results = {"name": hostile, "methods": {hostile: {"beam": {"4x4": estimate}}}}
    text = build_report(leave(results, trees[:1])).read_text()
    assert not any(character in text for character in "\u202e\u2066\x1b\x9b")
    shown = "a\\u202eb\\x1b[2J\\u2066\\x9b \\u202e"
    tree = json.loads(Page(text).raw["script"][0])[0]
    assert tree["prompt"] == tree["task"] == tree["nodes"][0]["action"] == shown


def test_the_same_results_give_the_same_page(leave: Callable[..., Path], results: dict[str, Any]) -> None:
    part = {"methods": {"pvm": {"beam": results["methods"]["pvm"]["beam"]}}}
    first = build_report(leave(part)).read_bytes()
    assert build_report(leave(copy.deepcopy(part))).read_bytes() == first


def test_the_templates_are_package_data() -> None:
    templates = resources.files("jaxprm.report") / "templates"
    names = {file.name for file in templates.iterdir()}
    assert {f"{name}.html.jinja" for name, _, _ in build.SECTIONS} < names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["jaxprm"]
    for file in (ROOT / "jaxprm/report").rglob("*.*"):
        if file.suffix not in (".py", ".pyc"):
            assert any(file.match(f"jaxprm/{pattern}") for pattern in patterns), file


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, jaxprm.report; sys.exit('matplotlib' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
