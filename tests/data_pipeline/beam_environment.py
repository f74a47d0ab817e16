"""An environment with Apache Beam: it wants older packages than the project's lock, so it lies over the project's."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
# Of what is pinned, what Beam wants older.
OLDER = {"numpy", "pyarrow"}


@cache
def python() -> Path:
    """The interpreter of an environment in which Beam and what it needs come before the packages of this one.

    Made once, removed when the tests end.
    """
    folder = Path(mkdtemp(prefix="beam-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.split("==")[0] not in OLDER]
    (folder / "pins.txt").write_text("\n".join(pins))
    run(find_uv_bin(), "venv", "--quiet", "--python", sys.executable, folder / "venv")
    found = folder / "venv/bin/python"
    wanted = project["optional-dependencies"]["beam"]
    run(find_uv_bin(), "pip", "install", "--quiet", "--python", found, "--constraints", folder / "pins.txt", *wanted)
    below = next((folder / "venv/lib").glob("python*/site-packages")) / "project.pth"
    below.write_text(sysconfig.get_path("purelib") + "\n")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
