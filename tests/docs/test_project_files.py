"""Licence, citation, changelog and the page on the method agree with the package."""

from __future__ import annotations

import hashlib
import re
import tomllib
from typing import get_args, get_type_hints

import yaml

from tests.docs.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Of https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_licence_is_the_apache_text_and_the_package_names_it():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"] and paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (paper["authors"][0]["family-names"], len(paper["authors"])) == ("Xi", 15)


def test_the_newest_entry_of_the_changelog_is_this_version_or_unreleased():
    entries = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert entries[0] in ("Unreleased", PROJECT["version"])


def test_the_classifiers_say_typed_and_the_packages_are():
    assert "Typing :: Typed" in PROJECT["classifiers"]
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for package in ("jaxprm", "data_pipeline"):
        assert (ROOT / package / "py.typed").is_file() and "py.typed" in data[package]


def options(field: str, hint: object) -> set[str]:
    """Values that the config accepts for a field: those of its type, or the built-in names of the registry."""
    from jaxprm import objectives

    return set(objectives.OBJECTIVES if field == "objective" else get_args(hint))


def test_the_page_on_the_method_names_every_option():
    from jaxprm import config

    kind = getattr(config, "RewardModelConfig", None) or config.RewardModel
    text, hints = (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), get_type_hints(kind)
    for field in ("objective", "bootstrap", "target_update", "progress_gradient"):
        (described,) = re.findall(rf"^\*\*`{field}`\*\*(.*?)(?=^\*\*`|^## )", text, re.MULTILINE | re.DOTALL)
        accepted = options(field, hints[field])
        assert len(accepted) > 1
        assert {option for option in accepted if f"`{option}`" not in described} == set(), field


def test_the_page_on_the_method_claims_the_defaults_of_the_config():
    from jaxprm import config

    kind = getattr(config, "RewardModelConfig", None) or config.RewardModel
    text, settings = (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), kind(label="a")
    claims = re.findall(r"`(\w+)` (?:\||=) \"?([\w.-]*\w)", text)
    claimed = [(field, value) for field, value in claims if hasattr(settings, field)]
    assert len({field for field, _ in claimed}) >= 10
    for field, value in claimed:
        default = getattr(settings, field)
        assert default == (value if isinstance(default, str) else float(value)), field
