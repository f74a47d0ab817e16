"""Packages, platform and commands of the notebook, on simulated machines."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from notebooks import colab
from tests.notebooks.notebook import ROOT

PINS = ["flax==0.12.8", "jax==0.10.2", "jaxlib==0.10.2", 'tensorflow-cpu==2.21.0; sys_platform == "linux"']
RANGE = ">=0.10,<0.11"


def select(tpu: bool = True, **installed: str) -> colab.Packages:
    return colab.packages(PINS, RANGE, installed, tpu=tpu)


def test_a_jax_in_the_range_is_kept():
    packages = select(jax="0.10.0", jaxlib="0.10.0", libtpu="0.0.40")
    assert packages == ([PINS[0], PINS[3]], ["jax==0.10.0", "jaxlib==0.10.0"], False)


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21"},
        {"jax": "0.11.0", "jaxlib": "0.11.0", "libtpu": "0.0.50"},
        {"jax": "0.10.2", "jaxlib": "0.10.1", "libtpu": "0.0.42"},
        {"jax": "0.10.2", "jaxlib": "0.10.2"},
    ],
    ids=["none", "old", "new", "mixed", "without-libtpu"],
)
def test_any_other_jax_is_replaced_by_the_pinned_one_with_libtpu(installed):
    packages = select(**installed)
    assert packages.replaces_jax and not packages.keep
    assert packages.install[1:3] == ["jax[tpu]==0.10.2", "jaxlib==0.10.2"]


def test_without_a_tpu_libtpu_is_not_required():
    assert select(tpu=False, jax="0.10.2", jaxlib="0.10.2").keep == ["jax==0.10.2", "jaxlib==0.10.2"]
    assert select(tpu=False).install == PINS


def test_the_full_tensorflow_is_not_overwritten():
    assert select(tensorflow="2.19.0").install[3] == 'tensorflow==2.21.0; sys_platform == "linux"'


@pytest.fixture
def pip(monkeypatch):
    """What pip is given to install and to keep. A test sets its exit code and stderr."""
    call = {"code": 0, "stderr": ""}

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        call["install"], call["keep"] = (Path(command[command.index(flag) + 1]).read_text() for flag in ("-r", "-c"))
        return subprocess.CompletedProcess(command, call["code"], "", call["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return call


def test_pip_gets_the_pins_and_this_jax_is_kept(pip):
    colab.Session(ROOT, "cpu").install()
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    markers = {line: Requirement(line).marker for line in lines}
    here = [line for line in lines if markers[line] is None or markers[line].evaluate()]
    assert pip["install"].splitlines() == [line for line in here if not line.startswith("jax")]
    assert pip["keep"].splitlines() == [line.split(";")[0] for line in here if line.startswith("jax")]
    assert len({Requirement(line).name for line in here}) == len(here)


def test_a_replaced_jax_that_is_imported_asks_for_a_restart(pip, monkeypatch):
    monkeypatch.setattr(colab, "_installed", lambda: {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21"})
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(colab.Stop, match="Restart session"):
        colab.Session(ROOT, "tpu").install()
    assert "jax[tpu]==" in pip["install"] and pip["keep"] == ""
    monkeypatch.delitem(sys.modules, "jax")
    colab.Session(ROOT, "tpu").install()


def test_an_error_of_pip_becomes_one_line(pip):
    pip |= {"code": 1, "stderr": "WARNING: a\nERROR: No matching distribution found for flax\nnote: b"}
    with pytest.raises(colab.Stop, match="^pip failed: ERROR: No matching distribution found for flax$"):
        colab.Session(ROOT, "cpu").install()


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 1))
    with pytest.raises(colab.Stop, match=r"Python 3\.14: the pins are for 3\.11, 3\.12 and 3\.13"):
        colab.Session(ROOT, "cpu").install()


def test_a_silent_fallback_to_the_cpu_is_rejected(monkeypatch):
    device = colab.Session(ROOT, "cpu").check_platform()
    assert device["platform"] == "cpu" and device["devices"] >= 1
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as a JAX without libtpu does by itself
    with pytest.raises(colab.Stop, match="JAX computes on cpu, but PLATFORM is tpu: .*v5e-1 TPU"):
        colab.Session(ROOT, "tpu").check_platform()


def test_a_failing_jax_is_reported_in_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("raise RuntimeError('first\\nthe chip is taken')")
    with pytest.raises(colab.Stop, match=r"^JAX finds no device \(the chip is taken\): .*Restart session"):
        colab.Session(tmp_path, "tpu").check_platform()


def run(script: str, **options) -> None:
    colab.Session(ROOT, "cpu").run([sys.executable, "-c", script], name="it", **options)


def test_output_and_memory_of_a_command_are_shown(capsys):
    run("import sys; x = bytearray(300_000_000); print('out'); print('erré', file=sys.stderr)")
    output = capsys.readouterr().out
    assert "out\n" in output and "erré\n" in output
    peak = float(output.split("largest process ")[1].split(" GB")[0])
    # A child starts as a copy of its parent, whose size counts as its own: small for a notebook, maybe not for tests.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.3 <= peak < max(1, own + 0.1) and "MORE" not in output


def test_too_much_memory_for_a_free_machine_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(colab, "HOST_LIMIT", 1e6)
    run("pass")
    assert "MORE than the" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, message",
    [
        ("raise SystemExit(75)", "run this cell again to resume"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed, probably because host memory ran out"),
        ("import sys; print('jaxprm: a: b\\n'); sys.exit(2)", "^it ended with status 2: jaxprm: a: b$"),
        ("import sys; sys.exit(1)", "status 1: no message"),
    ],
)
def test_a_command_that_fails_ends_the_cell_with_one_line(script, message, capsys):
    with pytest.raises(colab.Stop, match=message) as error:
        run(script)
    assert error.value._render_traceback_() == [f"stopped: {error.value}"]
    if "exit(1)" in script:
        run(script, accepted=(0, 1))


def test_a_secret_is_passed_in_the_environment_only(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "hf"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ['HF_TOKEN']], open({str(tmp_path / 'call')!r}, 'w'))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    colab.Session(ROOT, "cpu").push(Path("my-prm"), "me/prm", "hf_secret")
    arguments, token = json.loads((tmp_path / "call").read_text())
    assert arguments == ["upload", "me/prm", "my-prm", ".", "--private"] and token == "hf_secret"
    assert "hf_secret" not in capsys.readouterr().out and "HF_TOKEN" not in os.environ


def test_an_interrupt_reaches_the_command_and_ends_the_cell_with_one_line():
    command = "import time; print('begun', flush=True); time.sleep(60)"
    outer = f"from notebooks import colab; import sys, pathlib; s = colab.Session(pathlib.Path('.'), 'cpu')\n\
try: s.run([sys.executable, '-c', {command!r}], name='it')\nexcept colab.Stop as stop: print('stopped:', stop)"
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in output  # raised in the command, which was not killed
    assert output.splitlines()[-1] == "stopped: it was interrupted; run this cell again to resume"
