"""The pins of requirements.txt and requirements-dev.txt, for every Python that is supported; nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from notebooks import colab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13"]
MACHINES = {
    "linux": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "mac": {"sys_platform": "darwin", "platform_machine": "arm64"},
}
PLACES = [pytest.param(python, machine, id=f"{python}-{machine}") for python in PYTHONS for machine in MACHINES]
FILES = {"runtime": ("requirements.txt",), "development": ("requirements.txt", "requirements-dev.txt")}
# Its environment is its own, see tests/data_pipeline/beam_environment.py.
UNPINNED = {"beam"}


def lines(name: str) -> list[Requirement]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and line[0] not in "#-"]


def place(python: str, machine: str) -> dict[str, str]:
    return MACHINES[machine] | {"python_version": python, "python_full_version": f"{python}.0"}


def holds(one: Requirement, where: dict[str, str], extra: str = "") -> bool:
    return one.marker is None or one.marker.evaluate({**where, "extra": extra})


def pinned(where: dict[str, str], which: str = "development") -> dict[str, Version]:
    """The version of every package that is installed there."""
    found = [one for name in FILES[which] for one in lines(name) if holds(one, where)]
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in found}


@pytest.mark.parametrize("name", FILES["development"])
def test_a_pin_is_one_released_version(name):
    assert lines(name)
    for one in lines(name):
        assert re.fullmatch(r"==[0-9.]+", str(one.specifier)), f"{one}: not one exact version that was released"
        assert not one.extras and not one.url, one


@pytest.mark.parametrize(("python", "machine"), PLACES)
def test_a_package_is_pinned_once_on_each_machine(python, machine):
    found = [one.name for name in FILES["development"] for one in lines(name) if holds(one, place(python, machine))]
    names = [canonicalize_name(name) for name in found]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_a_pin_is_for_some_supported_python():
    places = [place(python, machine) for python in PYTHONS for machine in MACHINES]
    for name in FILES["development"]:
        assert not [str(one) for one in lines(name) if not any(holds(one, where) for where in places)]


@pytest.mark.parametrize(("python", "machine"), PLACES)
def test_what_the_package_needs_is_pinned_in_its_range(python, machine):
    where = place(python, machine)
    pins = pinned(where, "runtime")
    needed = [one for one in map(Requirement, PROJECT["dependencies"]) if holds(one, where)]
    assert {canonicalize_name(one.name) for one in needed} <= pins.keys()
    wrong = [str(one) for one in needed if pins[canonicalize_name(one.name)] not in one.specifier]
    assert not wrong


@pytest.mark.parametrize(("python", "machine"), PLACES)
def test_what_is_pinned_for_use_is_needed(python, machine):
    """But jaxlib: it comes with jax, in the same version."""
    where = place(python, machine)
    needed = {canonicalize_name(one.name) for one in map(Requirement, PROJECT["dependencies"]) if holds(one, where)}
    pins = pinned(where, "runtime")
    assert pins.keys() - needed == {"jaxlib"} and pins["jaxlib"] == pins["jax"]


@pytest.mark.parametrize(("python", "machine"), PLACES)
@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - UNPINNED))
def test_extras_are_pinned_in_their_range(python, machine, extra):
    where = place(python, machine)
    pins = pinned(where)
    for one in map(Requirement, PROJECT["optional-dependencies"][extra]):
        assert pins[canonicalize_name(one.name)] in one.specifier, one


def test_the_same_pythons_are_named_everywhere():
    admitted = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 20)]
    assert [one for one in minors if f"{one}.5" in admitted] == PYTHONS
    assert [".".join(map(str, one)) for one in colab.PYTHONS] == PYTHONS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (supported,) = re.findall(r"^SUPPORTED := .* not in \[(.*)\]\)$", makefile, re.MULTILINE)
    assert supported == ", ".join(f"({one.replace('.', ', ')})" for one in PYTHONS)
    listed = f"{', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    for text in (makefile, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"Python {listed} and nothing else" in text
    assert f"jaxprm needs Python {listed};" in makefile


@pytest.mark.parametrize("which", FILES)
def test_this_python_has_what_is_pinned(which):
    pins = pinned(dict(default_environment()), which)
    # Of torch, the CPU's build has a version with an ending.
    installed = {name: Version(importlib.metadata.version(name).split("+")[0]) for name in pins}
    assert installed == pins


@pytest.mark.parametrize("which", FILES)
def test_the_pins_hold_together_here(which):
    """What the pinned packages ask of each other, on this Python. jax's extra `tpu` names the libtpu that fits it."""
    here = dict(default_environment())
    pins = pinned(here, which)
    for name in pins:
        for one in map(Requirement, importlib.metadata.requires(name) or []):
            wanted = canonicalize_name(one.name)
            if wanted in pins and any(holds(one, here, extra) for extra in ("", *(["tpu"] if name == "jax" else []))):
                assert pins[wanted] in one.specifier, f"{name} {pins[name]} needs {one}"


def test_the_compiler_of_plans_is_the_one_that_jax_wants():
    here = dict(default_environment())
    wanted = [
        one
        for one in map(Requirement, importlib.metadata.requires("jax"))
        if one.name == "libtpu" and holds(one, here, "tpu")
    ]
    assert wanted and all(pinned(here).get("libtpu", Version("0")) in one.specifier for one in wanted)
