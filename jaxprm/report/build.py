"""Write WORKDIR/report: the page `index.html` and the figure `figure.svg`, `figure.png` for a README."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import msgspec

from data_pipeline.output import staged_file
from jaxprm.report import model_sections, panels, run_sections, search_sections
from jaxprm.report.figures import canvas, draw_on, legend_on, shared_limits
from jaxprm.report.headline import PREFERRED_BEAM, headline
from jaxprm.report.labels import COLOURS, look, name
from jaxprm.report.results import RunResults, SearchTree, load_results, load_trees, size_key
from jaxprm.report.svg import light_colour, standalone_svg, themed_colour

MAX_TREE_BYTES = 8_000_000
FIGURE_ORDER = ("Best of N prefixes", "Best of N whole trajectories", "Best of K at every step")
SECTIONS = (
    ("beam", "Beam search", search_sections.beam),
    ("scaling", "Scaling", search_sections.scaling),
    ("pairs", "Differences", search_sections.pairs),
    ("judgement", "Judgement", model_sections.judgement),
    ("training", "Training", model_sections.training),
    ("cost", "Cost", run_sections.cost),
    ("provenance", "Provenance", run_sections.provenance),
)


def build_report(workdir: Path) -> Path:
    """Write the report of a finished (or partly finished) run and return the path of its page.

    Reads WORKDIR/results.json and, if there, WORKDIR/search/trees.json. Shows the parts that exist and nothing else.
    Raises UserError when results.json is missing or when either file does not have its documented form.
    """
    workdir = Path(workdir)
    results = load_results(workdir / "results.json")
    trees = load_trees(workdir / "search" / "trees.json")
    directory = workdir / "report"
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "index.html"
    _write(page, render(results, trees).encode())
    _write_figure(results, directory)
    return page


def render(results: RunResults, trees: Sequence[SearchTree]) -> str:
    """The whole page as one string of HTML that loads nothing."""
    asset = _asset("template.html")
    style = _theme() + _asset("style.css")
    script = _asset("theme.js") + _asset("viewer.js")
    summary = headline(results)
    bodies = [(ident, title, write(results)) for ident, title, write in SECTIONS]
    shown, viewer = _viewer(trees)
    links = [("viewer", "Watch it choose")] if shown else []
    links += [(ident, title) for ident, title, body in bodies if body]
    return Template(asset).substitute(
        policy=escape(_policy(style, script)),
        title=escape(summary.claim),
        style=style,
        script=script,
        subject=escape(_subject(results)),
        nav="".join(f'<a href="#{ident}">{escape(text)}</a>' for ident, text in links),
        claim=escape(summary.claim),
        detail=escape(summary.detail),
        verdict=summary.verdict,
        result=search_sections.result(results),
        viewer=viewer,
        sections="".join(body for _, _, body in bodies),
        trees=_json(shown),
        names=_json(_looks(results, shown)),
    )


def _viewer(trees: Sequence[SearchTree]) -> tuple[list[SearchTree], str]:
    shown = _fitting(trees)
    if not shown:
        return [], ""
    note = ""
    if len(shown) < len(trees):
        note = f"This page holds {len(shown)} of {len(trees)} searches; all are in search/trees.json."
    return shown, Template(_asset("viewer.html")).substitute(note=escape(note))


def _fitting(trees: Sequence[SearchTree]) -> list[SearchTree]:
    """As many trees as keep the page loadable: MAX_TREE_BYTES of JSON, in the order given.

    The first seed goes before the others and the headline's beam before other sizes, whatever came out of a search.
    """
    seeds = list(dict.fromkeys(tree.seed for tree in trees))
    wanted = sorted(
        range(len(trees)),
        key=lambda at: (seeds.index(trees[at].seed), trees[at].beam != PREFERRED_BEAM, size_key(trees[at].beam)),
    )
    chosen, total = set(), 0
    for at in wanted:
        total += len(msgspec.json.encode(trees[at]))
        if total > MAX_TREE_BYTES:
            break
        chosen.add(at)
    return [tree for at, tree in enumerate(trees) if at in chosen]


def _looks(results: RunResults, trees: Sequence[SearchTree]) -> dict[str, dict[str, str]]:
    labels = dict.fromkeys([*results.methods, *(tree.method for tree in trees)])
    return {label: {"name": name(label), "role": look(label).role} for label in labels}


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(style: str, script: str) -> str:
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
    """What the run was about, as far as it says: its name, environment and date."""
    about = results.provenance if isinstance(results.provenance, dict) else {}
    config = about.get("config") if isinstance(about.get("config"), dict) else {}
    environment = about.get("environment") or config.get("environment")
    if isinstance(environment, dict):
        environment = environment.get("name")
    words = [word for word in (results.name, environment, about.get("date")) if isinstance(word, str)]
    return " · ".join(words)


def _asset(file: str) -> str:
    return resources.files("jaxprm.report").joinpath(file).read_text(encoding="utf-8")


def _write_figure(results: RunResults, directory: Path) -> None:
    """Two panels, beam search and a scaling curve if they exist, as SVG (both themes) and PNG (light)."""
    scaling = sorted(panels.scaling_panels(results), key=lambda panel: FIGURE_ORDER.index(panel.title))
    found = panels.present([panels.beam_panel(results), *scaling])[:2]
    if not found:
        return
    limits = shared_limits(found)
    for colour, file in ((themed_colour, "figure.svg"), (light_colour, "figure.png")):
        figure, axes = canvas(len(found), colour=colour, width=440 * len(found), height=330)
        for each, panel in zip(axes, found, strict=True):
            draw_on(each, replace(panel, limits=limits), colour=colour)
        legend_on(figure, found, colour=colour)
        if file.endswith("svg"):
            _write(directory / file, standalone_svg(figure, headline(results).claim).encode())
        else:
            figure.savefig(directory / file, dpi=160, facecolor=COLOURS["paper"][0])


def _write(path: Path, content: bytes) -> None:
    with staged_file(path, overwrite=True) as file:
        file.write(content)
