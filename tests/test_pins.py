"""The pins of requirements.txt and requirements-dev.txt, for every supported Python; nothing is downloaded."""

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
PLATFORMS = [pytest.param(python, machine, id=f"{python}-{machine}") for python in PYTHONS for machine in MACHINES]
FILES = {"runtime": ("requirements.txt",), "development": ("requirements.txt", "requirements-dev.txt")}
# Beam runs in a separate environment, see tests/data_pipeline/beam_environment.py.
UNPINNED = {"beam"}


def lines(name: str) -> list[Requirement]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and line[0] not in "#-"]


def platform(python: str, machine: str) -> dict[str, str]:
    return MACHINES[machine] | {"python_version": python, "python_full_version": f"{python}.0"}


def applies(requirement: Requirement, environment: dict[str, str], extra: str = "") -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({**environment, "extra": extra})


def pinned(environment: dict[str, str], which: str = "development") -> dict[str, Version]:
    """The version of every package that is installed in an environment."""
    pins = [pin for name in FILES[which] for pin in lines(name) if applies(pin, environment)]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


@pytest.mark.parametrize("name", FILES["development"])
def test_a_pin_is_one_released_version(name):
    assert lines(name)
    for pin in lines(name):
        assert re.fullmatch(r"==[0-9.]+", str(pin.specifier)), f"{pin}: not one exact released version"
        assert not pin.extras and not pin.url, pin


@pytest.mark.parametrize(("python", "machine"), PLATFORMS)
def test_a_package_is_pinned_once_on_each_machine(python, machine):
    environment = platform(python, machine)
    pins = [pin for name in FILES["development"] for pin in lines(name) if applies(pin, environment)]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_a_pin_is_for_some_supported_python():
    environments = [platform(python, machine) for python in PYTHONS for machine in MACHINES]
    for name in FILES["development"]:
        assert not [
            str(pin) for pin in lines(name) if not any(applies(pin, environment) for environment in environments)
        ]


@pytest.mark.parametrize(("python", "machine"), PLATFORMS)
def test_every_dependency_is_pinned_in_its_range(python, machine):
    environment = platform(python, machine)
    pins = pinned(environment, "runtime")
    needed = [
        dependency for dependency in map(Requirement, PROJECT["dependencies"]) if applies(dependency, environment)
    ]
    assert {canonicalize_name(dependency.name) for dependency in needed} <= pins.keys()
    wrong = [
        str(dependency) for dependency in needed if pins[canonicalize_name(dependency.name)] not in dependency.specifier
    ]
    assert not wrong


@pytest.mark.parametrize(("python", "machine"), PLATFORMS)
def test_every_runtime_pin_is_a_dependency(python, machine):
    """Except jaxlib, which comes with jax in the same version."""
    environment = platform(python, machine)
    dependencies = map(Requirement, PROJECT["dependencies"])
    needed = {canonicalize_name(dependency.name) for dependency in dependencies if applies(dependency, environment)}
    pins = pinned(environment, "runtime")
    assert pins.keys() - needed == {"jaxlib"} and pins["jaxlib"] == pins["jax"]


@pytest.mark.parametrize(("python", "machine"), PLATFORMS)
@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - UNPINNED))
def test_extras_are_pinned_in_their_range(python, machine, extra):
    pins = pinned(platform(python, machine))
    for dependency in map(Requirement, PROJECT["optional-dependencies"][extra]):
        assert pins[canonicalize_name(dependency.name)] in dependency.specifier, dependency


def test_the_same_pythons_are_named_everywhere():
    admitted = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 20)]
    assert [minor for minor in minors if f"{minor}.5" in admitted] == PYTHONS
    assert [".".join(map(str, version)) for version in colab.PYTHONS] == PYTHONS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (supported,) = re.findall(r"^SUPPORTED := .* not in \[(.*)\]\)$", makefile, re.MULTILINE)
    assert supported == ", ".join(f"({version.replace('.', ', ')})" for version in PYTHONS)
    listed = f"{', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    for text in (makefile, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"Python {listed} and nothing else" in text
    assert f"jaxprm needs Python {listed};" in makefile


@pytest.mark.parametrize("which", FILES)
def test_this_python_has_what_is_pinned(which):
    pins = pinned(dict(default_environment()), which)
    # The version of torch's CPU build has a suffix.
    installed = {name: Version(importlib.metadata.version(name).split("+")[0]) for name in pins}
    assert installed == pins


@pytest.mark.parametrize("which", FILES)
def test_the_pins_are_compatible_here(which):
    """The requirements of the pinned packages, on this Python. jax's extra `tpu` names the libtpu that fits it."""
    here = dict(default_environment())
    pins = pinned(here, which)
    for name in pins:
        extras = ("", "tpu") if name == "jax" else ("",)
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            required = canonicalize_name(requirement.name)
            if required in pins and any(applies(requirement, here, extra) for extra in extras):
                assert pins[required] in requirement.specifier, f"{name} {pins[name]} needs {requirement}"


def test_the_compiler_of_plans_is_the_one_that_jax_requires():
    here = dict(default_environment())
    required = [
        requirement
        for requirement in map(Requirement, importlib.metadata.requires("jax"))
        if requirement.name == "libtpu" and applies(requirement, here, "tpu")
    ]
    libtpu = pinned(here).get("libtpu", Version("0"))
    assert required and all(libtpu in requirement.specifier for requirement in required)
