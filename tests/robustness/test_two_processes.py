"""Two simultaneous processes with one output: the second is refused by name, and the first ends as if it were alone."""

import os
import shutil
from pathlib import Path

import pytest

from data_pipeline.locks import locked
from data_pipeline.output import lock_of
from jaxprm.workflow.workdir import WorkDirectory
from tests.robustness.conftest import contents

pytestmark = pytest.mark.slow
CONFIG = str(Path(__file__).parents[2] / "configs" / "textcraft_tiny.py")


def commands(inputs, work: Path) -> dict[str, tuple]:
    """By name: the command, and the output that the refusal names."""
    out, report = work / "out", work / "report.json"
    imports = ("import-trajectories", "--format", "openai", "--input", inputs.log)
    stages = {verb: ((verb, inputs.config, "--workdir", work / "w"), work / "w") for verb in ("collect", "report")}
    return stages | {
        "imitate": (("imitate", CONFIG, "--workdir", work / "w"), work / "w"),
        "score": (("score", "--model", inputs.model, "--input", inputs.trajectories, "--output", out), out),
        "export": (("export", "--model", inputs.model, "--output", out), out),
        "import": ((*imports, "--output", out), out),
        "import --json": ((*imports, "--output", out, "--json", report), report),
        "validate": (("validate", inputs.trajectories, "--json", report), report),
        "evaluate": (
            ("evaluate", "--model", inputs.model, "--input", inputs.trajectories, "--json", report, "--samples", 20),
            report,
        ),
        "bench": (("bench", "search", "--json", report, "--no-torch"), report),
        "plan": (("plan", CONFIG, "--topology", "v5e:1x1", "--json", report), report),
        "shards": (
            ("build-shards", "--input", inputs.trajectories, "--tokenizer", inputs.tokenizer, "--output", out),
            out,
        ),
    }


# They compute for long before their first event after the lock, so that this process holds it in their place.
SLOW = ("bench", "imitate", "plan")
NAMES = ("collect", "evaluate", "export", "import", "import --json", "report", "score", "shards", "validate")


@pytest.mark.parametrize("name", NAMES)
def test_the_second_process_is_refused(zygote, inputs, tmp_path, name):
    alone, together = tmp_path / "alone", tmp_path / "together"
    command, output = commands(inputs, together)[name]
    # The first event is the lock file, or the folder of it; a little later the lock is held.
    at = next(at for at in range(2, 8) if stop(zygote, together, command, at, output))
    first = zygote.run(together, *command, at=at, signal="SIGSTOP")
    assert first.status is None
    assert_refused(zygote.run(together, *command), output, first.pid)
    if name == "report":  # a whole run, which other tests finish
        zygote.kill(first.pid)
        return
    ended = zygote.wait(first.pid)
    assert ended.status == 0, ended.err[-2000:]
    assert zygote.run(alone, *commands(inputs, alone)[name][0]).status == 0
    expected, after = contents(alone), contents(together)
    for path in ("report.json", "w/config.json"):  # they name the input and the work directory
        expected.pop(path, None), after.pop(path, None)
    assert after == expected


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_verb_is_refused_before_its_work(zygote, inputs, tmp_path, name):
    command, output = commands(inputs, tmp_path)[name]
    with WorkDirectory(output).lock() if name == "imitate" else locked(output):
        assert_refused(zygote.run(tmp_path, *command), output, os.getpid())


def assert_refused(done, output: Path, holder: int) -> None:
    assert done.status == 2, done.err
    assert f"process {holder}" in done.last_line and str(output) in done.last_line
    assert "Traceback" not in done.err


def stop(zygote, folder: Path, command, at: int, output: Path) -> bool:
    """Whether the lock is held before event `at`. The folder is then as it was."""
    first = zygote.run(folder, *command, at=at, signal="SIGSTOP")
    assert first.status is None, first.err[-2000:]
    lock = output / "lock" if (output / "lock").exists() else lock_of(output)
    held = lock.exists() and lock.read_bytes() != b""
    zygote.kill(first.pid)
    shutil.rmtree(folder)
    return held
