"""scripts/tpu_worker.sh as a machine runs it: the startup script that launch_tpu.sh writes, with fake programs."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launcher.fakes import ROOT, Cloud

SAVE = 'cd "${@: -1}"; '  # start of FAKE_RUN; its last argument is the work directory
RUN = "my-bucket/prm"
OFTEN = {"SYNC_SECONDS": "0.05"}  # copies while the command runs


class Machine:
    """A worker of a slice: its folder, and the cloud that all workers share."""

    def __init__(self, cloud: Cloud, folder: Path, generation: str = "v6e", devices: int = 4, workers: int = 1):
        self.cloud, self.folder = cloud, folder
        settings = f"NAME=prm BUCKET=my-bucket PROJECT=my-project GENERATION={generation}"
        self.script = folder / "jaxprm-worker.sh"
        folder.mkdir(parents=True)
        text = (ROOT / "scripts" / "tpu_worker.sh").read_text()
        self.script.write_text(f"#!/bin/bash\n{settings} DEVICES={devices} WORKERS={workers}\n{text}")

    def start(self, verb: str, *arguments: str, run: str = "", **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.script), verb, *arguments],
            env=self.cloud.environment(JAXPRM_ROOT=str(self.folder / "root"), FAKE_RUN=run, **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, verb: str, *arguments: str, run: str = "", code: int = 0, **environment: str) -> str:
        process = self.start(verb, *arguments, run=run, **environment)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == code, (process.returncode, output, self.log())
        return output

    def log(self) -> str:
        path = self.folder / "root" / "log"
        return path.read_text() if path.exists() else ""

    def work(self) -> Path:
        return self.folder / "root" / "work"


@pytest.fixture
def machine(cloud: Cloud, tmp_path: Path) -> Machine:
    send(cloud, tmp_path)
    return Machine(cloud, tmp_path / "machine")


def send(cloud: Cloud, folder: Path, secret: str = "none") -> None:
    """The code and a command, as the launcher sends them."""
    (folder / "code" / "scripts").mkdir(parents=True, exist_ok=True)
    (folder / "code" / "requirements.txt").write_text("flax==1\njax==0.10.2; python_version < '3.12'\n")
    (cloud.bucket / RUN / "job").mkdir(parents=True, exist_ok=True)
    code = cloud.bucket / RUN / "job" / "code-abc.tar.gz"
    subprocess.run(["tar", "-czf", str(code), "-C", str(folder / "code"), "."], check=True)
    cloud.put(f"{RUN}/job/command", f"abc\n{secret}\ntrain\nconfigs/mine.py\nreward_seeds=[0, 1]\n")


def state(cloud: Cloud, name: str) -> str | None:
    path = cloud.bucket / RUN / "state" / name
    return path.read_text().strip() if path.exists() else None


def test_a_fresh_machine_sets_up_runs_and_marks_the_end(machine, cloud):
    machine("job", run=SAVE + "mkdir -p stages a; echo 1 >stages/train.json; echo 2 >a/model; echo hello")
    root = machine.folder / "root"
    assert cloud.calls("uv") == [
        ["venv", "--clear", "--python", "3.11", f"{root}/venv"],
        [
            "pip",
            "install",
            "--python",
            f"{root}/venv/bin/python",
            "-r",
            f"{root}/code-abc/requirements.txt",
            "jax[tpu]",
        ],
    ]
    assert cloud.calls("python") == [
        [f"{root}/code-abc/scripts/tpu_check.py", "4", "1"],
        ["-m", "jaxprm", "train", "configs/mine.py", "reward_seeds=[0, 1]", "--workdir", f"{root}/work"],
    ]
    assert (state(cloud, "done"), state(cloud, "failed"), state(cloud, "worker-0")) == ("exit code 0", None, "done")
    assert (cloud.bucket / RUN / "work/stages/train.json").read_text() == "1\n"
    assert (cloud.bucket / RUN / "work/a/model").read_text() == "2\n"
    assert "hello" in (cloud.bucket / RUN / "logs/worker-0.log").read_text()
    assert "uv installs Python 3.11" in machine.log()


def test_the_run_is_marked_done_only_after_the_last_copy(machine, cloud):
    """Because `up` deletes the machine when it sees the mark."""
    cloud.scenario([["rsync", [[1, "", "503\n"], [1, "", "503\n"], None]]])
    machine("job", run=SAVE + "echo 1 >a")
    calls = [" ".join(call) for call in cloud.calls()]
    copies = [index for index, call in enumerate(calls) if "rsync" in call]
    assert len(copies) == 4 and copies[-1] < calls.index("storage cp - gs://my-bucket/prm/state/done")
    assert (cloud.bucket / RUN / "work/a").read_text() == "1\n"


@pytest.mark.parametrize("mark", ["done", "failed"])
def test_a_machine_created_again_after_the_end_does_not_run(machine, cloud, mark):
    cloud.put(f"{RUN}/state/{mark}", "x\n")
    machine("job", run="exit 1")
    assert cloud.calls("python") == [] and cloud.calls("uv") == []
    assert f"the run has ended: gs://my-bucket/prm/state/{mark}" in machine.log()


def test_without_a_command_the_machine_waits(machine, cloud):
    (cloud.bucket / RUN / "job" / "command").unlink()
    machine("job")
    assert state(cloud, "worker-0") == "waiting for a command"
    assert state(cloud, "failed") is None


def test_a_preempted_run_starts_again_until_it_is_done(machine, cloud):
    """75 is EX_TEMPFAIL of sysexits.h."""
    assert os.EX_TEMPFAIL == 75
    machine("job", run=SAVE + "echo x >>count; [[ $(wc -l <count) == 3 ]] || exit 75")
    assert (cloud.bucket / RUN / "work/count").read_text() == "x\nx\nx\n"
    assert state(cloud, "done") == "exit code 0"
    assert machine.log().count("exit code 75") == 2


def test_any_other_exit_code_is_the_end(machine, cloud):
    machine("job", run=SAVE + "echo x >>count; echo broken >&2; exit 3", code=1)
    assert state(cloud, "failed") == "worker 0: exit code 3, see gs://my-bucket/prm/logs/worker-0.log"
    assert state(cloud, "done") is None
    assert (cloud.bucket / RUN / "work/count").read_text() == "x\n"
    assert "broken" in (cloud.bucket / RUN / "logs/worker-0.log").read_text()


def test_a_worker_without_chips_does_not_run(machine, cloud):
    cloud.scenario([["tpu_check", [[1, "a warning\nsees no TPU but platform cpu\n", ""]]]])
    machine("job", run="exit 0", code=1)
    assert state(cloud, "failed") == "worker 0: sees no TPU but platform cpu"
    assert [call for call in cloud.calls("python") if call[0] == "-m"] == []


def test_waiting_for_the_chips_has_a_limit(machine, cloud):
    cloud.scenario([["tpu_check", [["hang", "", ""]]]])
    machine("job", code=1, CHECK_SECONDS="0.2")
    assert "chips did not open in 0.2 s" in state(cloud, "failed")


def test_steps_of_the_setup_are_retried(machine, cloud):
    cloud.scenario([["uv pip install", [[1, "", "mirror down\n"], [1, "", "mirror down\n"], [0, "", ""]]]])
    output = machine("setup", "abc")
    assert len([call for call in cloud.calls("uv") if call[0] == "pip"]) == 3
    assert len([call for call in cloud.calls("uv") if call[0] == "venv"]) == 1
    assert "install_packages: attempt 2 of 5 failed" in output and output.endswith("set up\n")
    assert machine("setup", "abc") == "worker 0: already set up\n"


def test_a_failed_setup_is_reported(machine, cloud):
    cloud.scenario([["uv pip install", [[1, "", "no such version\n"]]]])
    machine("job", code=1)
    assert "setup failed" in state(cloud, "failed")
    assert "no such version" in (cloud.bucket / RUN / "logs/worker-0.log").read_text()


def test_code_without_a_pinned_jax_is_refused(machine, cloud, tmp_path):
    (tmp_path / "code" / "requirements.txt").write_text("jax>=0.10\n")
    code = cloud.bucket / RUN / "job" / "code-abc.tar.gz"
    subprocess.run(["tar", "-czf", str(code), "-C", str(tmp_path / "code"), "."], check=True)
    assert "requirements.txt pins no jax==VERSION" in machine("setup", "abc", code=1)


def test_only_the_first_worker_writes_the_work_directory(cloud, tmp_path):
    send(cloud, tmp_path)
    second = Machine(cloud, tmp_path / "second", devices=16, workers=4)
    cloud.scenario([["agent-worker-number", [[0, "2", ""]]]])
    second("job", run=SAVE + "echo 1 >mine; [[ -f ../again ]] || { touch ../again; exit 75; }")
    assert cloud.calls("python")[0][1:] == ["16", "4"]
    assert not (cloud.bucket / RUN / "work").exists()
    assert (state(cloud, "done"), state(cloud, "worker-2")) == (None, "done")
    assert (cloud.bucket / RUN / "logs/worker-2.log").exists()


def test_a_worker_stops_when_another_fails(cloud, tmp_path):
    """Otherwise the slice would wait for the lost process, and cost money."""
    send(cloud, tmp_path)
    machine = Machine(cloud, tmp_path / "machine")
    process = machine.start("job", run="exec sleep 50", **OFTEN)
    wait_for(lambda: state(cloud, "worker-0") == "running")
    cloud.put(f"{RUN}/state/failed", "worker 3: exit code 1\n")
    assert process.wait(timeout=20) == 1
    assert state(cloud, "failed") == "worker 3: exit code 1"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_machine_created_again_resumes_from_the_bucket(machine, cloud, tmp_path):
    """Half a checkpoint of an interrupted copy is dropped. Files deleted on the machine are deleted in the bucket."""
    run = "mkdir -p checkpoints/1 stages; echo 1 >checkpoints/1/a; echo s >stages/b; echo m >m.jsonl"
    machine("job", run=SAVE + run)
    work = cloud.bucket / RUN / "work"
    assert state(cloud, "manifest").split("\n") == ["checkpoints/1/a", "m.jsonl"]
    (cloud.bucket / RUN / "state/done").unlink()
    cloud.put(f"{RUN}/work/checkpoints/2/half", "?")
    again = Machine(cloud, tmp_path / "again")
    run = "find . -type f | sort >../seen; rm -r checkpoints/1; mkdir -p checkpoints/3; echo 3 >checkpoints/3/a"
    again("job", run=SAVE + run)
    assert (again.folder / "root" / "seen").read_text().split() == ["./checkpoints/1/a", "./m.jsonl", "./stages/b"]
    names = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    assert names == ["checkpoints/3/a", "m.jsonl", "stages/b"]
    assert machine.log() in again.log()  # the log continues too


def test_a_machine_that_only_restarts_keeps_its_newer_files(machine, cloud):
    machine("job", run=SAVE + "echo 1 >a; exit 3", code=1)
    (cloud.bucket / RUN / "state/failed").unlink()
    (machine.work() / "a").write_text("2\n")
    machine("job")
    assert (cloud.bucket / RUN / "work/a").read_text() == "2\n"


def test_a_file_missing_in_the_bucket_is_an_error(machine, cloud):
    cloud.put(f"{RUN}/state/manifest", "checkpoints/1/a\n")
    machine("job", code=1)
    assert "checkpoints/1/a is in gs://my-bucket/prm/state/manifest but not in" in state(cloud, "failed")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 3], ids=["before the manifest", "at the manifest", "after the manifest"])
def test_an_interrupted_copy_leaves_the_last_one_complete(machine, cloud, tmp_path, cut):
    """The old checkpoint stays until the new one is complete, and no stage counts as finished before its files."""
    machine("job", run=SAVE + "mkdir -p c/1; echo 1 >c/1/a", code=0)
    (cloud.bucket / RUN / "state/done").unlink()
    step = ["rsync & --exclude=", "storage cp & /state/manifest", "rsync & --delete-unmatched"][cut - 1]
    cloud.scenario([[step, [[1, "", "cut\n"]]]])
    run = SAVE + "rm -r c/1; mkdir -p c/2 stages; echo 2 >c/2/a; echo x >stages/train.json; exit 3"
    machine("job", run=run, code=1)
    cloud.scenario([])
    (cloud.bucket / RUN / "state/failed").unlink()
    again = Machine(cloud, tmp_path / "again")
    again("job", run=SAVE + "find . -type f | sort >../seen")
    seen = (again.folder / "root" / "seen").read_text().split()
    assert seen == (["./c/1/a"] if cut < 3 else ["./c/2/a"])


def test_checkpoints_being_written_and_the_lock_are_not_copied(machine, cloud):
    run = "mkdir -p c/1.orbax-checkpoint-tmp-7; echo 1 >c/1.orbax-checkpoint-tmp-7/a; echo 2 >lock; echo 3 >b"
    machine("job", run=SAVE + run)
    assert state(cloud, "manifest") == "b"


def test_the_work_directory_is_copied_while_it_runs(machine, cloud):
    process = machine.start("job", run=SAVE + "echo 1 >a; exec sleep 50", **OFTEN)
    wait_for((cloud.bucket / RUN / "work/a").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert state(cloud, "worker-0") == "stopped with the machine; resumes when it starts again"
    assert state(cloud, "done") is None and state(cloud, "failed") is None


def test_a_run_saves_when_its_machine_stops(machine, cloud):
    """The run gets the signal, and the last copy has what it writes then."""
    run = SAVE + "trap 'echo saved >last; exit 75' TERM; echo 1 >a; while :; do sleep 0.05; done"
    process = machine.start("job", run=run, **OFTEN)
    wait_for((cloud.bucket / RUN / "work/a").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert (cloud.bucket / RUN / "work/last").read_text() == "saved\n"


@pytest.mark.parametrize(
    "generation, flag",
    [
        ("v6e", "--xla_tpu_scoped_vmem_limit_kib=98304"),
        ("v5e", "--xla_tpu_enable_async_collective_fusion=true"),
        ("v5p", "--xla_tpu_enable_latency_hiding_scheduler=true"),
    ],
)
def test_stale_variables_are_cleared_and_flags_set_before_python(cloud, tmp_path, generation, flag):
    send(cloud, tmp_path)
    machine = Machine(cloud, tmp_path / "machine", generation)
    machine("job", run="exit 0", MEGASCALE_COORDINATOR_ADDRESS="gone:1", TPU_WORKER_HOSTNAMES="gone")
    environment = ast.literal_eval((cloud.home / "environment").read_text())
    assert flag in environment["LIBTPU_INIT_ARGS"].split()
    assert environment["JAX_PLATFORMS"] == "tpu,cpu"
    assert not [name for name in environment if name.startswith(("MEGASCALE_", "TPU_"))]


def test_secrets_reach_only_the_run(cloud, tmp_path):
    (cloud.home / "secret").write_text("# mine\nHF_TOKEN=hf_secret\nURL=a $(touch pwned) 'b'")
    send(cloud, tmp_path, secret="jaxprm-prm")
    machine = Machine(cloud, tmp_path / "machine")
    machine("job", run="exit 0")
    environment = ast.literal_eval((cloud.home / "environment").read_text())
    assert (environment["HF_TOKEN"], environment["URL"]) == ("hf_secret", "a $(touch pwned) 'b'")
    assert ["secrets", "versions", "access", "latest", "--secret=jaxprm-prm", "--project=my-project"] in cloud.calls()
    texts = [path.read_text() for path in (machine.folder, cloud.bucket) for path in path.rglob("*") if is_text(path)]
    assert not [text for text in texts if "hf_secret" in text]
    assert "hf_secret" not in (cloud.home / "calls").read_text()


def is_text(path: Path) -> bool:
    return path.is_file() and path.suffix != ".gz"


def test_an_unreadable_secret_is_reported(cloud, tmp_path):
    send(cloud, tmp_path, secret="jaxprm-prm")
    machine = Machine(cloud, tmp_path / "machine")
    cloud.scenario([["secrets versions", [[1, "", "PERMISSION_DENIED\n"]]]])
    machine("job", code=1)
    assert "roles/secretmanager.secretAccessor" in state(cloud, "failed")


def test_reading_the_bucket_is_retried(machine, cloud):
    cloud.scenario([["storage ls & job/command", [[1, "", "503\n"], [0, "gs://my-bucket/prm/job/command\n", ""]]]])
    machine("job", run="exit 0")
    assert state(cloud, "done") == "exit code 0"


def test_boot_starts_the_job_as_a_service(machine, cloud):
    machine("boot")
    root = machine.folder / "root"
    assert cloud.calls("systemctl") == [["stop", "jaxprm"]]
    (started,) = cloud.calls("systemd-run")
    assert started[-3:] == ["/bin/bash", f"{root}/worker.sh", "job"] and "--unit=jaxprm" in started
    assert (root / "worker.sh").read_text() == machine.script.read_text()
