"""requirements.txt and pyproject.toml install every package that is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each belongs to an option or a verb that reports it if it is missing.
EXTRAS = {"verify": {"torch"}, "serve": {"h11", "prometheus_client", "starlette", "uvicorn"}, "wandb": {"wandb"}}
OPTIONAL = {"libtpu", "apache_beam"}.union(*EXTRAS.values())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=;!~]", name.strip())[0]).lower()


def imported() -> set[str]:
    """Top-level names of every import statement of the package."""
    modules = set()
    for path in [*(ROOT / "jaxprm").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"jaxprm", "data_pipeline"}


def test_every_import_is_declared():
    """A module that is only installed by another package can be missing on a user's machine."""
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    provided = packages_distributions()
    for declared in ({canonical(pin) for pin in pins}, {canonical(line) for line in project["dependencies"]}):
        missing = {
            name
            for name in imported() - OPTIONAL
            if not {canonical(package) for package in provided.get(name, [name])} & (declared | {"tensorflow"})
        }
        assert not missing


def test_imports_of_a_single_verb_are_its_extra_and_pinned_for_tests():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = {canonical(line) for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if "==" in line}
    for extra, names in EXTRAS.items():
        assert {canonical(line) for line in extras[extra]} == {canonical(name) for name in names} <= pins
        assert names <= imported()
