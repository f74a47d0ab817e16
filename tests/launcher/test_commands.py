"""The gcloud commands of launch_tpu.sh in a fake cloud; the expected ones follow gcloud's reference."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest

from tests.launcher.conftest import COMMON

GONE = [1, "", "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/nodes/prm' was not found\n"]
STOCKOUT = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.create) There is no more capacity in the zone\n"]
ACCOUNT = ["auth list", [[0, "me@example.com\n", ""]]]
OFFERED = ["accelerator-types list", [[0, "offered\n", ""]]]
NOT_QUEUED = ["queued-resources describe", [GONE]]
NO_SECRET = ["secrets describe", [GONE]]
CHECKS = [
    "auth list --filter=status:ACTIVE --format=value(account)",
    "projects describe my-project --format=value(projectId)",
    "storage buckets describe gs://my-bucket --format=value(name)",
]
WHERE = "--zone=us-west4-a --project=my-project"
QUEUE_STATE = f"compute tpus queued-resources describe prm {WHERE} --format=value(state.state)"
NODE_STATE = f"compute tpus tpu-vm describe prm {WHERE} --format=value(state)"
STARTUP = "--metadata-from-file=startup-script=TMP/jaxprm-worker.sh --quiet"
TRAIN = ["--", "train", "configs/textcraft_tiny.py"]


def states(kind: str, *names: str) -> list:
    """Rule for the states that `describe` prints, in order."""
    return [f"{kind} describe", [[0, f"{name}\n", ""] if name != "ABSENT" else GONE for name in names]]


def offers(accelerator: str) -> str:
    return f"compute tpus accelerator-types list {WHERE} --filter=type={accelerator} --format=value(type)"


@pytest.mark.parametrize("spelled", ["v5e-8", "v5litepod-8"])
def test_an_on_demand_v5e_8(launch, spelled):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT", "READY")])
    stderr = launch("create", "--accelerator", spelled).stderr
    assert launch.commands() == [
        *CHECKS,
        offers("v5litepod-8"),
        QUEUE_STATE,
        NODE_STATE,
        f"compute tpus tpu-vm create prm --version=v2-alpha-tpuv5-lite {WHERE} --accelerator-type=v5litepod-8 "
        + STARTUP,
        QUEUE_STATE,
        NODE_STATE,
    ]
    assert "prm is up and costs money until: launch_tpu.sh delete --name prm" in stderr


def test_a_spot_v6e_16_by_queued_resource_that_is_preempted_once(launch):
    queue = states(
        "queued-resources",
        "ABSENT",
        "ABSENT",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
        "SUSPENDING",
        "SUSPENDED",
        "ABSENT",
        "ACTIVE",
        "ABSENT",
    )
    unfinished = [0, "gs://my-bucket/prm/state/worker-0\n", ""]
    ended = [0, "gs://my-bucket/prm/state/done\ngs://my-bucket/prm/state/worker-0\n", ""]
    marks = ["storage ls gs://my-bucket/prm/state/", [GONE, GONE, unfinished, ended]]
    launch.cloud.scenario([ACCOUNT, OFFERED, queue, states("tpu-vm", "ABSENT"), marks, NO_SECRET])
    stderr = launch("up", "--accelerator", "v6e-16", "--spot", "--queued", "--valid-until", "6h", *TRAIN).stderr
    create = (
        f"compute tpus queued-resources create prm --node-id=prm --runtime-version=v2-alpha-tpuv6e {WHERE} "
        f"--accelerator-type=v6e-16 --spot {STARTUP} --valid-until-duration=6h"
    )
    delete = f"compute tpus queued-resources delete prm {WHERE} --force --quiet"
    ls = "storage ls gs://my-bucket/prm/state/"
    commands = launch.commands()
    tree = re.search(r"code-([0-9a-f]{40})\.tar\.gz", commands[6])[1]
    assert commands == [
        *CHECKS,
        offers("v6e-16"),
        QUEUE_STATE,
        NODE_STATE,
        f"storage cp TMP/code.tar.gz gs://my-bucket/prm/job/code-{tree}.tar.gz",
        ls,
        "storage cp TMP/command gs://my-bucket/prm/job/command",
        ls,
        QUEUE_STATE,
        NODE_STATE,
        create,
        QUEUE_STATE,  # waiting
        QUEUE_STATE,  # provisioning
        QUEUE_STATE,  # active
        ls,
        QUEUE_STATE,  # suspending
        QUEUE_STATE,  # suspended
        delete,
        QUEUE_STATE,
        create,
        QUEUE_STATE,  # active
        ls,
        delete,
        QUEUE_STATE,
        NODE_STATE,
        "secrets describe jaxprm-prm --project=my-project --format=value(name) --quiet",
    ]
    assert "prm is lost (SUSPENDED): deleting it and creating it again" in stderr
    assert "done; results in gs://my-bucket/prm/work" in stderr
    assert (launch.cloud.bucket / "my-bucket/prm/job/command").read_text().split("\n") == [
        tree,
        "none",
        "train",
        "configs/textcraft_tiny.py",
        "",
    ]


def test_a_reserved_v5p(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT", "CREATING", "READY")])
    launch(
        "create",
        "--accelerator",
        "v5p-32",
        "--reserved",
        "--network",
        "tpus",
        "--subnetwork",
        "west",
        "--service-account",
        "prm@my-project.iam.gserviceaccount.com",
    )
    assert (
        f"compute tpus tpu-vm create prm --version=v2-alpha-tpuv5 {WHERE} --accelerator-type=v5p-32 --reserved "
        f"--service-account=prm@my-project.iam.gserviceaccount.com --network=tpus --subnetwork=west {STARTUP}"
    ) in launch.commands()


def test_create_retries_without_capacity(launch):
    reserved = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.create) Insufficient reserved capacity.\n"]
    create = ["tpu-vm create", [STOCKOUT, reserved, [0, "", ""]]]
    machine = states("tpu-vm", "ABSENT", "ABSENT", "ABSENT", "READY")
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, machine, create])
    stderr = launch("create", "--accelerator", "v4-8").stderr
    assert sum("tpu-vm create" in command for command in launch.commands()) == 3
    assert stderr.count("no capacity: ERROR: (gcloud.compute.tpus.tpu-vm.create)") == 2
    assert "--version=tpu-ubuntu2204-base" in launch.commands()[6]


def test_create_gives_up_after_the_last_try_and_leaves_nothing(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT"), ["tpu-vm create", [STOCKOUT]]])
    stderr = launch("create", "--accelerator", "v5e-8", code=1, CREATE_TRIES="3").stderr
    assert sum("tpu-vm create" in command for command in launch.commands()) == 3
    assert "no v5litepod-8 in us-west4-a after 3 tries; nothing exists and nothing costs money" in stderr


def test_an_error_that_a_retry_cannot_fix_is_not_retried(launch):
    for message, hint in [
        ("Quota 'TPUV5' exhausted. RESOURCE_EXHAUSTED", "quotas?project="),
        ("insufficient authentication scopes", ""),
    ]:
        answers = [[1, "", f"ERROR: {message}\n"]]
        launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT"), ["tpu-vm create", answers]])
        stderr = launch("create", "--accelerator", "v5e-8", code=1).stderr
        assert message in stderr and hint in stderr
    assert sum("tpu-vm create" in command for command in launch.commands()) == 2


def test_a_failed_queued_resource_says_why_and_is_created_again(launch):
    queue = states("queued-resources", "ABSENT", "FAILED", "ABSENT", "ACTIVE")
    why = ["failedData", [[0, "the reservation is full\n", ""]]]
    launch.cloud.scenario([ACCOUNT, OFFERED, why, queue, states("tpu-vm", "ABSENT")])
    stderr = launch("create", "--accelerator", "v5e-8", "--queued").stderr
    assert "the reservation is full" in stderr
    assert [command.split()[3] for command in launch.commands() if "queued-resources" in command] == [
        "describe",
        "create",
        "describe",
        "describe",
        "delete",
        "describe",
        "create",
        "describe",
    ]


def test_a_machine_that_someone_deletes_is_not_created_again(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT", "ABSENT", "READY", "ABSENT")])
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=1).stderr
    assert "deleted by someone else" in stderr
    assert sum("tpu-vm create" in command for command in launch.commands()) == 1


def test_setup_that_fails_once_on_a_worker(launch):
    answers = ["--command=sudo bash jaxprm-worker.sh setup", [[1, "", "worker 2: setup failed\n"], [0, "", ""]]]
    launch.cloud.scenario([ACCOUNT, NOT_QUEUED, states("tpu-vm", "READY"), answers])
    stderr = launch("setup", "--accelerator", "v6e-16").stderr
    commands = launch.commands()
    tree = re.search(r"code-([0-9a-f]{40})\.tar\.gz", commands[5])[1]
    ssh = f"compute tpus tpu-vm ssh prm {WHERE} --worker=all --quiet --command=sudo bash jaxprm-worker.sh"
    assert commands == [
        *CHECKS,
        QUEUE_STATE,
        NODE_STATE,
        f"storage cp TMP/code.tar.gz gs://my-bucket/prm/job/code-{tree}.tar.gz",
        f"compute tpus tpu-vm scp TMP/jaxprm-worker.sh prm:jaxprm-worker.sh {WHERE} --worker=all --quiet",
        f"{ssh} setup {tree}",
        f"{ssh} setup {tree}",
        f"{ssh} check {tree}",
    ]
    assert "setup failed on some worker (try 1 of 5)" in stderr
    assert "every worker is set up and sees its chips" in stderr


def test_a_worker_that_sees_no_tpu_stops_setup(launch):
    answers = ["worker.sh check", [[1, "", "worker 3: sees no TPU but platform cpu\n"]]]
    launch.cloud.scenario([ACCOUNT, NOT_QUEUED, states("tpu-vm", "READY"), answers])
    stderr = launch("setup", "--accelerator", "v6e-16", code=1).stderr
    assert "worker 3: sees no TPU but platform cpu" in stderr
    assert "setup stopped. prm exists and costs money until: launch_tpu.sh delete" in stderr


def test_run_starts_all_workers_at_once(launch):
    launch.cloud.scenario([ACCOUNT, NOT_QUEUED, states("tpu-vm", "READY")])
    launch.cloud.put("my-bucket/prm/state/failed", "worker 1: exit code 1\n")
    launch(
        "run", "--accelerator", "v6e-16", "--", "train", "configs/mine.py", "reward_seeds=[0,1]", "name='a b'; $(id)"
    )
    commands = launch.commands()
    assert "storage rm gs://my-bucket/prm/state/failed" in commands
    started = [command for command in commands if "tpu-vm ssh" in command]
    assert started == [
        f"compute tpus tpu-vm ssh prm {WHERE} --worker=all --quiet --command=sudo bash jaxprm-worker.sh boot"
    ]
    command = (launch.cloud.bucket / "my-bucket/prm/job/command").read_text().split("\n")
    assert command[2:] == ["train", "configs/mine.py", "reward_seeds=[0,1]", "name='a b'; $(id)", ""]


def test_the_code_is_the_working_tree(launch, clone, tmp_path):
    """Committed or not, without ignored files; the user's index does not change."""
    (clone / "ignored").mkdir(exist_ok=True)
    (clone / "ignored" / "large.bin").write_text("x")
    for name in (".env", "old.env", "configs/.env.local"):  # of this call or of another one
        (clone / name).write_text("HF_TOKEN=hidden\n")
    before = subprocess.run(["git", "-C", str(clone), "status", "--short"], capture_output=True, text=True).stdout
    launch.cloud.scenario([ACCOUNT, NOT_QUEUED, states("tpu-vm", "READY")])
    launch("run", "--accelerator", "v5e-8", "--", "train", "configs/mine.py")
    after = subprocess.run(["git", "-C", str(clone), "status", "--short"], capture_output=True, text=True).stdout
    for name in (".env", "old.env", "configs/.env.local"):
        (clone / name).unlink()
    (code,) = (launch.cloud.bucket / "my-bucket/prm/job").glob("code-*.tar.gz")
    names = subprocess.run(["tar", "-tzf", str(code)], capture_output=True, text=True, check=True).stdout.split()
    assert {"configs/mine.py", "configs/textcraft_tiny.py", "launch_tpu.sh", "requirements.txt"} <= set(names)
    assert not {".env", "old.env", "configs/.env.local", "ignored/large.bin"} & set(names)
    assert before == after


@pytest.mark.parametrize(
    "rule, line",
    [
        (["auth list", [[0, "", ""]]], "no account: gcloud auth login"),
        (["projects describe", [GONE]], "project my-project: not found, or me@example.com may not see it"),
        (
            ["buckets describe", [GONE]],
            "gcloud storage buckets create gs://my-bucket --project=my-project --location=us-west4",
        ),
        (["accelerator-types list", [GONE]], "gcloud services enable tpu.googleapis.com --project=my-project"),
        (["accelerator-types list", [[0, "", ""]]], "zone us-west4-a: has no v5litepod-8"),
    ],
    ids=["account", "project", "bucket", "zone", "offer"],
)
def test_what_is_missing_is_reported_before_anything_is_created(launch, rule, line):
    launch.cloud.scenario([rule, ACCOUNT, OFFERED])
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=2).stderr
    assert line in stderr and len(stderr.splitlines()) == 1
    assert not [command for command in launch.commands() if " create " in command or "storage cp" in command]


def test_up_without_a_command_resumes_the_run_of_that_name(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT")])
    assert "no command, and none stored" in launch("up", "--accelerator", "v5e-8", code=2).stderr
    machine = states("tpu-vm", "ABSENT", "ABSENT", "READY", "READY", "ABSENT")
    marks = ["storage ls gs://my-bucket/prm/state/", [GONE, [0, "gs://my-bucket/prm/state/failed\n", ""]]]
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, machine, marks, NO_SECRET])
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/failed", "worker 1: exit code 1\n")
    stderr = launch("up", "--accelerator", "v5e-8", code=1).stderr
    assert "failed: worker 1: exit code 1" in stderr
    assert (launch.cloud.bucket / "my-bucket/prm/job/command").read_text() == "tree\nnone\ntrain\n"
    assert [command for command in launch.commands() if "tpu-vm delete" in command] == [
        f"compute tpus tpu-vm delete prm {WHERE} --quiet"
    ]


def test_up_without_a_command_creates_no_machine_for_a_run_that_has_ended(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT"), NO_SECRET])
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/done", "exit code 0\n")
    assert "done; results in" in launch("up", "--accelerator", "v5e-8").stderr
    assert not [command for command in launch.commands() if " create " in command or " delete " in command]


def test_a_machine_whose_workers_never_report_is_deleted(launch):
    """Workers that may not write to the bucket cannot report it. Reports of an earlier run are removed first."""
    machine = states("tpu-vm", "ABSENT", "ABSENT", "READY", "READY", "READY", "ABSENT")
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, machine, NO_SECRET])
    launch.cloud.put("my-bucket/prm/state/worker-0", "done\n")
    launch.cloud.put("my-bucket/prm/state/done", "exit code 0\n")
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=1, START_POLLS="3").stderr
    assert "no worker has reported; check that the machine's service account may write to gs://my-bucket." in stderr
    ended = [command for command in launch.commands() if "storage rm" in command or "tpu-vm delete" in command]
    assert ended == [
        "storage rm gs://my-bucket/prm/state/done gs://my-bucket/prm/state/worker-0",
        f"compute tpus tpu-vm delete prm {WHERE} --quiet",
    ]


def test_workers_that_fail_because_the_slice_goes_away_do_not_end_the_run(launch):
    """The last hosts of a preempted slice lose the others and exit with any code, but the run resumes."""
    queue = states(
        "queued-resources", "ABSENT", "ABSENT", "ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE", "ABSENT"
    )
    failed = [0, "gs://my-bucket/prm/state/failed\n", ""]
    marks = ["storage ls gs://my-bucket/prm/state/", [GONE, GONE, failed, [0, "gs://my-bucket/prm/state/done\n", ""]]]
    launch.cloud.scenario([ACCOUNT, OFFERED, queue, states("tpu-vm", "ABSENT"), marks, NO_SECRET])
    launch.cloud.put("my-bucket/prm/state/failed", "worker 1: exit code 134\n")
    stderr = launch("up", "--accelerator", "v6e-16", "--spot", "--queued", *TRAIN).stderr
    assert "failed while the machine was SUSPENDING, so the run resumes: worker 1: exit code 134" in stderr
    assert "storage rm gs://my-bucket/prm/state/failed" in launch.commands()
    assert sum("queued-resources create" in command for command in launch.commands()) == 2


def test_up_does_not_replace_an_unfinished_run(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "READY")])
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=2).stderr
    assert "prm has a run that is not finished" in stderr


def test_up_keeps_the_machine_when_asked(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "READY")])
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/done", "exit code 0\n")
    assert "prm is kept and costs money until" in launch("up", "--accelerator", "v5e-8", "--keep").stderr
    assert not [command for command in launch.commands() if "delete" in command]


def test_delete_asks_and_accepts_no(launch):
    launch.cloud.scenario([ACCOUNT, states("queued-resources", "ACTIVE")])
    stderr = launch("delete", text="n\n", code=1).stderr
    assert "delete prm (ACTIVE) in us-west4-a?" in stderr and "prm still costs money" in stderr
    assert launch("delete", code=1).stderr  # without an answer
    assert not [command for command in launch.commands() if " delete " in command]


@pytest.mark.parametrize("arguments, text", [((), "y\n"), (("--yes",), "")])
def test_delete_removes_queued_resource_node_and_secret(launch, arguments, text):
    launch.cloud.scenario(
        [
            ACCOUNT,
            states("queued-resources", "ACTIVE", "ABSENT"),
            states("tpu-vm", "READY"),
            ["secrets describe", [[0, "s", ""]]],
        ]
    )
    stderr = launch("delete", *arguments, text=text).stderr
    assert launch.commands() == [
        *CHECKS[:2],
        QUEUE_STATE,
        f"compute tpus queued-resources delete prm {WHERE} --force --quiet",
        QUEUE_STATE,
        NODE_STATE,  # left behind
        f"compute tpus tpu-vm delete prm {WHERE} --quiet",
        "secrets describe jaxprm-prm --project=my-project --format=value(name) --quiet",
        "secrets delete jaxprm-prm --project=my-project --quiet",
    ]
    assert "Kept: gs://my-bucket/prm" in stderr


