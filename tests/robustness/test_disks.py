"""A full disk, a read-only one and one without permission: one line, exit 2, and afterwards the same command works."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.robustness.conftest import ROOT, contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root"),
]
NOBODY = 65534
CONFIG = str(ROOT / "configs" / "textcraft_tiny.py")
# Bytes of the work directory that fit: the run ends in another stage with each.
WORK_SIZES = (8, 60, 200, 700)


@contextmanager
def mounted(folder: Path, kilobytes: int):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True)
    if done.returncode:
        folder.rmdir()
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.fixture
def disk(inputs):
    """An empty tmpfs of 1 MB that other users can enter."""
    with mounted(inputs.folder / "disk", 1024) as folder:
        folder.chmod(0o755)
        yield folder


def commands(inputs, folder: Path) -> dict[str, tuple]:
    out, report = folder / "out", ("--json", folder / "report.json")
    return {
        "report": ("report", inputs.config, "--workdir", folder / "w"),
        "imitate": ("imitate", CONFIG, "--workdir", folder / "w"),
        "score": ("score", "--model", inputs.model, "--input", inputs.trajectories, "--output", out),
        "export": ("export", "--model", inputs.model, "--output", out),
        "import": ("import-trajectories", "--format", "openai", "--input", inputs.log, "--output", out, *report),
        "validate": ("validate", inputs.trajectories, *report),
        "evaluate": ("evaluate", "--model", inputs.model, "--input", inputs.trajectories, "--samples", 20, *report),
        "bench": ("bench", "search", "--no-torch", *report),
        "plan": ("plan", CONFIG, "--topology", "v5e:1x1", *report),
        "shards": ("build-shards", "--input", inputs.trajectories, "--tokenizer", inputs.tokenizer, "--output", out),
    }


NAMES = ["report", "imitate", "score", "export", "import", "validate", "evaluate", "bench", "plan", "shards"]


def assert_one_line(done, *parts: str) -> None:
    assert done.status == 2, done.err[-3000:]
    # Orbax's threads may print their own traceback before our line; none of ours may be in one.
    assert f'File "{ROOT / "jaxprm"}' not in done.err and f'File "{ROOT / "data_pipeline"}' not in done.err, done.err
    assert done.last_line.startswith(("jaxprm: ", "error: ")), done.err
    for part in parts:
        assert part in done.last_line, done.err


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_cannot_be_written_is_one_line_before_any_work(zygote, inputs, disk, name):
    command = commands(inputs, disk)[name]
    done = zygote.run(disk, *command, user=NOBODY)
    assert_one_line(done, str(disk), "Permission denied")
    remount(disk, "ro")
    try:
        assert_one_line(zygote.run(disk, *command), str(disk), "Read-only file system")
    finally:
        remount(disk, "rw")
    assert not list(disk.iterdir())


@pytest.mark.parametrize("name", ["score", "export", "import", "validate", "evaluate", "shards"])
def test_a_full_disk_is_one_line_and_the_same_command_then_works(zygote, inputs, tmp_path, name):
    free = {"score": 4, "import": 4, "validate": 4, "evaluate": 4, "export": 60, "shards": 8}[name]
    with mounted(inputs.folder / "disk", 1024) as disk:
        (disk / "filler").write_bytes(b"x" * (1024 - free) * 1024)
        command = commands(inputs, disk)[name]
        assert_one_line(zygote.run(disk, *command), "space left")
        (disk / "filler").unlink()
        done = zygote.run(disk, *command)
        assert done.status == 0, done.err[-2000:]
        elsewhere = commands(inputs, tmp_path)[name]
        assert zygote.run(tmp_path, *elsewhere).status == 0
        assert contents(disk) == contents(tmp_path)


def test_a_run_on_a_disk_that_is_full_again_and_again_ends_as_on_a_large_one(zygote, inputs, undisturbed):
    with mounted(inputs.folder / "disk", WORK_SIZES[0]) as disk:
        command = commands(inputs, disk)["report"]
        for kilobytes in WORK_SIZES:
            remount(disk, f"size={kilobytes}k")
            assert_one_line(zygote.run(disk, *command), "space left")
        remount(disk, "size=64m")
        done = zygote.run(disk, *command)
        assert done.status == 0, done.err[-2000:]
        assert contents(disk / "w") == contents(undisturbed)
