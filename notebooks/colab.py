"""What the Colab notebook does around jaxprm: packages, the platform, and commands in processes of their own.

It is imported before anything is installed, so it needs the standard library and `packaging` alone. The notebook's own
process never imports JAX: the chip belongs to one process at a time, what a command took it gives back when it ends,
and packages may be exchanged under a notebook that runs.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PYTHONS = ((3, 11), (3, 12), (3, 13))
HOST_LIMIT = 10e9  # bytes; processes on a free Colab machine die near 12 GB
RESUMABLE = 75  # jaxprm's status of a run that was told to stop and has saved
_WATCHED = ("jax", "jaxlib", "libtpu", "tensorflow")
_PROBE = """
import json, jax
devices = jax.devices()
limit = (devices[0].memory_stats() or {}).get("bytes_limit")
found = {"platform": devices[0].platform, "kind": devices[0].device_kind, "devices": len(devices), "memory": limit}
print(json.dumps(found | {"jax": jax.__version__}))
"""


class Stop(Exception):
    """Ends a cell, and what would follow it, with one line."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in the place of a traceback."""
        return [f"stopped: {self}"]


class Packages(NamedTuple):
    """install: lines for pip; keep: what must stay as it is; exchanges_jax: whether jax is among the first."""

    install: list[str]
    keep: list[str]
    exchanges_jax: bool


def packages(pins: Sequence[str], allowed_jax: str, installed: Mapping[str, str], *, tpu: bool) -> Packages:
    """What to install beside what the machine brings.

    A jax in the range `allowed_jax`, with its jaxlib, and on a TPU with libtpu, is left alone; any other is replaced by
    the pinned one, on a TPU as `jax[tpu]`. Where the whole of TensorFlow is there, it is brought to the pinned version
    instead of `tensorflow-cpu`, which writes the same files.

    pins: requirements of exact versions; installed: versions by name, of jax, jaxlib, libtpu and tensorflow.
    """
    version = installed.get("jax", "")
    kept = bool(version) and SpecifierSet(allowed_jax).contains(version) and installed.get("jaxlib") == version
    kept = kept and (not tpu or "libtpu" in installed)
    lines = []
    for line in pins:
        name = Requirement(line).name
        if name in ("jax", "jaxlib") and kept:
            continue
        if name == "jax" and tpu:
            line = line.replace("jax==", "jax[tpu]==", 1)
        if name == "tensorflow-cpu" and "tensorflow" in installed:
            line = line.replace("tensorflow-cpu==", "tensorflow==", 1)
        lines.append(line)
    return Packages(lines, [f"{name}=={version}" for name in ("jax", "jaxlib")] if kept else [], not kept)


@dataclass(frozen=True)
class Session:
    """The project's folder, and the platform that its commands compute on: "tpu" or "cpu"."""

    root: Path
    platform: str

    def install(self) -> None:
        """Installs what requirements.txt pins into this Python, but for a jax that will do. Raises Stop."""
        if sys.version_info[:2] not in PYTHONS:
            found = ".".join(map(str, sys.version_info[:2]))
            raise Stop(f"Python {found}: the pins are for 3.11, 3.12 and 3.13; choose a runtime with one of them")
        lines = (self.root / "requirements.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#") and _here(line)]
        chosen = packages(pins, self._allowed_jax(), _installed(), tpu=self.platform == "tpu")
        jax = ", ".join(chosen.keep) + " stay" if chosen.keep else "jax as pinned"
        print(f"installing {len(chosen.install)} packages, {jax}; minutes, the first time", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            wanted, kept = Path(folder, "requirements.txt"), Path(folder, "constraints.txt")
            wanted.write_text("\n".join(chosen.install), encoding="utf-8")
            kept.write_text("\n".join(chosen.keep), encoding="utf-8")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            done = subprocess.run([*pip, "-r", wanted, "-c", kept], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Stop(f"pip failed: {(errors or done.stderr.splitlines() or ['no word why'])[-1]}")
        if chosen.exchanges_jax and "jax" in sys.modules:
            raise Stop("this notebook has imported the jax that was exchanged: Runtime > Restart session, then Run all")

    def _allowed_jax(self) -> str:
        with open(self.root / "pyproject.toml", "rb") as file:
            needed = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"] if _here(line)]
        return str(next(one.specifier for one in needed if one.name == "jax"))

    def check_platform(self) -> dict[str, Any]:
        """{"platform", "kind", "devices", "memory" in bytes or None, "jax"} of what JAX computes on.

        Raises Stop when that is not what was asked for: a JAX that finds no TPU takes the CPU and says nothing.
        """
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=self.environment(), capture_output=True, text=True, check=False
        )
        fix = "Runtime > Change runtime type > v5e-1 TPU; if it is one, Runtime > Restart session lets go of the chip"
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no word why"])[-1]
            mend = fix if self.platform == "tpu" else "run the cell Packages again"
            raise Stop(f"JAX finds no device ({said}): {mend}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if found["platform"] != self.platform:
            raise Stop(f"JAX computes on {found['platform']}, but PLATFORM is {self.platform}: {fix}")
        return found

    def environment(self, **more: str) -> dict[str, str]:
        """Of the commands. What is secret goes this way, and never over a command line."""
        path = os.pathsep.join(filter(None, (str(self.root), os.environ.get("PYTHONPATH"))))
        found = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg"} | more
        return found | ({"JAX_PLATFORMS": "cpu"} if self.platform == "cpu" else {})

    def jaxprm(self, *arguments: object, fine: Sequence[int] = (0,)) -> None:
        """Runs `python -m jaxprm ...`, showing what it says; raises Stop where its status is not `fine`."""
        self.run([sys.executable, "-m", "jaxprm", *map(str, arguments)], name=str(arguments[0]), fine=fine)

    def run(self, command: Sequence[str], *, name: str, fine: Sequence[int] = (0,), **secrets: str) -> None:
        """Runs a command as `jaxprm` does, with `secrets` in its environment; tells the memory that it took."""
        process = subprocess.Popen(
            command, env=self.environment(**secrets), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        try:
            last = _show(process)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            _show(process)
            process.wait()
            raise Stop(f"{name} was interrupted; run this cell again, and it goes on") from None
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        over = "" if peak < HOST_LIMIT else f", MORE than the {HOST_LIMIT / 1e9:.0f} GB that a free machine can spare"
        print(f"[{name}: host memory of its largest process {peak / 1e9:.1f} GB{over}]", flush=True)
        if code == RESUMABLE:
            raise Stop(f"{name} was told to stop and has saved; run this cell again, and it goes on")
        if code == -signal.SIGKILL:
            raise Stop(f"{name} was killed, most likely for want of host memory; it goes on when the cell is run again")
        if code not in fine:
            raise Stop(f"{name} ended with status {code}: {last or 'no word why'}")

    def base_model(self, model: str) -> Path:
        """The directory of a model, downloaded if it is a name on the hub. Raises Stop."""
        script = "import sys; from jaxprm.hf import hub; print(hub.resolve(sys.argv[1], what='base model'))"
        done = subprocess.run(
            [sys.executable, "-c", script, model], env=self.environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Stop((done.stderr.strip().splitlines() or ["no word why"])[-1])
        return Path(done.stdout.strip().splitlines()[-1])

    def push(self, directory: Path, repository: str, token: str) -> None:
        """Uploads a model to a private repository of the hub, which is made if it is not there. Raises Stop."""
        hf = Path(sys.executable).with_name("hf")
        command = [str(hf if hf.exists() else "hf"), "upload", repository, str(directory), ".", "--private"]
        self.run(command, name="upload", HF_TOKEN=token)


def on_colab() -> bool:
    """Whether Colab's own package is there."""
    return importlib.util.find_spec("google") is not None and importlib.util.find_spec("google.colab") is not None


def _here(line: str) -> bool:
    """Whether a requirement is for this Python and machine."""
    marker = Requirement(line).marker
    return marker is None or marker.evaluate()


def _installed() -> dict[str, str]:
    found = {}
    for name in _WATCHED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _show(process: subprocess.Popen) -> str:
    """Prints what a process says as it says it; returns the last line that is not empty."""
    decoder, tail = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := os.read(process.stdout.fileno(), 65536):
        text = decoder.decode(chunk)
        print(text, end="", flush=True)
        tail = (tail + text)[-4000:]
    return next((line for line in reversed(tail.splitlines()) if line.strip()), "")
