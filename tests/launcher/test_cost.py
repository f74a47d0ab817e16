"""What launch_tpu.sh says about money after every fault. The `launch` fixture compares it with the ledger each time."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.launcher.test_commands import DONE, ENDS, MARKS, NONE, STOCKOUT, TRAIN, UNFINISHED, WHERE, creations

UP = ["--accelerator", "v5e-8"]
UNDERWAY = (
    "ERROR: (gcloud.compute.tpus.tpu-vm.create) The operations may still be underway remotely and may still succeed; "
    "use gcloud list and describe commands or https://console.developers.google.com/ to check resource state.\n"
)
CRASH = "ERROR: gcloud crashed (TransportError): HTTPSConnectionPool(host='tpu.googleapis.com'): Read timed out.\n"
EXISTS = "ERROR: (gcloud.compute.tpus.tpu-vm.create) ALREADY_EXISTS: Resource 'prm' already exists.\n"
QUOTA = "ERROR: (gcloud.compute.tpus.tpu-vm.create) Quota limit 'TPUV5sLitepodPerProject' has been exceeded.\n"
NETWORK = [1, "", "ERROR: gcloud crashed (ConnectionError): Name or service not known: host not found\n"]
FORBIDDEN = [
    1,
    "",
    "ERROR: (gcloud.storage.ls) [me@example.com] does not have permission to access b instance [my-bucket] (or it may "
    "not exist): Permission 'storage.objects.list' denied on resource.\n",
]


def slow(*values):
    """Values of a parametrized test that run in the slow tier only."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def secrets(tmp_path):
    path = tmp_path / "secrets.env"
    path.write_text("A=1\n")
    path.chmod(0o600)
    return ["--env-file", str(path)]


# ---- zones


@pytest.mark.parametrize("kind", ["node", slow("queue")])
def test_delete_in_a_wrong_zone_names_the_right_ones_and_deletes_nothing(launch, kind):
    for zone in ("us-east1-d", "us-central1-a"):
        getattr(launch.cloud, kind)("READY" if kind == "node" else "ACTIVE", zone=zone)
    launch.cloud.change(secrets=["jaxprm-prm"])
    stderr = launch("delete", "--yes", code=1).stderr
    assert "nothing is deleted: prm is not in us-west4-a but in us-central1-a us-east1-d" in stderr
    assert launch.commands() == []


def test_a_zone_that_google_does_not_have_is_not_an_empty_one(launch):
    """Its error says "not found", but of the zone."""
    launch.cloud.node("READY", zone="us-east1-d")
    launch.cloud.change(secrets=["jaxprm-prm"], zones=["us-east1-d"])
    stderr = launch("delete", "--yes", code=1, unknown="machine").stderr
    assert "cannot see whether prm exists in us-west4-a" in stderr and "machine prm in us-east1-d is READY" in stderr
    launch("status", code=1, unknown="machine")
    assert launch.commands() == []


@pytest.mark.parametrize("verb", ["delete", "status"])
def test_a_wrong_project_is_not_an_empty_one(launch, verb):
    launch.cloud.change(projects=["other-project"])
    assert "project my-project: not found" in launch(verb, code=2, unknown="machine").stderr


def test_status_in_a_wrong_zone_names_the_right_one(launch):
    launch.cloud.queue("ACTIVE", zone="us-east1-d")
    launch.cloud.node("READY", zone="us-east1-d")
    assert launch("status").stdout.splitlines()[:2] == [
        "machine   prm: READY (machine in us-east1-d)",
        "machine   prm: ACTIVE (queued resource in us-east1-d)",
    ]
    launch.cloud.change(nodes={}, queuedResources={})
    assert "machine   prm: none in us-west4-a, nor in any other zone that answered\n" in launch("status").stdout


@pytest.mark.parametrize("verb", ["create", "up", slow("run")])
def test_a_name_is_used_in_one_zone_only(launch, verb):
    """Both machines would write to one folder of the bucket."""
    launch.cloud.node("READY", zone="us-east1-d")
    stderr = launch(verb, *UP, *TRAIN * (verb in ("up", "run")), code=1).stderr
    assert "prm is not in us-west4-a but in us-east1-d; use that zone, or another name" in stderr
    assert launch.commands() == []


