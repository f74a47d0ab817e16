"""Packages, the platform and commands of the notebook, on machines that are made up."""

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


def chosen(tpu: bool = True, **installed: str) -> colab.Packages:
    return colab.packages(PINS, RANGE, installed, tpu=tpu)


def test_a_jax_in_the_range_stays_as_it_is():
    found = chosen(jax="0.10.0", jaxlib="0.10.0", libtpu="0.0.40")
    assert found == ([PINS[0], PINS[3]], ["jax==0.10.0", "jaxlib==0.10.0"], False)


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21"},
        {"jax": "0.11.0", "jaxlib": "0.11.0", "libtpu": "0.0.50"},
        {"jax": "0.10.2", "jaxlib": "0.10.1", "libtpu": "0.0.42"},
        {"jax": "0.10.2", "jaxlib": "0.10.2"},
    ],
    ids=["none", "old", "new", "torn", "without-libtpu"],
)
def test_any_other_is_replaced_by_the_pinned_one_with_the_tpu_library(installed):
    found = chosen(**installed)
    assert found.exchanges_jax and not found.keep
    assert found.install[1:3] == ["jax[tpu]==0.10.2", "jaxlib==0.10.2"]


def test_without_a_tpu_no_tpu_library_is_asked_for():
    assert chosen(tpu=False, jax="0.10.2", jaxlib="0.10.2").keep == ["jax==0.10.2", "jaxlib==0.10.2"]
    assert chosen(tpu=False).install == PINS


def test_a_whole_tensorflow_is_not_written_over():
    assert chosen(tensorflow="2.19.0").install[3] == 'tensorflow==2.21.0; sys_platform == "linux"'


@pytest.fixture
def pip(monkeypatch):
    """What pip was asked to install and to keep; set its status and stderr."""
    asked = {"code": 0, "stderr": ""}

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        asked["install"], asked["keep"] = (Path(command[command.index(one) + 1]).read_text() for one in ("-r", "-c"))
        return subprocess.CompletedProcess(command, asked["code"], "", asked["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_the_projects_pins_go_to_pip_and_this_jax_stays(pip):
    colab.Session(ROOT, "cpu").install()
    lines = [one for one in (ROOT / "requirements.txt").read_text().splitlines() if one[0] != "#"]
    marks = {one: Requirement(one).marker for one in lines}
    here = [one for one in lines if marks[one] is None or marks[one].evaluate()]
    assert pip["install"].splitlines() == [one for one in here if not one.startswith("jax")]
    assert pip["keep"].splitlines() == [one.split(";")[0] for one in here if one.startswith("jax")]
    assert len({Requirement(one).name for one in here}) == len(here)


def test_an_exchanged_jax_asks_for_a_restart_where_the_notebook_has_it(pip, monkeypatch):
    monkeypatch.setattr(colab, "_installed", lambda: {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21"})
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(colab.Stop, match="Restart session"):
        colab.Session(ROOT, "tpu").install()
    assert "jax[tpu]==" in pip["install"] and pip["keep"] == ""
    monkeypatch.delitem(sys.modules, "jax")
    colab.Session(ROOT, "tpu").install()


def test_what_pip_says_is_one_line(pip):
    pip |= {"code": 1, "stderr": "WARNING: a\nERROR: No matching distribution found for flax\nnote: b"}
    with pytest.raises(colab.Stop, match="^pip failed: ERROR: No matching distribution found for flax$"):
        colab.Session(ROOT, "cpu").install()


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 1))
    with pytest.raises(colab.Stop, match=r"Python 3\.14: the pins are for 3\.11, 3\.12 and 3\.13"):
        colab.Session(ROOT, "cpu").install()


def test_a_cpu_that_jax_takes_without_a_word_is_refused(monkeypatch):
    found = colab.Session(ROOT, "cpu").check_platform()
    assert found["platform"] == "cpu" and found["devices"] >= 1
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as a JAX without libtpu does by itself
    with pytest.raises(colab.Stop, match="JAX computes on cpu, but PLATFORM is tpu: .*v5e-1 TPU"):
        colab.Session(ROOT, "tpu").check_platform()


def test_a_jax_that_cannot_begin_is_told_in_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("raise RuntimeError('first\\nthe chip is taken')")
    with pytest.raises(colab.Stop, match=r"^JAX finds no device \(the chip is taken\): .*Restart session"):
        colab.Session(tmp_path, "tpu").check_platform()


def run(script: str, **options) -> None:
    colab.Session(ROOT, "cpu").run([sys.executable, "-c", script], name="it", **options)


def test_a_command_shows_what_it_says_and_the_memory_it_took(capsys):
    run("import sys; x = bytearray(300_000_000); print('out'); print('erré', file=sys.stderr)")
    said = capsys.readouterr().out
    assert "out\n" in said and "erré\n" in said
    peak = float(said.split("largest process ")[1].split(" GB")[0])
    # A process begins as its parent, whose size counts as its own: a notebook's is small, that of tests may not be.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.3 <= peak < max(1, own + 0.1) and "MORE" not in said


def test_more_memory_than_a_free_machine_can_spare_is_said(capsys, monkeypatch):
    monkeypatch.setattr(colab, "HOST_LIMIT", 1e6)
    run("pass")
    assert "MORE than the" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, message",
    [
        ("raise SystemExit(75)", "run this cell again, and it goes on"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed, most likely for want of host memory"),
        ("import sys; print('jaxprm: a: b\\n'); sys.exit(2)", "^it ended with status 2: jaxprm: a: b$"),
        ("import sys; sys.exit(1)", "status 1: no word why"),
    ],
)
def test_a_command_that_fails_ends_the_cell_with_one_line(script, message, capsys):
    with pytest.raises(colab.Stop, match=message) as error:
        run(script)
    assert error.value._render_traceback_() == [f"stopped: {error.value}"]
    if "exit(1)" in script:
        run(script, fine=(0, 1))


def test_a_secret_goes_through_the_environment_and_over_no_command_line(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "hf"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ['HF_TOKEN']], open({str(tmp_path / 'asked')!r}, 'w'))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    colab.Session(ROOT, "cpu").push(Path("my-prm"), "me/prm", "hf_secret")
    arguments, token = json.loads((tmp_path / "asked").read_text())
    assert arguments == ["upload", "me/prm", "my-prm", ".", "--private"] and token == "hf_secret"
    assert "hf_secret" not in capsys.readouterr().out and "HF_TOKEN" not in os.environ


def test_an_interrupt_reaches_the_command_and_ends_the_cell_with_one_line():
    command = "import time; print('begun', flush=True); time.sleep(60)"
    outer = f"from notebooks import colab; import sys, pathlib; s = colab.Session(pathlib.Path('.'), 'cpu')\n\
try: s.run([sys.executable, '-c', {command!r}], name='it')\nexcept colab.Stop as stop: print('stopped:', stop)"
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in said  # the command's own, not a kill
    assert said.splitlines()[-1] == "stopped: it was interrupted; run this cell again, and it goes on"
