"""An environment with Apache Beam, which needs older packages than requirements.txt has, on top of this one."""

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
# Pinned packages of which Beam needs an older version.
OLDER = {"numpy", "pyarrow"}


@cache
def python() -> Path:
    """The interpreter of an environment in which Beam's packages precede those of this one.

    Made once, and removed when the tests end.
    """
    folder = Path(mkdtemp(prefix="beam-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.split("==")[0] not in OLDER]
    (folder / "pins.txt").write_text("\n".join(pins))
    run(find_uv_bin(), "venv", "--quiet", "--python", sys.executable, folder / "venv")
    interpreter = folder / "venv/bin/python"
    packages = project["optional-dependencies"]["beam"]
    run(
        find_uv_bin(),
        "pip",
        "install",
        "--quiet",
        "--python",
        interpreter,
        "--constraints",
        folder / "pins.txt",
        *packages,
    )
    project_path = next((folder / "venv/lib").glob("python*/site-packages")) / "project.pth"
    project_path.write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