def test_a_failed_delete_says_that_the_machine_may_cost_money(launch):
    launch.cloud.scenario(
        [ACCOUNT, NOT_QUEUED, states("tpu-vm", "READY"), ["tpu-vm delete", [[1, "", "ERROR: no network\n"]]]]
    )
    assert "prm is not deleted and may cost money" in launch("delete", "--yes", code=1).stderr


@pytest.mark.parametrize("verb", ["delete", "status"])
def test_a_wrong_project_is_not_an_empty_one(launch, verb):
    launch.cloud.scenario([ACCOUNT, ["projects describe", [GONE]], ["describe prm", [GONE]]])
    assert "project my-project: not found" in launch(verb, code=2).stderr


def test_an_unreachable_cloud_is_not_an_empty_one(launch):
    launch.cloud.scenario([ACCOUNT, OFFERED, ["describe prm", [[1, "", "ERROR: no network\n"]]]])
    stderr = launch("create", "--accelerator", "v5e-8", code=1).stderr
    assert "cannot see whether prm exists and costs money: ERROR: no network" in stderr
    assert not [command for command in launch.commands() if "tpu-vm create" in command]


@pytest.mark.parametrize(
    "state, line", [("CREATING", "prm is CREATING and costs money until"), ("ABSENT", "there is no machine prm")]
)
def test_ctrl_c_says_what_exists(launch, state, line):
    hang = ["tpu-vm create", [["hang", "", ""]]]
    launch.cloud.scenario([ACCOUNT, OFFERED, NOT_QUEUED, states("tpu-vm", "ABSENT", state), hang])
    process = subprocess.Popen(
        [str(launch.clone / "launch_tpu.sh"), "create", *COMMON, "--accelerator", "v5e-8"],
        env=launch.cloud.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job of a shell ignores Ctrl-C, and its child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (launch.cloud.home / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert line in stderr


def test_status_names_machine_workers_and_run(launch):
    launch.cloud.scenario(
        [ACCOUNT, NOT_QUEUED, states("tpu-vm", "READY"), ["display-url", [[0, "==> worker-0 <==\nrunning\n", ""]]]]
    )
    assert launch("status").stdout.splitlines() == [
        "machine   prm: READY (node)",
        "==> worker-0 <==",
        "running",
        "run       not finished",
    ]
    launch.cloud.put("my-bucket/prm/state/failed", "worker 2: exit code 3\n")
    assert "run       failed: worker 2: exit code 3" in launch("status").stdout


def test_logs_print_follow_or_fetch(launch, tmp_path):
    launch.cloud.put("my-bucket/prm/logs/worker-1.log", "one\n")
    assert launch("logs", "--worker", "1").stdout == "one\n"
    assert "no log yet at gs://my-bucket/prm/logs/worker-0.log" in launch("logs", code=1).stderr
    more = ["range=4-", [[1, "", "ERROR: 416\n"], [0, "two\n", ""]]]
    marks = ["storage ls", [GONE, GONE, [0, "gs://my-bucket/prm/state/done\n", ""]]]
    launch.cloud.scenario([ACCOUNT, more, marks])
    assert launch("logs", "--worker", "1", "--follow").stdout == "one\ntwo\n"
    launch.cloud.scenario([])
    launch("logs", "--output", str(tmp_path / "logs"))
    assert (tmp_path / "logs" / "worker-1.log").read_text() == "one\n"


def test_ssh_goes_to_the_worker(launch):
    launch("ssh", "--worker", "3")
    assert launch.commands() == [f"compute tpus tpu-vm ssh prm {WHERE} --worker=3"]
