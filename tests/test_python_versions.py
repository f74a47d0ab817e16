"""Other Pythons than the one that runs the tests: which one `make` selects, and a part of the tests on the newest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).parents[1]
SETTING, NEWEST = "JAXPRM_PYTHON313", "3.13"
# Quick tests without torch of the parts that use jax, flax, orbax, TensorFlow or transformers.
SUBSET = (
    "tests/model/test_transformer.py",
    "tests/training/test_step.py",
    "tests/artifacts/test_checkpoints.py",
    "tests/training/test_programs.py",
    "tests/scoring/test_engine.py",
    "tests/data_pipeline/test_batches.py",
    "tests/data_pipeline/test_build.py",
    "tests/test_pins.py::test_this_python_has_what_is_pinned[runtime]",
    "tests/test_pins.py::test_the_pins_are_compatible_here[runtime]",
)


def version_of(python: str | Path) -> str | None:
    """Version like "3.13", or None if it does not run: a name on the path may be a shim without a Python."""
    try:
        done = subprocess.run([python, "-V"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.match(r"Python (\d+\.\d+)\.", done.stdout)
    return match[1] if match and not done.returncode else None


def newest_python(environment: dict[str, str], home: Path) -> Path:
    """The interpreter named by the setting, else the first on PATH or in ~/.pyenv. Fails the test if there is none."""
    named = environment.get(SETTING)
    if named:
        candidates = [named]
    else:
        on_path = shutil.which(f"python{NEWEST}", path=environment.get("PATH", os.defpath))
        candidates = [*filter(None, [on_path]), *sorted(home.glob(f".pyenv/versions/{NEWEST}*/bin/python"))]
    for candidate in candidates:
        if version_of(candidate) == NEWEST:
            return Path(candidate)
    wrong = f"{SETTING}={named} is no Python {NEWEST}" if named else f"no Python {NEWEST} on PATH or in ~/.pyenv"
    pytest.fail(f"{wrong}: install it, or set {SETTING}=/path/to/python{NEWEST}")


def fake(folder: Path, name: str, version: str | None) -> Path:
    """A program that runs this Python but reports another version; with None, a program that does not run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if version is None:
        path.write_text("#!/bin/sh\nexit 127\n")
    else:
        pretended = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0);"
        path.write_text(
            f'#!/bin/sh\n[ "$1" = -V ] && {{ echo "Python {version}.0"; exit; }}\n'
            f'shift; exec "{sys.executable}" -c "{pretended} $*"\n'
        )
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `make` for the environment, with Pythons only in `folder`."""
    shutil.copy(ROOT / "Makefile", folder.parent)
    for name in ("sh", "touch"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name))
    return subprocess.run(
        [shutil.which("make"), *arguments, ".venv/bin/python"],
        cwd=folder.parent,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("installed", "selected"),
    [
        ({"python3.11": "3.11", "python3.13": "3.13", "python3": "3.13"}, "python3.11"),
        ({"python3.11": None, "python3.12": "3.12", "python3.13": "3.13"}, "python3.12"),
        ({"python3.13": "3.13", "python3": "3.14"}, "python3.13"),
        ({"python3": "3.12"}, "python3"),
        ({"python3.11": None, "python3": "3.13"}, "python3"),
    ],
)
def test_make_selects_the_first_supported_python(tmp_path, installed, selected):
    for name, version in installed.items():
        fake(tmp_path / "bin", name, version)
    done = make(tmp_path / "bin", "-n")
    assert f"{tmp_path}/bin/{selected} -m venv .venv\n" in done.stdout, done.stderr


@pytest.mark.parametrize("installed", [{}, {"python3": "3.10"}, {"python3": "3.14", "python3.11": None}], ids=str)
def test_make_says_which_pythons_it_needs(tmp_path, installed):
    (tmp_path / "bin").mkdir()
    for name, version in installed.items():
        fake(tmp_path / "bin", name, version)
    done = make(tmp_path / "bin")
    assert done.returncode and not (tmp_path / ".venv").exists()
    assert "jaxprm needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=/path/to/python3.13\n" in done.stdout


def test_make_rejects_an_unsupported_python(tmp_path):
    path = fake(tmp_path / "bin", "mine", "3.14")
    done = make(tmp_path / "bin", f"PYTHON={path}")
    assert done.returncode and "jaxprm needs Python 3.11, 3.12 or 3.13" in done.stdout


def test_the_newest_python_is_the_named_one_or_the_first_available(tmp_path):
    pyenv = fake(tmp_path / ".pyenv/versions/3.13.7/bin", "python", "3.13")
    shim, on_path = fake(tmp_path / "shims", "python3.13", None), fake(tmp_path / "bin", "python3.13", "3.13")
    other = fake(tmp_path / "other", "python", "3.12")
    assert newest_python({SETTING: str(pyenv), "PATH": str(on_path.parent)}, tmp_path) == pyenv
    assert newest_python({"PATH": str(on_path.parent)}, tmp_path) == on_path
    assert newest_python({"PATH": str(shim.parent)}, tmp_path) == pyenv
    for named in (other, tmp_path / "none"):
        with pytest.raises(pytest.fail.Exception, match=f"{SETTING}={named} is no Python 3.13"):
            newest_python({SETTING: str(named), "PATH": str(on_path.parent)}, tmp_path)
    with pytest.raises(pytest.fail.Exception, match=f"no Python 3.13 on PATH or in .*{SETTING}=/path/to/python3.13"):
        newest_python({"PATH": str(shim.parent)}, tmp_path / "empty")


@pytest.mark.slow
def test_a_part_of_the_tests_passes_on_the_newest_python(tmp_path):
    """And the quick demo, in a separate environment with the pins for that Python."""
    python, folder = newest_python(dict(os.environ), Path.home()), tmp_path / "venv"
    pins = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in pins if line.startswith(("pytest==", "pytest-xdist==", "hypothesis=="))]
    assert len(wanted) == 3
    run(find_uv_bin(), "venv", "--quiet", "--python", python, folder)
    venv_python = folder / "bin" / "python"
    install = [find_uv_bin(), "pip", "install", "--quiet", "--python", venv_python]
    run(*install, "-r", ROOT / "requirements.txt", *wanted)
    run(find_uv_bin(), "pip", "check", "--python", venv_python)
    output = run(venv_python, "-m", "pytest", "-q", "-m", "not slow", *SUBSET)
    assert re.search(r"^\d{2,} passed", output.splitlines()[-1]), output[-3000:]
    assert "DeprecationWarning" not in "".join(line for line in output.splitlines() if str(ROOT) in line)
    output = run(
        venv_python, "-m", "jaxprm", "run", "configs/textcraft_tiny.py", "--quick", "--workdir", tmp_path / "quick"
    )
    assert output.splitlines()[-1].endswith("quick/report/index.html") and "agentprm" in output


def run(*command: str | Path) -> str:
    """Output of a command, which does not get the environment variables of this Python."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))
    }
    done = subprocess.run(
        list(map(str, command)),
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout
