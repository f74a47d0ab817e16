"""Runs commands in forked children, and kills, stops or starves them at a chosen point.

The libraries are imported once, before the forks: a child starts at once. Requests and answers are lines of JSON on
standard input and output.

A request: {"argv": [...], "folder": DIR, "at": N or null, "signal": name or null, "log": bool, "user": uid or null}.
`argv` is a command line of jaxprm, or of data_pipeline.build if it starts with "build-shards". Events are operations of
Python that create, open for writing, rename or remove something under DIR; before event number N, from 1, the child
sends itself the signal.

The answer: {"pid", "status", "err", "events": [path, ...] if log}. With SIGSTOP it comes when the child has stopped,
with the status null; {"wait": PID} continues it and answers when it has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


LIBRARIES = (
    "jax",
    "tensorflow",
    "data_pipeline.shards",
    "jaxprm.cli",
    "jaxprm.evaluation.evaluate",
    "jaxprm.export.export",
    "jaxprm.report",
    "jaxprm.scoring.files",
    "jaxprm.training.imitate",
    "jaxprm.training.train",
    "jaxprm.workflow.results",
    "jaxprm.workflow.run",
    "jaxprm.workflow.search_stage",
)


def watch(request: dict, events: Path) -> None:
    """Installs the hook that counts events and sends the signal."""
    count, folder = 0, request["folder"] + os.sep
    log = os.open(events, os.O_WRONLY | os.O_APPEND) if request["log"] else None

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if not os.path.abspath(path).startswith(folder):
            return
        count += 1
        if log is not None:
            os.write(log, json.dumps(os.path.abspath(path).removeprefix(folder)).encode() + b"\n")
        if count == request["at"]:
            os.kill(os.getpid(), signal.Signals[request["signal"]])

    sys.addaudithook(hook)


def child(request: dict, out: int, events: Path) -> None:
    """The life of a forked process. It never returns."""
    status = 70
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        if request["user"] is not None:
            os.setegid(request["user"])
            os.seteuid(request["user"])
        watch(request, events)
        verb, *arguments = request["argv"]
        if verb == "build-shards":
            from data_pipeline.build import main
        else:
            from jaxprm.cli import main

            arguments = [verb, *arguments]
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(pid: int, out: Path, events: Path, *, stops: bool) -> dict:
    _, code = os.waitpid(pid, os.WUNTRACED if stops else 0)
    answer = {"pid": pid, "status": None if os.WIFSTOPPED(code) else os.waitstatus_to_exitcode(code)}
    # Progress bars move with carriage returns.
    answer["err"] = out.read_text(errors="replace").replace("\r", "\n")
    return answer | {"events": [json.loads(line) for line in events.read_text().splitlines()]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in LIBRARIES:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(sys.stdin):
            request = json.loads(line)
            if "wait" in request:
                pid = request["wait"]
                os.kill(pid, signal.SIGCONT)
                out, events = (Path(folder) / f"{pid}.{name}" for name in ("out", "events"))
                answer = finish(pid, out, events, stops=False)
            else:
                out, events = (Path(folder) / f"{number}.{name}" for name in ("out", "events"))
                events.touch()
                descriptor = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600)
                pid = os.fork()
                if not pid:
                    child(request, descriptor, events)
                os.close(descriptor)
                answer = finish(pid, out, events, stops=request["signal"] == "SIGSTOP")
                if answer["status"] is None:
                    out.rename(Path(folder) / f"{pid}.out")
                    events.rename(Path(folder) / f"{pid}.events")
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
