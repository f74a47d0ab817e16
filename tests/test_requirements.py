"""What the package imports is what requirements.txt and pyproject.toml install."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
# For `export --verify`, `bench search`, `plan` and `build --beam`, each of which says so where it is missing.
OPTIONAL = {"torch", "libtpu", "apache_beam"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=;!~]", name.strip())[0]).lower()


def imported() -> set[str]:
    """Top-level names of every import statement of the package."""
    found = set()
    for path in [*(ROOT / "jaxprm").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"jaxprm", "data_pipeline"}


def test_every_import_is_declared():
    """A module that only comes with something else is missing on somebody's machine."""
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    provided = packages_distributions()
    for declared in ({canonical(pin) for pin in pins}, {canonical(one) for one in project["dependencies"]}):
        missing = {
            name
            for name in imported() - OPTIONAL
            if not {canonical(one) for one in provided.get(name, [name])} & (declared | {"tensorflow"})
        }
        assert not missing
