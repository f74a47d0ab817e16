"""The wheel, installed into an empty environment, works away from the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because setuptools leaves build/ in the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("jaxprm", "data_pipeline", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(source / "dist"), str(source)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (built,) = (source / "dist").glob("jaxprm-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages_and_the_recipes(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "jaxprm", "data_pipeline", "configs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert packed == {name.replace("configs/", "jaxprm/recipes/") for name in tracked}


@pytest.mark.slow
def test_an_installed_wheel_runs_a_recipe_by_its_name(wheel, tmp_path):
    python = tmp_path / "environment/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "environment")], check=True)
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(ROOT / "requirements.txt")]
    subprocess.run([str(python), *install, str(wheel)], check=True, stdin=subprocess.DEVNULL)
    away = tmp_path / "away"
    away.mkdir()
    # Nothing of the clone may be importable.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    command = [str(python.with_name("jaxprm")), "run", "textcraft_tiny", "--quick", "--workdir", "work"]
    subprocess.run(command, cwd=away, env=clean, check=True, stdin=subprocess.DEVNULL)
    results = json.loads((away / "work/results.json").read_text())
    assert results["name"] == "textcraft_quick"
    assert "<svg" in (away / "work/report/index.html").read_text()
