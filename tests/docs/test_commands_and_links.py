"""Every command line that a page names exists, and every link leads somewhere."""

from __future__ import annotations

import re

from data_pipeline import build, splits
from jaxprm import arguments as arguments_lib
from jaxprm import cli, config
from jaxprm.errors import UserError
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT

SOURCES = [*PAGES, *sorted((ROOT / "configs").glob("*.py"))]


def jaxprm_commands() -> list[tuple[str, list[str]]]:
    return [
        (path.name, arguments)
        for path in SOURCES
        for arguments in pages.command_lines(path.read_text(encoding="utf-8"), "jaxprm")
        if arguments[0] not in ("VERB", "--help")
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


def test_options_that_stand_for_a_field_name_it():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    command = "run c.py --workdir w --data a --model a --skip-bad --chat-template own --reasoning keep"
    options = arguments_lib.parser().parse_args([*command.split(), "--special-tokens", "break"])
    fields = [override.partition("=")[0] for override in cli._overrides(options)]
    names = ("data", "model", "chat-template", "reasoning", "special-tokens", "skip-bad")
    for option, field in zip(names, fields, strict=True):
        assert re.search(rf"^\| `--{option}\b.*\(`{re.escape(field)}`\)", text, re.MULTILINE), field


def test_every_command_parses_and_its_config_loads(capsys):
    failed = []
    for page, arguments in jaxprm_commands():
        try:
            options = arguments_lib.parser().parse_args([pages.shown(argument) for argument in arguments])
            path = getattr(options, "config", None)
            if path is not None and (ROOT / path).is_file():
                config.load(ROOT / path, options.overrides, quick=getattr(options, "quick", False))
        except (SystemExit, UserError) as error:
            failed.append((page, arguments, error if isinstance(error, UserError) else capsys.readouterr().err))
    assert failed == []


def test_benchmarks_are_run_as_modules():
    """A script that is run by its path cannot import the package, because only the requirements are installed."""
    named = set()
    for path in (*PAGES, *(ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"python \S*benchmarks/", text), path
        named |= set(re.findall(r"python -m benchmarks\.(\w+)", text))
    assert named and all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in named)


def test_every_option_is_on_the_command_line_page():
    """The parser's options are documented, not only the documented options known to the parser."""
    lines = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").splitlines()
    verbs = next(action.choices for action in arguments_lib.parser()._actions if action.choices)
    missing = []
    for verb, verb_parser in verbs.items():
        options = {option for action in verb_parser._actions for option in action.option_strings} - {"-h", "--help"}
        # The stage verbs share their options, which the page lists once.
        of_verb = [line for line in lines if f"jaxprm {verb} " in line or verb in cli.STAGE_VERBS]
        missing += [(verb, option) for option in options if not any(option in line for line in of_verb)]
    assert missing == []


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert set(re.findall(r"(?:`|^ {4,})make ([a-z][a-z-]*)", text, re.MULTILINE)) <= targets


def test_the_make_targets_are_on_the_command_line_page():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert {"demo", "demo-quick", "test", "test-all"} <= set(re.findall(r"`make ([a-z-]+)`", text))


def test_the_build_command_parses():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    commands = pages.command_lines(text, "data_pipeline.build")
    assert commands
    for arguments in commands:
        options = build._arguments(arguments)
        assert set(splits.parse_inputs(options.input)) in ({"train", "validation"}, {None})


def test_links_resolve():
    broken = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            if not linked.is_file() or (anchor and anchor not in headings(linked.read_text(encoding="utf-8"))):
                broken.append((path.name, target))
    assert broken == []


def test_named_files_exist():
    """Paths inside the project, in backquotes: `configs/forkme.py`."""
    pattern = r"`((?:configs|data_pipeline|jaxprm|tests|docs|benchmarks)/[\w/.-]+\.\w+)`"
    named = {(path.name, name) for path in PAGES for name in re.findall(pattern, path.read_text(encoding="utf-8"))}
    assert sorted((page, name) for page, name in named if not (ROOT / name).is_file()) == []