def test_the_secret_stays_while_another_zone_has_a_machine_of_that_name(launch):
    launch.cloud.node("READY")
    launch.cloud.node("READY", zone="us-east1-d")
    launch.cloud.change(secrets=["jaxprm-prm"])
    stderr = launch("delete", "--yes").stderr
    assert "secret jaxprm-prm is not deleted, because prm exists in us-east1-d" in stderr
    assert launch.commands() == [f"compute tpus tpu-vm delete prm {WHERE} --quiet"]


@pytest.mark.parametrize("group", ["tpu-vm", slow("queued-resources")])
def test_the_secret_stays_if_other_zones_cannot_be_seen(launch, group):
    launch.cloud.node("READY")
    launch.cloud.change(secrets=["jaxprm-prm"])
    launch.cloud.scenario([[f"{group} list", [NETWORK]]])
    stderr = launch("delete", "--yes", code=1, unknown="machine").stderr
    assert "secret jaxprm-prm is not deleted, because another zone may have a prm" in stderr
    stderr = launch("delete", "--yes", code=1, unknown="machine").stderr
    assert "nothing is deleted: prm is not in us-west4-a, and may be in another zone" in stderr


def test_a_zone_that_does_not_answer_is_not_an_empty_one(launch):
    """`list` leaves it out without a word."""
    launch.cloud.node("READY")
    launch.cloud.change(unreachable=["us-west4-a"])
    launch("delete", "--yes", code=1, unknown="machine")
    launch("status", code=1, unknown="machine")


# ---- requests that fail on the client and succeed on the server


@pytest.mark.parametrize("queued", [[], slow(["--queued"])], ids=["node", "queued"])
@pytest.mark.parametrize(
    "text", [UNDERWAY, slow(CRASH), EXISTS, QUOTA, slow("")], ids="underway crash exists quota silent".split()
)
def test_a_create_that_fails_here_and_succeeds_there_is_used(launch, text, queued):
    late = ["ABSENT", "ABSENT", "CREATING", "READY"]
    launch.cloud.change(lives={"tpu-vm": [late], "queued-resources": [["ABSENT", "ABSENT", "ACCEPTED", "ACTIVE"]]})
    launch.cloud.scenario([[" create prm", [[1, "", text, "after"]]]])
    assert "create: " + (text[:60].strip() or "no answer") in launch("create", *UP, *queued).stderr
    assert creations(launch) == 1


def test_a_machine_that_appears_later_than_the_script_waits(launch):
    launch.cloud.change(lives={"tpu-vm": [["ABSENT"] * 20 + ["READY"]], "queued-resources": []})
    launch.cloud.scenario([["tpu-vm create", [[1, "", QUOTA, "after"]]]])
    stderr = launch("create", *UP, code=1).stderr
    assert "a request of this call ended without success, and could still create it. Check again with:" in stderr


def test_a_late_machine_is_not_created_twice(launch):
    """The first request seems to have found no capacity."""
    launch.cloud.change(lives={"tpu-vm": [["ABSENT", "ABSENT", "READY"]], "queued-resources": []})
    launch.cloud.scenario([["tpu-vm create", [[*STOCKOUT, "after"]]]])
    launch("create", *UP)
    assert creations(launch) == 1


@pytest.mark.parametrize("kind", ["node", slow("queue")])
def test_a_delete_that_fails_here_and_succeeds_there(launch, kind):
    getattr(launch.cloud, kind)("READY" if kind == "node" else "ACTIVE")
    launch.cloud.change(secrets=["jaxprm-prm"], polls_of_delete=3)
    launch.cloud.scenario([[" delete prm", [[1, "", UNDERWAY, "after"]]]])
    launch("delete", "--yes")
    assert launch.commands()[1:] == ["secrets delete jaxprm-prm --project=my-project --quiet"]


def test_a_delete_that_fails_says_what_costs_money(launch):
    launch.cloud.node("READY")
    launch.cloud.change(secrets=["jaxprm-prm"])
    launch.cloud.scenario([["tpu-vm delete", [NETWORK]]])
    assert "prm is not deleted after 5 tries" in launch("delete", "--yes", code=1).stderr


def test_a_node_that_a_lost_queued_resource_leaves_behind_is_deleted_first(launch):
    launch.cloud.queue("SUSPENDED")
    launch.cloud.node("READY")
    launch.cloud.change(kept_nodes=[("us-west4-a", "prm")])
    launch("create", *UP, "--queued")
    assert [command.split()[2:4] for command in launch.commands()] == [
        ["queued-resources", "delete"],
        ["tpu-vm", "delete"],
        ["queued-resources", "create"],
    ]


