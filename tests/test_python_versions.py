"""The Pythons beside the one that runs the tests: which one `make` takes, and a part of the tests on the newest."""

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
# Of each part that rests on jax, flax, orbax, TensorFlow or transformers, what is quick and needs no torch.
SUBSET = (
    "tests/model/test_transformer.py",
    "tests/training/test_step.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_programs.py",
    "tests/scoring/test_engine.py",
    "tests/data_pipeline/test_batches.py",
    "tests/data_pipeline/test_build.py",
    "tests/test_pins.py::test_this_python_has_what_is_pinned[runtime]",
    "tests/test_pins.py::test_the_pins_hold_together_here[runtime]",
)


def version_of(python: str | Path) -> str | None:
    """Like "3.13", or None where nothing runs: a name on the path may be a shim with nothing behind it."""
    try:
        done = subprocess.run([python, "-V"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.match(r"Python (\d+\.\d+)\.", done.stdout)
    return found[1] if found and not done.returncode else None


def newest_python(environment: dict[str, str], home: Path) -> Path:
    """The interpreter that the setting names, else the first that is found. One that is missing is a failure."""
    named = environment.get(SETTING)
    if named:
        found = [named]
    else:
        on_path = shutil.which(f"python{NEWEST}", path=environment.get("PATH", os.defpath))
        found = [*filter(None, [on_path]), *sorted(home.glob(f".pyenv/versions/{NEWEST}*/bin/python"))]
    for one in found:
        if version_of(one) == NEWEST:
            return Path(one)
    wrong = f"{SETTING}={named} is no Python {NEWEST}" if named else f"no Python {NEWEST} on PATH or in ~/.pyenv"
    pytest.fail(f"{wrong}: install one, or name it by {SETTING}=/path/to/python{NEWEST}")


def fake(folder: Path, name: str, version: str | None) -> Path:
    """A program that runs the Python of this test as if it were of another version; None: one that does not run."""
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
    """`make` of the environment, not run but shown, where only `folder` has Pythons."""
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
    ("there", "taken"),
    [
        ({"python3.11": "3.11", "python3.13": "3.13", "python3": "3.13"}, "python3.11"),
        ({"python3.11": None, "python3.12": "3.12", "python3.13": "3.13"}, "python3.12"),
        ({"python3.13": "3.13", "python3": "3.14"}, "python3.13"),
        ({"python3": "3.12"}, "python3"),
        ({"python3.11": None, "python3": "3.13"}, "python3"),
    ],
)
def test_make_takes_the_first_python_that_is_supported(tmp_path, there, taken):
    for name, version in there.items():
        fake(tmp_path / "bin", name, version)
    done = make(tmp_path / "bin", "-n")
    assert f"{tmp_path}/bin/{taken} -m venv .venv\n" in done.stdout, done.stderr


@pytest.mark.parametrize("there", [{}, {"python3": "3.10"}, {"python3": "3.14", "python3.11": None}], ids=str)
def test_make_says_which_pythons_it_needs(tmp_path, there):
    (tmp_path / "bin").mkdir()
    for name, version in there.items():
        fake(tmp_path / "bin", name, version)
    done = make(tmp_path / "bin")
    assert done.returncode and not (tmp_path / ".venv").exists()
    assert "jaxprm needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=/path/to/python3.13\n" in done.stdout


def test_make_refuses_a_named_python_that_is_not_supported(tmp_path):
    path = fake(tmp_path / "bin", "mine", "3.14")
    done = make(tmp_path / "bin", f"PYTHON={path}")
    assert done.returncode and "jaxprm needs Python 3.11, 3.12 or 3.13" in done.stdout


def test_the_newest_python_is_the_one_that_is_named_or_found(tmp_path):
    found = fake(tmp_path / ".pyenv/versions/3.13.7/bin", "python", "3.13")
    shim, on_path = fake(tmp_path / "shims", "python3.13", None), fake(tmp_path / "bin", "python3.13", "3.13")
    other = fake(tmp_path / "other", "python", "3.12")
    assert newest_python({SETTING: str(found), "PATH": str(on_path.parent)}, tmp_path) == found
    assert newest_python({"PATH": str(on_path.parent)}, tmp_path) == on_path
    assert newest_python({"PATH": str(shim.parent)}, tmp_path) == found
    for named in (other, tmp_path / "none"):
        with pytest.raises(pytest.fail.Exception, match=f"{SETTING}={named} is no Python 3.13"):
            newest_python({SETTING: str(named), "PATH": str(on_path.parent)}, tmp_path)
    with pytest.raises(pytest.fail.Exception, match=f"no Python 3.13 on PATH or in .*{SETTING}=/path/to/python3.13"):
        newest_python({"PATH": str(shim.parent)}, tmp_path / "empty")


@pytest.mark.slow
def test_a_part_of_the_tests_passes_on_the_newest_python(tmp_path):
    """And the quick demo, from end to end: in an environment of its own, with the pins for that Python."""
    python, folder = newest_python(dict(os.environ), Path.home()), tmp_path / "venv"
    pins = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in pins if line.startswith(("pytest==", "pytest-xdist==", "hypothesis=="))]
    assert len(wanted) == 3
    run(find_uv_bin(), "venv", "--quiet", "--python", python, folder)
    own = folder / "bin" / "python"
    install = [find_uv_bin(), "pip", "install", "--quiet", "--python", own]
    run(*install, "-r", ROOT / "requirements.txt", *wanted)
    run(find_uv_bin(), "pip", "check", "--python", own)
    said = run(own, "-m", "pytest", "-q", "-m", "not slow", *SUBSET)
    assert re.search(r"^\d{2,} passed", said.splitlines()[-1]), said[-3000:]
    assert "DeprecationWarning" not in "".join(line for line in said.splitlines() if str(ROOT) in line)
    said = run(own, "-m", "jaxprm", "run", "configs/textcraft_tiny.py", "--quick", "--workdir", tmp_path / "quick")
    assert said.splitlines()[-1].endswith("quick/report/index.html") and "agentprm" in said


def run(*command: str | Path) -> str:
    """What it prints. The environment of the tests' own Python is not passed on."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))
    }
    done = subprocess.run(
        list(map(str, command)),
        env=kept | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout
