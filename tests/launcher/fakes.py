"""A cloud made of one small program: gcloud, curl, systemd, uv and the machine's python, by the name it is called by.

Every call is written down. Answers come from a scenario, a list of [words, answers]: the answers of the first whose
words, parted by " & ", are all in the call are used up one by one, the last again and again. An answer is [exit code
or "hang", output, error]. Without one, or with None, `gcloud storage` works on a folder, the secret is a file, and
everything else succeeds and says nothing.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = r"""#!%s -IS
import fcntl, os, sys  # and no more: it is started hundreds of times
home = os.environ["FAKE_HOME"]
me, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
line = " ".join([me, *arguments])
with open(home + "/calls", "a") as file:
    file.write(repr([me, *arguments]) + "\n")

def answer():
    with open(home + "/scenario", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rules = eval(file.read())
        for pattern, answers in rules:
            if all(part in line for part in pattern.split(" & ")):
                found = answers.pop(0) if len(answers) > 1 else answers[0]
                file.seek(0), file.truncate(), file.write(repr(rules))
                return found

def local(url):
    return home + "/bucket/" + url[5:] if url.startswith("gs://") else url

def tree(top):
    return sorted(os.path.relpath(os.path.join(d, f), top) for d, _, names in os.walk(top) for f in names)

def copy(source, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(source, "rb") as one, open(target, "wb") as other:
        other.write(one.read())

def missing(url):
    sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects: " + url)

def storage(verb, *rest):
    paths = [one for one in rest if not one.startswith("--")]
    flags = [one for one in rest if one.startswith("--")]
    if verb == "ls":
        path = local(paths[0])
        found = [paths[0]] if os.path.isfile(path) else [paths[0] + one for one in tree(path)]
        print("\n".join(found)) if found else missing(paths[0])
    elif verb == "cat":
        start = int(next((one[8:-1] for one in flags if one.startswith("--range=")), 0))
        text = open(local(paths[0])).read() if os.path.isfile(local(paths[0])) else missing(paths[0])
        sys.stdout.write(text[start:])
    elif verb == "cp" and paths[0] == "-":
        os.makedirs(os.path.dirname(local(paths[1])), exist_ok=True)
        open(local(paths[1]), "w").write(sys.stdin.read())
    elif verb == "cp":
        copy(local(paths[0]), local(paths[1])) if os.path.isfile(local(paths[0])) else missing(paths[0])
    elif verb == "rm":
        for one in paths:
            os.remove(local(one))
    elif verb == "rsync":
        source, target = map(local, paths)
        skip = "stages/" if "--exclude=^stages/.*" in flags else "\0"
        for one in tree(source):
            one.startswith(skip) or copy(source + "/" + one, target + "/" + one)
        if "--delete-unmatched-destination-objects" in flags:
            for one in set(tree(target)) - set(tree(source)):
                os.remove(target + "/" + one)

def command(name, *rest):
    if name == "curl" and "-o" in rest:
        with open(rest[rest.index("-o") + 1], "w") as file:
            file.write('mkdir -p "$UV_INSTALL_DIR" && cp "$FAKE_HOME/bin/uv" "$UV_INSTALL_DIR/uv"')
    elif name == "uv" and rest[0] == "venv":
        copy(sys.argv[0], rest[-1] + "/bin/python"), os.chmod(rest[-1] + "/bin/python", 0o755)
    elif name == "python" and rest[0] == "-m":
        print(dict(os.environ), file=open(home + "/environment", "w"))
        if script := os.environ.get("FAKE_RUN"):
            os.execvp("bash", ["bash", "-c", script, *rest])
    elif name == "gcloud" and rest[0] == "storage":
        storage(*rest[1:])
    elif name == "gcloud" and rest[:3] == ("secrets", "versions", "access"):
        sys.stdout.write(open(home + "/secret").read())

found = answer()
if found is None:
    command(me, *arguments)
else:
    sys.stdout.write(found[1]), sys.stderr.write(found[2])
    sys.stdout.flush(), sys.stderr.flush()
    if found[0] == "hang":
        import time
        open(home + "/hangs", "w").close()
        time.sleep(60)
    sys.exit(found[0])
"""


class Cloud:
    """A folder with the fakes, what they were asked, and the bucket."""

    def __init__(self, home: Path):
        self.home, self.bucket = home, home / "bucket"
        (home / "bin").mkdir(parents=True)
        for name in ("gcloud", "curl", "systemctl", "systemd-run", "uv"):
            path = home / "bin" / name
            path.write_text(PROGRAM % sys.executable)
            path.chmod(0o755)
        self.scenario([])

    def scenario(self, rules: list) -> None:
        (self.home / "scenario").write_text(repr(rules))

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
        """Of a shell that finds the fakes first; waits are as good as none."""
        waits = dict.fromkeys(["POLL_SECONDS", "RETRY_SECONDS", "RESTART_SECONDS"], "0")
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAXPRM", "CLOUDSDK"))}
        return plain | waits | {"PATH": path, "FAKE_HOME": str(self.home), "SYNC_SECONDS": "500"} | more


def checkout(folder: Path) -> Path:
    """A user's clone: the launcher, a config that is committed and one that is not."""
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
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    (folder / "configs" / "mine.py").write_text("config = 2\n")
    return folder