# ---- an error is not an answer


def test_an_unreachable_cloud_is_not_an_empty_one(launch):
    launch.cloud.node("READY")
    launch.cloud.scenario([["describe prm", [NETWORK]], ["list --zone=-", [NETWORK]]])
    stderr = launch("create", *UP, code=1, unknown="machine").stderr
    assert "cannot see whether prm exists in us-west4-a: ERROR: gcloud crashed" in stderr
    assert "Check with: launch_tpu.sh status --name prm" in stderr and creations(launch) == 0


@pytest.mark.parametrize("answer", [FORBIDDEN, NONE], ids=["403", "silent"])
def test_a_machine_that_has_reported_is_not_deleted_because_the_bucket_is_silent(launch, answer):
    launch.cloud.scenario([[MARKS, [NONE, UNFINISHED, *[answer] * 3, DONE]]])
    stderr = launch("up", *UP, *TRAIN, START_POLLS="2").stderr
    assert "done; results in" in stderr and creations(launch) == 1
    assert ("cannot read" if answer is FORBIDDEN else "no worker has reported for a long time") in stderr


def test_a_bucket_that_cannot_be_read_says_nothing_about_the_machine(launch):
    launch.cloud.scenario([[MARKS, [NONE, *[FORBIDDEN] * 3, DONE]]])
    stderr = launch("up", *UP, *TRAIN, START_POLLS="2").stderr
    assert "cannot read gs://my-bucket/prm/state, so it is unknown how the run is" in stderr
    assert "done; results in" in stderr and creations(launch) == 1


def test_a_machine_that_reported_in_an_earlier_run_is_not_deleted_either(launch):
    launch.cloud.node("READY")
    ended = [0, "gs://my-bucket/prm/state/worker-0\n", ""]
    launch.cloud.put("my-bucket/prm/state/worker-0", "done\n")
    launch.cloud.scenario([[MARKS, [ended, *[NONE] * 3, DONE]]])
    launch("up", *UP, *TRAIN, START_POLLS="2")


@pytest.mark.parametrize("verb", ["up", slow("run")])
def test_marks_of_an_earlier_run_that_cannot_be_read_stop_a_new_one(launch, verb):
    """A mark that stays would keep the machine from starting the run."""
    if verb == "run":
        launch.cloud.node("READY")
    launch.cloud.scenario([[MARKS, [FORBIDDEN]]])
    stderr = launch(verb, *UP, *TRAIN, code=1).stderr
    assert "cannot read gs://my-bucket/prm/state: ERROR" in stderr and creations(launch) == 0


@pytest.mark.parametrize("command", [slow([]), TRAIN], ids=["watch", "start"])
def test_a_stored_command_that_cannot_be_read_is_not_a_missing_one(launch, command):
    launch.cloud.node("READY")
    launch.cloud.put("my-bucket/prm/job/command", "tree\nnone\ntrain\n")
    launch.cloud.scenario([["storage ls & /job/command", [FORBIDDEN]]])
    assert "cannot read gs://my-bucket/prm/job: ERROR" in launch("up", *UP, *command, code=1).stderr
    assert (launch.cloud.bucket / "my-bucket/prm/job/command").read_text() == "tree\nnone\ntrain\n"


def test_status_and_logs_do_not_take_an_error_for_an_answer(launch, tmp_path):
    launch.cloud.node("READY")
    launch.cloud.put("my-bucket/prm/logs/worker-0.log", "one\n")
    launch.cloud.scenario([["storage ls", [FORBIDDEN]]])
    assert "run       unknown (ERROR: (gcloud.storage.ls) [me@example.com] does not have" in launch("status").stdout
    assert "cannot read gs://my-bucket/prm/state" in launch("logs", "--follow", code=1).stderr
    launch.cloud.scenario([["storage cat", [FORBIDDEN]], ["storage rsync", [FORBIDDEN]]])
    for output in ([], ["--output", str(tmp_path)]):
        assert "cannot read gs://my-bucket/prm/logs" in launch("logs", *output, code=1).stderr


# ---- the secret


def test_a_secret_that_stays_without_a_machine_is_reported_and_deleted_later(launch, secrets):
    launch.cloud.scenario([["tpu-vm create", [STOCKOUT]]])
    stderr = launch("up", *UP, *secrets, *TRAIN, code=1, CREATE_TRIES="2").stderr
    assert "cost: secret jaxprm-prm exists" in stderr
    launch("delete")
    assert launch.commands()[-1] == "secrets delete jaxprm-prm --project=my-project --quiet"


@pytest.mark.parametrize("verb", ["delete", slow("up")])
def test_a_secret_that_cannot_be_deleted_does_not_hide_the_machine(launch, verb):
    launch.cloud.node("READY")
    launch.cloud.put("my-bucket/prm/job/command", "tree\njaxprm-prm\ntrain\n")
    launch.cloud.put("my-bucket/prm/state/done", "exit code 0\n")
    launch.cloud.change(secrets=["jaxprm-prm"])
    launch.cloud.scenario([["secrets delete", [[1, "", "ERROR: PERMISSION_DENIED\n"]]]])
    stderr = launch(verb, *(["--yes"] if verb == "delete" else UP), code=1).stderr
    assert "deleted prm, but not secret jaxprm-prm; try again: launch_tpu.sh delete" in stderr


def test_a_secret_that_cannot_be_seen_is_unknown(launch, secrets):
    denied = (
        "ERROR: PERMISSION_DENIED: Permission 'secretmanager.secrets.get' denied for resource (or it may not exist).\n"
    )
    launch.cloud.scenario([["secrets describe", [[1, "", denied]]]])
    stderr = launch("up", *UP, *secrets, *TRAIN, code=1, unknown="secret").stderr
    assert "cannot see whether secret jaxprm-prm exists" in stderr and creations(launch) == 0
    assert "but secret jaxprm-prm may exist" in launch("delete", code=1, unknown="secret").stderr


