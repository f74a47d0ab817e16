"""Every command line that a page names exists, and every link leads somewhere."""

from __future__ import annotations

import re

import pytest

from data_pipeline import build, splits
from jaxprm import arguments as arguments_lib
from jaxprm import cli, config
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT

SOURCES = [*PAGES, *sorted((ROOT / "configs").glob("*.py"))]
ids = lambda path: path.name


def jaxprm_commands() -> list[tuple[str, list[str]]]:
    return [
        (path.name, arguments)
        for path in SOURCES
        for arguments in pages.command_lines(path.read_text(encoding="utf-8"), "jaxprm")
        if arguments[0] != "VERB"
    ]


def headings(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+)$", unfenced, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_pages_name_every_verb():
    verbs = set(cli.VERBS)
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert verbs == {verb for verb in verbs if re.search(rf"\b{verb}\b", text)}
    assert {arguments[0] for _, arguments in jaxprm_commands()} <= verbs
    assert len(jaxprm_commands()) > 12


@pytest.mark.parametrize("page, arguments", jaxprm_commands(), ids=lambda value: str(value)[:60])
def test_every_command_parses(page, arguments):
    options = arguments_lib.parser().parse_args([pages.shown(argument) for argument in arguments])
    path = getattr(options, "config", None)
    if path is not None and (ROOT / path).is_file():
        loaded = config.load(ROOT / path, options.overrides, quick=getattr(options, "quick", False))
        assert loaded.name


def test_benchmarks_are_run_as_modules():
    """By its path a script does not find the package beside it: nothing is installed but the requirements."""
    named = set()
    for path in (*PAGES, *(ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"python \S*benchmarks/", text), path
        named |= set(re.findall(r"python -m benchmarks\.(\w+)", text))
    assert named and all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in named)


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_option_is_on_the_command_line_page(verb):
    """From the other side: what the parser knows is documented."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    choices = next(action.choices for action in arguments_lib.parser()._actions if action.choices)
    options = {option for action in choices[verb]._actions for option in action.option_strings}
    named = [line for line in page.splitlines() if f"jaxprm {verb} " in line or verb in cli.STAGE_VERBS]
    missing = {option for option in options - {"-h", "--help"} if not any(option in line for line in named)}
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_make_target_exists(path):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^ {4,})make ([a-z][a-z-]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


def test_the_make_targets_are_on_the_command_line_page():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert {"demo", "demo-quick", "test", "test-all"} <= set(re.findall(r"`make ([a-z-]+)`", text))


def test_the_build_command_parses():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    found = pages.command_lines(text, "data_pipeline.build")
    assert found
    for arguments in found:
        options = build._arguments(arguments)
        assert set(splits.parse_inputs(options.input)) in ({"train", "validation"}, {None})


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_resolve(path):
    text = path.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not linked.is_file() or (anchor and anchor not in headings(linked.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_files_that_are_named_exist(path):
    """Paths inside the project, in backquotes: `configs/forkme.py`."""
    named = re.findall(r"`((?:configs|data_pipeline|jaxprm|tests|docs)/[\w/.-]+\.\w+)`", path.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []
