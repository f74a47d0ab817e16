"""The pins hold together on Python 3.11, which the Makefile and the launcher take, and on 3.12, which is Colab's."""

from __future__ import annotations

import re
import subprocess

import pytest
from packaging.requirements import Requirement
from uv import find_uv_bin

from tests.notebooks.notebook import ROOT


def pins() -> dict[str, str]:
    """The version of every package that a Linux machine on x86-64 installs."""
    lines = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
    return {one.name: str(one.specifier) for one in lines if one.marker is None or one.marker.evaluate(machine)}


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extra", ["", "[tpu]"], ids=["jax", "jax[tpu]"])
def test_the_pins_resolve_to_wheels(tmp_path, python, extra):
    requirements = tmp_path / "requirements.txt"
    text = (ROOT / "requirements.txt").read_text()
    requirements.write_text(re.sub(r"^jax==", f"jax{extra}==", text, flags=re.MULTILINE))
    # The C library of Ubuntu 22.04, which Colab and Google's TPU images have.
    machine = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
    wheels = [part for name in pins() for part in ("--only-binary", name)]
    done = subprocess.run(
        [find_uv_bin(), "pip", "compile", "--no-header", "--no-annotate", *machine, *wheels, requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resolved = {one.name: str(one.specifier) for one in map(Requirement, done.stdout.split("\n")[:-1])}
    named = {name.replace("_", "-"): version for name, version in pins().items()}
    assert named.items() <= resolved.items()
    assert ("libtpu" in resolved) == bool(extra)


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_an_environment_with_beam_resolves(python):
    """Not with the pins, some of which are newer than Beam wants: with the ranges of pyproject.toml."""
    command = [find_uv_bin(), "pip", "compile", "--no-header", "--no-annotate", "--python-version", python]
    done = subprocess.run(
        [*command, "--extra", "beam", ROOT / "pyproject.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resolved = dict(line.split(" ")[0].split("==") for line in done.stdout.splitlines())
    assert resolved["apache-beam"].startswith("2.77.") and resolved["jax"].startswith("0.10.")
