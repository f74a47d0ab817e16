"""A fake cloud for launch_tpu.sh and the script on the machine.

`program.py` acts as gcloud, curl, systemd, uv or the machine's python, depending on its name. It works on a folder, the
bucket, and on a ledger, the machines and secrets that exist. Every call is recorded.

A scenario of rules [words, answers] comes first. The first rule applies whose words, separated by " & ", are all in the
call, or that is "#N" for the N-th call. Its answers are used one after another, the last one repeatedly. An answer is
[exit code or "hang", stdout, stderr] for a call that does nothing else, the same with "after" at its end for a call
that does its work first, and None for a call without a fault.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Imported, so that Python compiles it once. -IS: without site packages.
PROGRAM = f"""#!{sys.executable} -IS
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import program
program.main()
"""
LEDGER = {
    "projects": ["my-project"],
    "zones": ["us-west4-a", "us-east1-d", "us-central1-a"],
    "unreachable": [],  # zones that do not answer; `list` leaves them out without a word
    "nodes": {},  # (zone, name) -> its life
    "queuedResources": {},
    "secrets": [],
    "lives": {"tpu-vm": [], "queued-resources": []},  # of the machines to be created, in order
    "kept_nodes": [],  # that a queued resource leaves behind when it is deleted
    "polls_of_delete": 0,
}


class Cloud:
    """A folder with the fake programs, the record of their calls, the bucket and the ledger."""

    def __init__(self, home: Path):
        self.home, self.bucket = home, home / "bucket"
        (home / "bin").mkdir(parents=True)
        for name in ("gcloud", "curl", "systemctl", "systemd-run", "uv"):
            path = home / "bin" / name
            path.write_text(PROGRAM)
            path.chmod(0o755)
        self.scenario([])
        self.change()

    def scenario(self, rules: list) -> None:
        (self.home / "scenario").write_text(repr(rules))

    def ledger(self) -> dict:
        path = self.home / "ledger"
        return ast.literal_eval(path.read_text()) if path.exists() else LEDGER

    def change(self, **entries) -> None:
        """Replaces entries of the ledger."""
        (self.home / "ledger").write_text(repr(self.ledger() | entries))

    def node(self, *life: str, zone: str = "us-west4-a", name: str = "prm") -> None:
        self.change(nodes=self.ledger()["nodes"] | {(zone, name): list(life)})

    def queue(self, *life: str, zone: str = "us-west4-a", name: str = "prm") -> None:
        self.change(queuedResources=self.ledger()["queuedResources"] | {(zone, name): list(life)})

    def calls(self, name: str = "gcloud") -> list[list[str]]:
        """The arguments of every call of a program, in order."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call[1:] for call in map(ast.literal_eval, lines) if call[0] == name]

    def put(self, name: str, text: str) -> None:
        path = self.bucket / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a shell that finds the fakes first, and does not wait between tries."""
        waits = dict.fromkeys(["POLL_SECONDS", "RETRY_SECONDS", "RESTART_SECONDS"], "0")
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAXPRM", "CLOUDSDK"))}
        return plain | waits | {"PATH": path, "FAKE_HOME": str(self.home), "SYNC_SECONDS": "500"} | more


def checkout(folder: Path) -> Path:
    """A user's clone: the launcher, a committed config and an uncommitted one."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "launch_tpu.sh", folder)
    for path in (ROOT / "scripts").glob("tpu_*"):
        shutil.copy(path, folder / "scripts")
    shutil.copy(ROOT / "requirements.txt", folder)
    (folder / "configs" / "textcraft_tiny.py").write_text("config = 1\n")
    (folder / ".gitignore").write_text("ignored/\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (folder / "configs" / "mine.py").write_text("config = 2\n")
    return folder
