"""Write WORKDIR/report: the page `index.html` and the figure `figure.svg`, `figure.png` for a README."""

from __future__ import annotations

import base64
import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from data_pipeline.output import staged_file
from jaxprm.report import labels, panels, sections
from jaxprm.report.figures import canvas, draw_on, legend_on, shared_limits
from jaxprm.report.headline import PREFERRED_BEAM, headline
from jaxprm.report.labels import COLOURS, method_name, method_style
from jaxprm.report.results import RunResults, SearchTree, load_results, load_trees, size_key
from jaxprm.report.svg import light_colour, standalone_svg, themed_colour

# Bytes of search trees in the page, as JSON. All trees of a run could make it too large to load.
MAX_TREE_BYTES = 8_000_000
# Trees that are named where they are left out.
_MAX_NAMED = 5
# The figure shows beam search and the first of these that was measured.
FIGURE_ORDER = ("Best of N prefixes", "Best of N whole trajectories", "Best of K at every step")
# Below the headline's evidence, in this order: the name of the template, the title in the page's bar, the data.
SECTIONS = (
    ("beam", "Beam search", sections.beam),
    ("scaling", "Scaling", sections.scaling),
    ("pairs", "Differences", sections.pairs),
    ("judgement", "Judgement", sections.judgement),
    ("training", "Training", sections.training),
    ("cost", "Cost", sections.cost),
    ("provenance", "Provenance", sections.provenance),
)


def build_report(workdir: Path) -> Path:
    """Write the report of a finished (or partly finished) run and return the path of its page.

    Reads WORKDIR/results.json and, if it exists, WORKDIR/search/trees.json. Shows the parts that exist, nothing else.
    Raises UserError if results.json is missing or if either file does not have its documented form.
    """
    workdir = Path(workdir)
    results = load_results(workdir / "results.json")
    trees = load_trees(workdir / "search" / "trees.json")
    directory = workdir / "report"
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "index.html"
    _write(page, render(results, trees).encode())
    if note := _fitting(trees)[1]:
        print(f"report: {note}", file=sys.stderr)
    _write_figure(results, directory)
    return page


def render(results: RunResults, trees: Sequence[SearchTree]) -> str:
    """The page as one string of HTML that loads nothing."""
    style = _theme() + _asset("style.css")
    script = _asset("theme.js") + _asset("viewer.js")
    shown_trees, note = _fitting(trees)
    # In the order of the page: (id, title in the bar, HTML).
    parts = [("viewer", "Watch it choose", _viewer(shown_trees, note))]
    parts += [(name, title, _section(name, get_data(results))) for name, title, get_data in SECTIONS]
    return _template("page").render(
        policy=_content_security_policy(style, script),
        style=style,
        script=script,
        headline=headline(results),
        subject=_subject(results),
        result=_section("result", sections.result(results)),
        parts=[part for part in parts if part[2]],
        trees=_json(shown_trees),
        method_styles=_json(_styles_by_label(results, shown_trees)),
    )


def _section(name: str, data: sections.Context | None) -> str:
    """The HTML of a section, empty where nothing was measured."""
    return "" if data is None else _template(name).render(data)


def _viewer(trees: Sequence[SearchTree], note: str) -> str:
    return _template("viewer").render(shown=len(trees), note=note) if trees or note else ""


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(f"{name}.html.jinja")


@functools.cache
def _environment() -> jinja2.Environment:
    # Autoescape covers every text of a template. What is HTML already passes through `safe`, at the place of its use.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxprm.report"),
        autoescape=True,
        # A misspelt variable raises, in place of an empty text on the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (
        labels.bare_percent,
        labels.decimal,
        labels.duration,
        labels.method_style,
        labels.number,
        labels.percent,
        labels.search_name,
        labels.signed_points,
        axis_position,
    )
    environment.globals |= {function.__name__: function for function in formats} | {"BAND": labels.BAND}
    environment.filters["size_name"] = labels.size_name
    return environment


def axis_position(value: float, low: float, high: float) -> str:
    """Where a value is on an axis from `low` to `high`, in per cent of its length; its end for a value outside."""
    return f"{(min(max(value, low), high) - low) / (high - low) * 100:.2f}%"


