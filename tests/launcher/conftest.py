from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.launcher.fakes import Cloud, checkout

COMMON = "--name prm --project my-project --zone us-west4-a --bucket my-bucket".split()


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    return checkout(tmp_path_factory.mktemp("user") / "clone")


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud")


class Launcher:
    """launch_tpu.sh of a user's clone, in a fake cloud."""

    def __init__(self, clone: Path, cloud: Cloud):
        self.clone, self.cloud = clone, cloud

    def __call__(self, verb: str, *arguments: str, text: str = "", code: int = 0, **environment: str):
        """Runs it with the common options; checks the exit code; returns the finished process."""
        process = subprocess.run(
            [str(self.clone / "launch_tpu.sh"), verb, *COMMON, *arguments],
            env=self.cloud.environment(**environment),
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == code, (process.returncode, process.stdout, process.stderr)
        return process

    def commands(self) -> list[str]:
        """The gcloud commands so far, one string each, temporary folders shortened."""
        temporary = re.compile(r"(?<=[ =])/\S*/(jaxprm-worker\.sh|code\.tar\.gz|command)\b")
        return [temporary.sub(r"TMP/\1", " ".join(call)) for call in self.cloud.calls()]


@pytest.fixture
def launch(clone: Path, cloud: Cloud) -> Launcher:
    return Launcher(clone, cloud)