@pytest.mark.parametrize("path", ["-", "-x.env"])
def test_a_file_of_secrets_with_the_name_of_an_option_is_a_file(launch, tmp_path, monkeypatch, path):
    """gcloud reads the standard input for `--data-file=-`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).write_text("A=hf_secret\n")
    (tmp_path / path).chmod(0o600)
    assert f"--data-file=./{path} " in launch("up", *UP, "--dry-run", "--env-file", path, *TRAIN).stdout


# ---- two calls at once


def test_a_run_that_another_call_is_starting_is_not_replaced(launch):
    launch.cloud.put("my-bucket/prm/state/starting", "other, process 7\n")
    stderr = launch("up", *UP, *TRAIN, code=1).stderr
    assert "prm is being started by another call (other, process 7)" in stderr
    assert "gcloud storage rm gs://my-bucket/prm/state/starting" in stderr
    assert launch.commands() == [] and (launch.cloud.bucket / "my-bucket/prm/state/starting").exists()


@pytest.mark.parametrize("fault", ["code-", "tpu-vm create"])
def test_a_call_that_ends_lets_the_next_one_start(launch, fault):
    launch.cloud.scenario([[fault, [[1, "", QUOTA]]], ENDS])
    launch("up", *UP, *TRAIN, code=None)
    assert not (launch.cloud.bucket / "my-bucket/prm/state/starting").exists()


@pytest.mark.slow
def test_two_calls_at_once_start_one_machine_with_one_command(launch):
    launch.cloud.scenario([["tpu-vm create", [None]], [MARKS, [NONE]], ["state/starting", [None]]])
    calls = [launch.start("up", *UP, "--", "train", "configs/textcraft_tiny.py", f"a={n}") for n in range(2)]
    wait_for(lambda: any(process.poll() is not None for process in calls))
    loser = next(index for index, process in enumerate(calls) if process.poll() is not None)
    output = calls[loser].communicate(timeout=30)[1]
    assert "is being started by another call" in output or "has a run that is not finished" in output
    wait_for(lambda: launch.cloud.ledger()["nodes"])
    os.killpg(calls[1 - loser].pid, signal.SIGINT)
    launch.check(calls[1 - loser].communicate(timeout=30)[1])
    assert creations(launch) == 1
    assert f"a={1 - loser}" in (launch.cloud.bucket / "my-bucket/prm/job/command").read_text()


# ---- signals


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(launch, number: int, verb: str, *arguments: str) -> tuple[int, str]:
    """Starts a call, sends the signal to it and its children when a gcloud call hangs; returns exit code and stderr."""
    process = launch.start(verb, *arguments)
    wait_for((launch.cloud.home / "hangs").exists)
    os.killpg(process.pid, number)
    return process.returncode or process.wait(timeout=30), process.communicate(timeout=30)[1]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), slow(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_says_what_exists(launch, number, code):
    launch.cloud.scenario([["tpu-vm create", [["hang", "", "", "after"]]]])
    status, stderr = interrupt(launch, number, "up", *UP, *TRAIN)
    launch.check(stderr)
    assert status == code and "machine prm in us-west4-a is READY and costs money" in stderr
    assert "interrupted. A run on the machine continues" in stderr


@pytest.mark.parametrize("life", [slow(None), ["ABSENT"] * 9 + ["READY"]], ids=["never", "later"])
def test_ctrl_c_before_the_machine_appears(launch, life):
    launch.cloud.change(lives={"tpu-vm": [life] if life else [], "queued-resources": []})
    launch.cloud.scenario([["tpu-vm create", [["hang", "", "", *["after"] * bool(life)]]]])
    status, stderr = interrupt(launch, signal.SIGINT, "create", *UP)
    launch.check(stderr)
    assert status == 130 and "could still create it" in stderr


def test_a_closed_terminal_does_not_keep_the_script_from_ending(launch):
    """Its messages have no reader then."""
    launch.cloud.scenario([["tpu-vm create", [["hang", "", "", "after"]]]])
    process = launch.start("create", *UP)
    wait_for((launch.cloud.home / "hangs").exists)
    process.stderr.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=30) == 129
    launch.started = False


# ---- every call fails once


VERBS = {"create": UP, "up": [*UP, *TRAIN], "run": [*UP, *TRAIN], "delete": ["--yes"]}
CRASHED = "ERROR: gcloud crashed (ConnectionError)\n"


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_whichever_call_fails_the_last_lines_are_true(launch, secrets, verb):
    """Each call of the verb fails once, in a run of its own. The last run shows that there are no more calls."""
    calls = 0
    while len(launch.cloud.calls()) >= calls:
        calls += 1
        prepare(launch, verb)
        launch.cloud.scenario([[f"#{calls}", [[1, "", CRASHED]]], *[ENDS] * (verb == "up")])
        launch(verb, *secrets * (verb in ("up", "run")), *VERBS[verb], code=None, unknown=None, CREATE_TRIES="2")
    assert calls > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb, change",
    [
        ("up", "state/starting"),
        ("up", "storage cp & code-"),
        ("up", "secrets create"),
        ("up", "secrets versions add"),
        ("up", "storage cp & job/command"),
        ("up", "tpu-vm create"),
        ("up", "tpu-vm delete"),
        ("up", "secrets delete"),
        ("run", "tpu-vm ssh"),
    ],
)
@pytest.mark.parametrize("code", [1, "hang"], ids=["answer lost", "killed"])
def test_a_change_that_succeeds_without_an_answer_is_reported(launch, secrets, verb, change, code):
    prepare(launch, verb)
    launch.cloud.scenario([[change, [[code, "", CRASHED, "after"], None]], *[ENDS] * (verb == "up")])
    if code == "hang":
        launch.check(interrupt(launch, signal.SIGHUP, verb, *secrets, *VERBS[verb])[1])
    else:
        launch(verb, *secrets, *VERBS[verb], code=None)


@pytest.mark.parametrize("group", ["tpu-vm", slow("secrets")])
def test_ctrl_c_while_it_asks_what_exists(launch, group):
    launch.cloud.node("READY")
    launch.cloud.scenario(
        [[f"gcloud & {group} & list" if group == "tpu-vm" else "secrets describe", [["hang", "", ""]]]]
    )
    status, stderr = interrupt(launch, signal.SIGINT, "ssh")
    launch.check(stderr, unknown=None)
    assert status == 0 and "unknown whether" in stderr


def prepare(launch, verb: str) -> None:
    (launch.cloud.home / "calls").unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", str(launch.cloud.bucket)], check=True)
    running = {("us-west4-a", "prm"): ["READY"]} if verb in ("run", "delete") else {}
    launch.cloud.change(nodes=running, secrets=["jaxprm-prm"] * (verb == "delete"))
    launch.earlier_calls = 0
