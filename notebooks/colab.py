"""Support of the Colab notebook: installs packages, checks the platform, runs each command in a separate process.

The module is imported before anything is installed, so it needs only the standard library and `packaging`. The process
of the notebook never imports JAX: a chip belongs to one process at a time, a command releases its memory when it ends,
and packages can be replaced while the notebook runs.
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
RESUMABLE = 75  # exit status of a run that was asked to stop and has saved its state
_WATCHED = ("jax", "jaxlib", "libtpu", "tensorflow")
_PROBE = """
import json, jax
devices = jax.devices()
limit = (devices[0].memory_stats() or {}).get("bytes_limit")
facts = {"platform": devices[0].platform, "kind": devices[0].device_kind, "devices": len(devices), "memory": limit}
print(json.dumps(facts | {"jax": jax.__version__}))
"""


class Stop(Exception):
    """Ends a cell, and so the cells after it, with a message of one line."""

    def _render_traceback_(self) -> list[str]:
        """The text that IPython shows instead of a traceback."""
        return [f"stopped: {self}"]


class Packages(NamedTuple):
    """install: lines for pip; keep: pins of packages that must not change; replaces_jax: whether `install` has jax."""

    install: list[str]
    keep: list[str]
    replaces_jax: bool


def packages(pins: Sequence[str], allowed_jax: str, installed: Mapping[str, str], *, tpu: bool) -> Packages:
    """Selects the packages to install on a machine that already has some.

    A jax in the range `allowed_jax` is kept if its jaxlib has the same version and, on a TPU, libtpu is installed. Any
    other is replaced by the pinned one, on a TPU as `jax[tpu]`. If the full TensorFlow is installed, the pinned version
    of it is installed instead of `tensorflow-cpu`, because both write the same files.

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
    """The folder of the project, and the platform on which its commands compute: "tpu" or "cpu"."""

    root: Path
    platform: str

    def install(self) -> None:
        """Installs the pins of requirements.txt into this Python, except for a jax that can be kept. Raises Stop."""
        if sys.version_info[:2] not in PYTHONS:
            version = ".".join(map(str, sys.version_info[:2]))
            raise Stop(f"Python {version}: the pins are for 3.11, 3.12 and 3.13; choose a runtime with one of them")
        lines = (self.root / "requirements.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#") and _here(line)]
        chosen = packages(pins, self._allowed_jax(), _installed(), tpu=self.platform == "tpu")
        jax = "keeping " + ", ".join(chosen.keep) if chosen.keep else "with the pinned jax"
        print(f"installing {len(chosen.install)} packages, {jax}; the first time takes minutes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            requirements, constraints = Path(folder, "requirements.txt"), Path(folder, "constraints.txt")
            requirements.write_text("\n".join(chosen.install), encoding="utf-8")
            constraints.write_text("\n".join(chosen.keep), encoding="utf-8")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            done = subprocess.run(
                [*pip, "-r", requirements, "-c", constraints], capture_output=True, text=True, check=False
            )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Stop(f"pip failed: {(errors or done.stderr.splitlines() or ['no message'])[-1]}")
        if chosen.replaces_jax and "jax" in sys.modules:
            raise Stop("this notebook has imported the jax that was replaced: Runtime > Restart session, then Run all")

    def _allowed_jax(self) -> str:
        with open(self.root / "pyproject.toml", "rb") as file:
            dependencies = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"] if _here(line)]
        return str(next(requirement.specifier for requirement in dependencies if requirement.name == "jax"))

    def check_platform(self) -> dict[str, Any]:
        """Returns {"platform", "kind", "devices", "memory" in bytes or None, "jax"} of the devices that JAX uses.

        Raises Stop if the platform is another one: a JAX that finds no TPU uses the CPU without an error.
        """
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=self.environment(), capture_output=True, text=True, check=False
        )
        fix = (
            "Runtime > Change runtime type > v5e-1 TPU; if it is one already, Runtime > Restart session frees the chip"
        )
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["no message"])[-1]
            fix = fix if self.platform == "tpu" else "run the cell Packages again"
            raise Stop(f"JAX finds no device ({message}): {fix}")
        device = json.loads(done.stdout.strip().splitlines()[-1])
        if device["platform"] != self.platform:
            raise Stop(f"JAX computes on {device['platform']}, but PLATFORM is {self.platform}: {fix}")
        return device

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of the commands. Secrets are passed in it, because other processes can read a command line."""
        path = os.pathsep.join(filter(None, (str(self.root), os.environ.get("PYTHONPATH"))))
        variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg"} | more
        return variables | ({"JAX_PLATFORMS": "cpu"} if self.platform == "cpu" else {})

    def jaxprm(self, *arguments: object, accepted: Sequence[int] = (0,)) -> None:
        """Runs `python -m jaxprm ...` and shows its output. Raises Stop unless its exit status is in `accepted`."""
        self.run([sys.executable, "-m", "jaxprm", *map(str, arguments)], name=str(arguments[0]), accepted=accepted)

    def run(self, command: Sequence[str], *, name: str, accepted: Sequence[int] = (0,), **secrets: str) -> None:
        """Runs a command as `jaxprm` does, with `secrets` in its environment. Prints its peak host memory."""
        process = subprocess.Popen(
            command, env=self.environment(**secrets), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        try:
            last = _show(process)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            _show(process)
            process.wait()
            raise Stop(f"{name} was interrupted; run this cell again to resume") from None
        # `wait4` gives the memory of this process; `getrusage` would give the maximum over all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        over = "" if peak < HOST_LIMIT else f", MORE than the {HOST_LIMIT / 1e9:.0f} GB that are safe on a free machine"
        print(f"[{name}: host memory of its largest process {peak / 1e9:.1f} GB{over}]", flush=True)
        if code == RESUMABLE:
            raise Stop(f"{name} was stopped and has saved its state; run this cell again to resume")
        if code == -signal.SIGKILL:
            raise Stop(f"{name} was killed, probably because host memory ran out; run this cell again to resume")
        if code not in accepted:
            raise Stop(f"{name} ended with status {code}: {last or 'no message'}")

    def base_model(self, model: str) -> Path:
        """The directory of a model, downloaded if `model` is a name on the hub. Raises Stop."""
        script = "import sys; from jaxprm.hf import hub; print(hub.resolve(sys.argv[1], what='base model'))"
        done = subprocess.run(
            [sys.executable, "-c", script, model], env=self.environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Stop((done.stderr.strip().splitlines() or ["no message"])[-1])
        return Path(done.stdout.strip().splitlines()[-1])

    def push(self, directory: Path, repository: str, token: str) -> None:
        """Uploads a model to a private repository on the hub, which is created if it is missing. Raises Stop."""
        hf = Path(sys.executable).with_name("hf")
        command = [str(hf if hf.exists() else "hf"), "upload", repository, str(directory), ".", "--private"]
        self.run(command, name="upload", HF_TOKEN=token)


def on_colab() -> bool:
    """Whether the package `google.colab` is installed."""
    return importlib.util.find_spec("google") is not None and importlib.util.find_spec("google.colab") is not None


def _here(line: str) -> bool:
    """Whether a requirement is for this Python and machine."""
    marker = Requirement(line).marker
    return marker is None or marker.evaluate()


def _installed() -> dict[str, str]:
    versions = {}
    for name in _WATCHED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _show(process: subprocess.Popen) -> str:
    """Prints the output of a process as it comes; returns the last line that is not empty."""
    decoder, tail = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := os.read(process.stdout.fileno(), 65536):
        text = decoder.decode(chunk)
        print(text, end="", flush=True)
        tail = (tail + text)[-4000:]
    return next((line for line in reversed(tail.splitlines()) if line.strip()), "")
