"""The gcloud commands of launch_tpu.sh in a fake cloud; the expected ones follow gcloud's reference."""

from __future__ import annotations

import re
import subprocess

import pytest

NONE = [1, "", "ERROR: (gcloud.storage.ls) One or more URLs matched no objects.\n"]
DONE = [0, "gs://my-bucket/prm/state/done\ngs://my-bucket/prm/state/worker-0\n", ""]
UNFINISHED = [0, "gs://my-bucket/prm/state/worker-0\n", ""]
MARKS = "storage ls gs://my-bucket/prm/state/"
ENDS = [MARKS, [NONE, NONE, DONE]]  # `up` stores a command and creates a machine, and sees the end at its next look
STOCKOUT = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.create) There is no more capacity in the zone\n"]
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


def raw(launch) -> list[str]:
    return [re.sub(r"(?<=[ =])/\S*/(jaxprm-worker\.sh)", r"TMP/\1", " ".join(call)) for call in launch.cloud.calls()]


def creations(launch) -> int:
    return sum(" create " in command for command in launch.commands() if command.startswith("compute tpus"))


@pytest.mark.parametrize("spelled", ["v5e-8", "v5litepod-8"])
def test_an_on_demand_v5e_8(launch, spelled):
    stderr = launch("create", "--accelerator", spelled).stderr
    create = f"compute tpus tpu-vm create prm --version=v2-alpha-tpuv5-lite {WHERE} --accelerator-type=v5litepod-8 "
    offers = f"compute tpus accelerator-types list {WHERE} --filter=type=v5litepod-8 --format=value(type)"
    calls = raw(launch)
    assert calls[:6] == [*CHECKS, offers, QUEUE_STATE, NODE_STATE]
    survey = [
        QUEUE_STATE,
        NODE_STATE,
        "compute tpus tpu-vm list --zone=- --project=my-project --format=value(name.segment(-3),name.basename(),state)",
        "compute tpus queued-resources list --zone=- --project=my-project "
        "--format=value(name.segment(-3),name.basename(),state.state)",
        "secrets describe jaxprm-prm --project=my-project --format=value(name) --quiet",
    ]
    assert sorted(calls[6:11]) == sorted(survey)
    assert calls[11:] == [QUEUE_STATE, NODE_STATE, create + STARTUP, QUEUE_STATE, NODE_STATE, *calls[-5:]]
    assert sorted(calls[-5:]) == sorted(survey)
    assert "cost: machine prm in us-west4-a is READY and costs money until: launch_tpu.sh delete --name prm" in stderr


def test_a_spot_v6e_16_by_queued_resource_that_is_preempted_once(launch):
    preempted = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED"]
    launch.cloud.change(lives={"tpu-vm": [], "queued-resources": [preempted, ["ACCEPTED", "ACTIVE"]]})
    launch.cloud.scenario([[MARKS, [NONE, NONE, UNFINISHED, DONE]]])
    stderr = launch("up", "--accelerator", "v6e-16", "--spot", "--queued", "--valid-until", "6h", *TRAIN).stderr
    create = (
        f"compute tpus queued-resources create prm --node-id=prm --runtime-version=v2-alpha-tpuv6e {WHERE} "
        f"--accelerator-type=v6e-16 --spot {STARTUP} --valid-until-duration=6h"
    )
    delete = f"compute tpus queued-resources delete prm {WHERE} --force --quiet"
    commands = launch.commands()
    tree = re.search(r"code-([0-9a-f]{40})\.tar\.gz", commands[0])[1]
    assert commands == [
        f"storage cp TMP/code.tar.gz gs://my-bucket/prm/job/code-{tree}.tar.gz",
        "storage cp TMP/command gs://my-bucket/prm/job/command",
        create,
        delete,
        create,
        delete,
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
    assert launch.commands() == [
        f"compute tpus tpu-vm create prm --version=v2-alpha-tpuv5 {WHERE} --accelerator-type=v5p-32 --reserved "
        f"--service-account=prm@my-project.iam.gserviceaccount.com --network=tpus --subnetwork=west {STARTUP}"
    ]


def test_create_retries_without_capacity(launch):
    reserved = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.create) Insufficient reserved capacity.\n"]
    launch.cloud.scenario([["tpu-vm create", [STOCKOUT, reserved, None]]])
    stderr = launch("create", "--accelerator", "v4-8").stderr
    assert creations(launch) == 3
    assert stderr.count("no capacity: ERROR: (gcloud.compute.tpus.tpu-vm.create)") == 2
    assert "--version=tpu-ubuntu2204-base" in launch.commands()[0]


def test_create_gives_up_after_the_last_try(launch):
    launch.cloud.scenario([["tpu-vm create", [STOCKOUT]]])
    stderr = launch("create", "--accelerator", "v5e-8", code=1, CREATE_TRIES="3").stderr
    assert creations(launch) == 3
    assert "no v5litepod-8 in us-west4-a after 3 tries" in stderr
    assert "cost: no machine and no queued resource prm exists in us-west4-a, nor in any other" in stderr


def test_an_error_that_a_retry_cannot_fix_is_not_retried(launch):
    for message, hint in [
        ("Quota 'TPUV5' exhausted. RESOURCE_EXHAUSTED", "quotas?project="),
        ("insufficient authentication scopes", ""),
    ]:
        launch.cloud.scenario([["tpu-vm create", [[1, "", f"ERROR: {message}\n"]]]])
        stderr = launch("create", "--accelerator", "v5e-8", code=1).stderr
        assert message in stderr and hint in stderr
    assert creations(launch) == 2


def test_a_failed_queued_resource_says_why_and_is_created_again(launch):
    launch.cloud.change(lives={"tpu-vm": [], "queued-resources": [["ACCEPTED", "FAILED"], ["ACCEPTED", "ACTIVE"]]})
    stderr = launch("create", "--accelerator", "v5e-8", "--queued").stderr
    assert "the reservation is full" in stderr
    assert [command.split()[3] for command in launch.commands()] == ["create", "delete", "create"]


def test_a_machine_that_someone_deletes_is_not_created_again(launch):
    launch.cloud.change(lives={"tpu-vm": [["CREATING", "READY", "ABSENT"]], "queued-resources": []})
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=1).stderr
    assert "deleted by someone else" in stderr
    assert creations(launch) == 1


def test_setup_that_fails_once_on_a_worker(launch):
    answers = ["--command=sudo bash jaxprm-worker.sh setup", [[1, "", "worker 2: setup failed\n"], [0, "", ""]]]
    launch.cloud.node("READY")
    launch.cloud.scenario([answers])
    stderr = launch("setup", "--accelerator", "v6e-16").stderr
    commands = launch.commands()
    tree = re.search(r"code-([0-9a-f]{40})\.tar\.gz", commands[0])[1]
    ssh = f"compute tpus tpu-vm ssh prm {WHERE} --worker=all --quiet --command=sudo bash jaxprm-worker.sh"
    assert commands == [
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
    launch.cloud.node("READY")
    launch.cloud.scenario([answers])
    stderr = launch("setup", "--accelerator", "v6e-16", code=1).stderr
    assert "worker 3: sees no TPU but platform cpu" in stderr
    assert "setup stopped" in stderr


def test_run_starts_all_workers_at_once(launch):
    launch.cloud.node("READY")
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
    launch.cloud.node("READY")
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
    "rule, line, unknown",
    [
        (["auth list", [[0, "", ""]]], "no account: gcloud auth login", ""),
        (["projects describe", [[1, "", "ERROR\n"]]], "project my-project: not found, or me@example.com may not", ""),
        (
            ["buckets describe", [[1, "", "ERROR\n"]]],
            "gcloud storage buckets create gs://my-bucket --project=my-project --location=us-west4",
            "",
        ),
        (
            ["accelerator-types list", [[1, "", "ERROR\n"]]],
            "gcloud services enable tpu.googleapis.com --project=my-project",
            "",
        ),
        (["accelerator-types list", [[0, "", ""]]], "zone us-west4-a: has no v5litepod-8", ""),
        (["gcloud ", [[1, "", "ERROR: no login\n"]]], "no account: gcloud auth login", "machine secret"),
    ],
    ids=["account", "project", "bucket", "zone", "offer", "everything"],
)
def test_what_is_missing_is_reported_before_anything_is_created(launch, rule, line, unknown):
    """In one line, before those about money."""
    launch.cloud.scenario([rule])
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=2, unknown=unknown).stderr
    assert line in stderr and [": cost: " in part for part in stderr.splitlines()][:2] == [False, True]
    assert launch.commands() == []


def test_up_without_a_command_resumes_the_run_of_that_name(launch):
    assert "no command, and none stored" in launch("up", "--accelerator", "v5e-8", code=2).stderr
    launch.cloud.scenario([[MARKS, [NONE, [0, "gs://my-bucket/prm/state/failed\n", ""]]]])
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/failed", "worker 1: exit code 1\n")
    stderr = launch("up", "--accelerator", "v5e-8", code=1).stderr
    assert "failed: worker 1: exit code 1" in stderr
    assert (launch.cloud.bucket / "my-bucket/prm/job/command").read_text() == "tree\nnone\ntrain\n"
    assert [command.split()[3] for command in launch.commands()] == ["create", "delete"]


def test_up_without_a_command_creates_no_machine_for_a_run_that_has_ended(launch):
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/done", "exit code 0\n")
    assert "done; results in" in launch("up", "--accelerator", "v5e-8").stderr
    assert launch.commands() == []


def test_a_machine_whose_workers_never_report_is_deleted(launch):
    """Workers that may not write to the bucket cannot report it. Reports of an earlier run are removed first."""
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
    preempted = ["ACCEPTED", "ACTIVE", "SUSPENDING", "SUSPENDED"]
    launch.cloud.change(lives={"tpu-vm": [], "queued-resources": [preempted, ["ACCEPTED", "ACTIVE"]]})
    failed = [0, "gs://my-bucket/prm/state/failed\n", ""]
    launch.cloud.scenario([[MARKS, [NONE, NONE, failed, DONE]]])
    launch.cloud.put("my-bucket/prm/state/failed", "worker 1: exit code 134\n")
    stderr = launch("up", "--accelerator", "v6e-16", "--spot", "--queued", *TRAIN).stderr
    assert "failed while the machine was SUSPENDING, so the run resumes: worker 1: exit code 134" in stderr
    assert "storage rm gs://my-bucket/prm/state/failed" in launch.commands()
    assert creations(launch) == 2


def test_up_does_not_replace_an_unfinished_run(launch):
    launch.cloud.node("READY")
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    stderr = launch("up", "--accelerator", "v5e-8", *TRAIN, code=2).stderr
    assert "prm has a run that is not finished" in stderr


def test_up_keeps_the_machine_when_asked(launch):
    launch.cloud.node("READY")
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/done", "exit code 0\n")
    assert "prm is kept" in launch("up", "--accelerator", "v5e-8", "--keep").stderr
    assert launch.commands() == []


def test_delete_asks_and_accepts_no(launch):
    launch.cloud.queue("ACTIVE")
    stderr = launch("delete", text="n\n", code=1).stderr
    assert "delete prm (ACTIVE) in us-west4-a?" in stderr and "not deleted" in stderr
    launch("delete", code=1)  # without an answer
    assert launch.commands() == []


@pytest.mark.parametrize("arguments, text", [((), "y\n"), (("--yes",), "")])
def test_delete_removes_queued_resource_node_and_secret(launch, arguments, text):
    launch.cloud.queue("ACTIVE")
    launch.cloud.change(secrets=["jaxprm-prm"], kept_nodes=[("us-west4-a", "prm")], polls_of_delete=2)
    launch.cloud.node("READY")
    stderr = launch("delete", *arguments, text=text).stderr
    assert launch.commands() == [
        f"compute tpus queued-resources delete prm {WHERE} --force --quiet",
        f"compute tpus tpu-vm delete prm {WHERE} --quiet",  # left behind
        "secrets delete jaxprm-prm --project=my-project --quiet",
    ]
    assert "Kept: gs://my-bucket/prm" in stderr


def test_status_names_machine_workers_and_run(launch):
    launch.cloud.node("READY")
    launch.cloud.put("my-bucket/prm/state/worker-0", "running\n")
    assert launch("status").stdout.splitlines() == [
        "machine   prm: READY (machine in us-west4-a)",
        "==> gs://my-bucket/prm/state/worker-0 <==",
        "running",
        "run       not finished",
    ]
    launch.cloud.put("my-bucket/prm/state/failed", "worker 2: exit code 3\n")
    assert "run       failed: worker 2: exit code 3" in launch("status").stdout


def test_logs_cannot_change_the_terminal(launch):
    text = "50%\r\tüé ok\x1b]0;evil\x07\x1b[2J \u202eabc\u2066 \x9b31m\n"
    launch.cloud.put("my-bucket/prm/logs/worker-0.log", text)
    launch.cloud.put("my-bucket/prm/state/done", "")
    for options in ((), ("--follow",)):
        shown = launch("logs", *options).stdout
        # Text mode reads a carriage return as a line end.
        assert shown == "50%\n\tüé ok?]0;evil??[2J ?abc? ?31m\n"


def test_logs_print_follow_or_fetch(launch, tmp_path):
    launch.cloud.put("my-bucket/prm/logs/worker-1.log", "one\n")
    assert launch("logs", "--worker", "1").stdout == "one\n"
    assert "no log yet at gs://my-bucket/prm/logs/worker-0.log" in launch("logs", code=1).stderr
    more = ["range=4-", [[1, "", "ERROR: 416\n"], [0, "two\n", ""]]]
    launch.cloud.scenario([more, [MARKS, [NONE, NONE, DONE]]])
    assert launch("logs", "--worker", "1", "--follow").stdout == "one\ntwo\n"
    launch.cloud.scenario([])
    launch("logs", "--output", str(tmp_path / "logs"))
    assert (tmp_path / "logs" / "worker-1.log").read_text() == "one\n"


def test_ssh_goes_to_the_worker(launch):
    launch("ssh", "--worker", "3")
    assert launch.commands() == [f"compute tpus tpu-vm ssh prm {WHERE} --worker=3"]
