from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.fakes import Cloud, checkout
from tests.launcher.statement import disagreements

COMMON = "--name prm --project my-project --zone us-west4-a --bucket my-bucket".split()


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    return checkout(tmp_path_factory.mktemp("user") / "clone")


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud")


class Launcher:
    """launch_tpu.sh of a user's clone, in a fake cloud. After every run its last lines are compared with the ledger."""

    def __init__(self, clone: Path, cloud: Cloud):
        self.clone, self.cloud = clone, cloud
        self.stderr, self.unknown, self.started, self.earlier_calls = "", "", False, 0

    def start(self, verb: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """Starts it with the common options, in a session of its own; its stderr must be handed to `check`."""
        self.started, self.earlier_calls = True, len(self.cloud.calls())
        return subprocess.Popen(
            [str(self.clone / "launch_tpu.sh"), verb, *COMMON, *arguments],
            env=self.cloud.environment(**environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A background job of a shell ignores Ctrl-C, and its child processes inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __call__(
        self,
        verb: str,
        *arguments: str,
        text: str = "",
        code: int | None = 0,
        unknown: str | None = "",
        **environment: str,
    ) -> subprocess.CompletedProcess:
        """Runs it; checks the exit code and what it says about money; returns the finished process.

        code: None for any. unknown: see `statement.disagreements`.
        """
        process = self.start(verb, *arguments, **environment)
        stdout, stderr = process.communicate(text, timeout=60)
        assert code is None or process.returncode == code, (process.returncode, stdout, stderr)
        self.check(stderr, unknown)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def check(self, stderr: str, unknown: str | None = "") -> None:
        """Compares the last lines of a run with the ledger, unless it was refused before any call."""
        if len(self.cloud.calls()) > self.earlier_calls:
            self.stderr, self.unknown = stderr, unknown
            assert disagreements(stderr, self.cloud.ledger(), unknown) == [], stderr

    def commands(self) -> list[str]:
        """The gcloud commands so far that change something, one string each, temporary folders shortened."""
        temporary = re.compile(r"(?<=[ =])/\S*/(jaxprm-worker\.sh|code\.tar\.gz|command|claim)\b")
        calls = [temporary.sub(r"TMP/\1", " ".join(call)) for call in self.cloud.calls()]
        return [
            call for call in calls if not re.search(r"^auth list| describe | list | ls | cat |state/starting", call)
        ]


@pytest.fixture
def launch(clone: Path, cloud: Cloud) -> Iterator[Launcher]:
    """The launcher. At the end of the test, its last statement is compared with the ledger once more."""
    launcher = Launcher(clone, cloud)
    yield launcher
    if launcher.started and cloud.calls():
        assert disagreements(launcher.stderr, cloud.ledger(), launcher.unknown) == [], launcher.stderr