def _fitting(trees: Sequence[SearchTree]) -> tuple[list[SearchTree], str]:
    """As many trees as keep the page loadable, in the order given, and a note on those that are left out.

    MAX_TREE_BYTES of JSON. The first seed comes before the others and the headline's beam before other sizes,
    regardless of the outcomes. A tree that does not fit leaves its place to those after it.
    """
    seeds = list(dict.fromkeys(tree.seed for tree in trees))
    by_preference = sorted(
        range(len(trees)),
        key=lambda index: (
            seeds.index(trees[index].seed),
            trees[index].beam != PREFERRED_BEAM,
            size_key(trees[index].beam),
        ),
    )
    chosen, large, total = set(), [], 0
    for index in by_preference:
        size = len(msgspec.json.encode(trees[index]))
        if size > MAX_TREE_BYTES:
            large.append(trees[index])
        elif total + size <= MAX_TREE_BYTES:
            total += size
            chosen.add(index)
    return [tree for index, tree in enumerate(trees) if index in chosen], _note(len(chosen), len(trees), large)


def _note(shown: int, total: int, large: Sequence[SearchTree]) -> str:
    """What the page leaves out: empty if it is nothing."""
    if shown == total:
        return ""
    note = f"This page holds {shown} of {total} searches; all are in search/trees.json."
    if large:
        names = ", ".join(f"{tree.task} ({tree.method}, {tree.beam})" for tree in large[:_MAX_NAMED])
        more = f" and {len(large) - _MAX_NAMED} more" if len(large) > _MAX_NAMED else ""
        note += f" Too large for a page, with more than {MAX_TREE_BYTES / 1e6:g} MB each: {names}{more}."
    return note


def _styles_by_label(results: RunResults, trees: Sequence[SearchTree]) -> dict[str, dict[str, str]]:
    by_label = dict.fromkeys([*results.methods, *(tree.method for tree in trees)])
    return {label: {"name": method_name(label), "role": method_style(label).role} for label in by_label}


def _json(value: Any) -> str:
    """JSON that cannot end the script element it is in."""
    text = msgspec.json.encode(value).decode()
    # "</script>" in a string would end the element; the last two were line ends to JavaScript before 2019.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _content_security_policy(style: str, script: str) -> str:
    # The digests allow the page's own style and script and no others, so HTML that slipped in could not run anything.
    return (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _theme() -> str:
    colours = "".join(f"--{role}:light-dark({light},{dark});" for role, (light, dark) in COLOURS.items())
    return f":root{{{colours}}}\n"


def _subject(results: RunResults) -> str:
    """The run's name, environment and date, those that its provenance has."""
    provenance = results.provenance if isinstance(results.provenance, dict) else {}
    config = provenance.get("config") if isinstance(provenance.get("config"), dict) else {}
    environment = provenance.get("environment") or config.get("environment")
    if isinstance(environment, dict):
        environment = environment.get("name")
    words = [word for word in (results.name, environment, provenance.get("date")) if isinstance(word, str)]
    return " · ".join(words)


def _asset(file: str) -> str:
    return resources.files("jaxprm.report").joinpath(file).read_text(encoding="utf-8")


def _write_figure(results: RunResults, directory: Path) -> None:
    """Write two panels, beam search and a scaling curve if they exist, as SVG (both themes) and PNG (light)."""
    scaling = sorted(panels.scaling_panels(results), key=lambda panel: FIGURE_ORDER.index(panel.title))
    shown = panels.non_empty([panels.beam_panel(results), *scaling])[:2]
    if not shown:
        return
    limits = shared_limits(shown)
    for colour, file in ((themed_colour, "figure.svg"), (light_colour, "figure.png")):
        figure, all_axes = canvas(len(shown), colour=colour, width=440 * len(shown), height=330)
        for axes, panel in zip(all_axes, shown, strict=True):
            draw_on(axes, replace(panel, limits=limits), colour=colour)
        legend_on(figure, shown, colour=colour)
        if file.endswith("svg"):
            _write(directory / file, standalone_svg(figure, headline(results).claim).encode())
        else:
            figure.savefig(directory / file, dpi=160, facecolor=COLOURS["paper"][0])


def _write(path: Path, content: bytes) -> None:
    with staged_file(path, overwrite=True) as file:
        file.write(content)
