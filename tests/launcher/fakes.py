"""A fake cloud: one small program acts as gcloud, curl, systemd, uv or the machine's python, depending on its name.

Every call is recorded. Answers come from a scenario, a list of rules [words, answers]. The first rule applies whose
words, separated by " & ", are all in the call. Its answers are used one after another, the last one repeatedly. An
answer is [exit code or "hang", stdout, stderr]. Without a rule, or with the answer None, `gcloud storage` works on a
folder, the secret is a file, and all other calls succeed without output.
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
import fcntl, os, sys  # only these: the program is started hundreds of times
home = os.environ["FAKE_HOME"]
program, call = os.path.basename(sys.argv[0]), sys.argv[1:]
line = " ".join([program, *call])
with open(home + "/calls", "a") as file:
    file.write(repr([program, *call]) + "\n")

def answer():
    with open(home + "/scenario", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rules = eval(file.read())
        for pattern, answers in rules:
            if all(part in line for part in pattern.split(" & ")):
                result = answers.pop(0) if len(answers) > 1 else answers[0]
                file.seek(0), file.truncate(), file.write(repr(rules))
                return result

def local(url):
    return home + "/bucket/" + url[5:] if url.startswith("gs://") else url

def tree(top):
    return sorted(os.path.relpath(os.path.join(d, f), top) for d, _, names in os.walk(top) for f in names)

def copy(source, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(reader.read())

def missing(url):
    sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects: " + url)

def storage(verb, *arguments):
    paths = [argument for argument in arguments if not argument.startswith("--")]
    flags = [argument for argument in arguments if argument.startswith("--")]
    if verb == "ls":
        path = local(paths[0])
        urls = [paths[0]] if os.path.isfile(path) else [paths[0] + name for name in tree(path)]
        print("\n".join(urls)) if urls else missing(paths[0])
    elif verb == "cat":
        start = int(next((flag[8:-1] for flag in flags if flag.startswith("--range=")), 0))
        text = open(local(paths[0])).read() if os.path.isfile(local(paths[0])) else missing(paths[0])
        sys.stdout.write(text[start:])
    elif verb == "cp" and paths[0] == "-":
        os.makedirs(os.path.dirname(local(paths[1])), exist_ok=True)
        open(local(paths[1]), "w").write(sys.stdin.read())
    elif verb == "cp":
        copy(local(paths[0]), local(paths[1])) if os.path.isfile(local(paths[0])) else missing(paths[0])
    elif verb == "rm":
        for path in paths:
            os.remove(local(path))
    elif verb == "rsync":
        source, target = map(local, paths)
        skip = "stages/" if "--exclude=^stages/.*" in flags else "\0"
        for name in tree(source):
            name.startswith(skip) or copy(source + "/" + name, target + "/" + name)
        if "--delete-unmatched-destination-objects" in flags:
            for name in set(tree(target)) - set(tree(source)):
                os.remove(target + "/" + name)

def command(name, *arguments):
    if name == "curl" and "-o" in arguments:
        with open(arguments[arguments.index("-o") + 1], "w") as file:
            file.write('mkdir -p "$UV_INSTALL_DIR" && cp "$FAKE_HOME/bin/uv" "$UV_INSTALL_DIR/uv"')
    elif name == "uv" and arguments[0] == "venv":
        copy(sys.argv[0], arguments[-1] + "/bin/python"), os.chmod(arguments[-1] + "/bin/python", 0o755)
    elif name == "python" and arguments[0] == "-m":
        print(dict(os.environ), file=open(home + "/environment", "w"))
        if script := os.environ.get("FAKE_RUN"):
            os.execvp("bash", ["bash", "-c", script, *arguments])
    elif name == "gcloud" and arguments[0] == "storage":
        storage(*arguments[1:])
    elif name == "gcloud" and arguments[:3] == ("secrets", "versions", "access"):
        sys.stdout.write(open(home + "/secret").read())

result = answer()
if result is None:
    command(program, *call)
else:
    sys.stdout.write(result[1]), sys.stderr.write(result[2])
    sys.stdout.flush(), sys.stderr.flush()
    if result[0] == "hang":
        import time
        open(home + "/hangs", "w").close()
        time.sleep(60)
    sys.exit(result[0])
"""


class Cloud:
    """A folder with the fake programs, the record of their calls, and the bucket."""

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
