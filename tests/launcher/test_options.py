"""Options that launch_tpu.sh rejects before any gcloud call, and secrets that it never prints."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm import arguments as arguments_lib
from tests.launcher.conftest import COMMON
from tests.launcher.fakes import ROOT
from tests.launcher.test_commands import ENDS, TRAIN

SCRIPTS = ["launch_tpu.sh", "scripts/tpu_worker.sh"]
ATTACKS = ["$(touch pwned)", "a;id", "a\nb", "-a"]
MORE = ["`id`", "a b", "a|id", "a&id", "a'", 'a"', "a>b", "../a", "a$HOME", "a{b,c}", "A", ""]
UP = ["--accelerator", "v5e-8"]
SECRET_IN = ["up", *UP, "--", "run", "configs/mine.py"]


def test_shellcheck_finds_nothing(clone):
    """Also in the files that launch_tpu.sh reads."""
    result = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), "-x", "-a", *SCRIPTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "option",
    [
        "--name",
        "--project",
        "--zone",
        "--bucket",
        "--accelerator",
        "--runtime",
        "--valid-until",
        "--network",
        "--subnetwork",
        "--service-account",
        "--worker",
    ],
)
def test_identifiers_with_other_characters_are_refused(launch, option):
    """Each with one line that names the option, and without a gcloud call."""
    for attack in ATTACKS + MORE * (option == "--name"):
        (line,) = launch("create", *UP, option, attack, code=2).stderr.splitlines()
        assert option in line
    assert launch.commands() == []
    assert not (launch.clone / "pwned").exists()


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["create", "--accelerator", "v3-8"], "supported: v4, v5e, v5p, v6e"),
        (["create", "--accelerator", "v6e-12"], "v6e has no slice of 12 chips; one of 1 4 8 16 32 64 128 256"),
        (["create", "--accelerator", "v5p-12"], "v5p-12 counts cores"),
        (["create", *UP, "--spot", "--reserved"], "--spot and --reserved: choose one"),
        (["create", *UP, *TRAIN], "a command after --: only for run and up"),
        (["create", *UP, "--fast"], "no option --fast"),
        (["create", *UP, "--zone"], "--zone: needs a value"),
        (["run", *UP], "run: no command"),
        (["up", *UP, "--", "score", "configs/mine.py"], "command score: one of run collect build"),
        (["up", *UP, "--", "run", "/etc/passwd"], "is not a config file in"),
        (["up", *UP, "--", "run", "configs/../../x.py"], "is not a config file in"),
        (["up", *UP, "--", "run", "configs/none.py"], "is not a config file in"),
        (["up", *UP, "--", "run", "configs/mine.py", "--workdir", "x"], "the launcher sets --workdir; remove it"),
        (["up", *UP, "--", "run", "configs/mine.py", "a\nb"], "an argument contains a line break"),
        ([*SECRET_IN, "policy.endpoint.api_key=abc"], "command: policy.endpoint.api_key looks like a secret"),
        ([*SECRET_IN, "policy.arguments.note=sk-proj-AbCdEf0123456789"], "policy.arguments.note looks like a secret"),
    ],
)
def test_mistakes_get_one_line(launch, arguments, line):
    result = launch(*arguments, code=2)
    assert line in result.stderr and len(result.stderr.splitlines()) == 1
    assert launch.commands() == []


def test_an_unknown_verb_is_named(clone):
    result = subprocess.run([str(clone / "launch_tpu.sh"), "fly"], capture_output=True, text=True)
    assert result.returncode == 2 and "no verb fly" in result.stderr


def test_help_names_every_verb_and_option(clone):
    text = subprocess.run([str(clone / "launch_tpu.sh"), "--help"], capture_output=True, text=True, check=True).stdout
    source = (ROOT / "scripts" / "tpu_options.sh").read_text()
    parser = source[source.index("parse() {") : source.index("valid() {")]
    options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", parser)) - {"--help"}
    assert len(options) > 15 and {option for option in options if option not in text} == set()
    assert {"create", "setup", "run", "up", "status", "logs", "ssh", "delete"} <= set(text.split())


def test_the_verbs_for_the_machine_are_verbs_with_a_work_directory():
    allowed = re.search(r'VERBS_WITH_WORKDIR="(.*?)"', (ROOT / "scripts" / "tpu_options.sh").read_text())[1].split()
    actions = arguments_lib.parser()._actions
    verbs = next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices
    assert all("--workdir" in verbs[verb]._option_string_actions for verb in allowed) and len(allowed) == 7


@pytest.mark.parametrize(
    "accelerator, settings",
    [
        ("v4-8", "GENERATION=v4 DEVICES=4 WORKERS=1"),
        ("v5e-1", "GENERATION=v5e DEVICES=1 WORKERS=1"),
        ("v5litepod-16", "GENERATION=v5e DEVICES=16 WORKERS=4"),
        ("v5p-32", "GENERATION=v5p DEVICES=16 WORKERS=4"),
        ("v6e-256", "GENERATION=v6e DEVICES=256 WORKERS=64"),
    ],
)
def test_the_startup_script_knows_the_slice(launch, accelerator, settings):
    """v4 and v5p count cores, two per chip. A host has four chips, or up to eight in a v5e or v6e of one host."""
    launch.cloud.node("READY")
    copy = launch.cloud.home / "startup"
    fake = launch.cloud.home / "bin" / "gcloud"
    real = launch.cloud.home / "real" / "gcloud"  # the program acts by its name
    real.parent.mkdir()
    fake.rename(real)
    fake.write_text(f'#!/bin/bash\n[[ $* != *scp* ]] || cp "$5" {copy}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    launch("setup", "--accelerator", accelerator)
    first, second = copy.read_text().splitlines()[:2]
    assert first == "#!/bin/bash"
    assert second == f"NAME=prm BUCKET=my-bucket PROJECT=my-project {settings}"


def test_the_image_can_be_chosen(launch):
    launch("create", *UP, "--runtime", "v2-alpha-tpuv5-lite-next")
    assert any("--version=v2-alpha-tpuv5-lite-next" in command for command in launch.commands())


def test_options_can_come_from_the_environment(clone, cloud):
    names = {"JAXPRM_PROJECT": "my-project", "JAXPRM_ZONE": "us-west4-a", "JAXPRM_BUCKET": "gs://my-bucket"}
    result = subprocess.run(
        [str(clone / "launch_tpu.sh"), "ssh", "--name", "prm", "--dry-run"],
        env=cloud.environment(**names),
        capture_output=True,
        text=True,
        check=True,
    )
    ssh = "+ gcloud compute tpus tpu-vm ssh prm --zone=us-west4-a --project=my-project --worker=0"
    assert result.stdout.splitlines()[0] == ssh


@pytest.mark.parametrize("verb", ["create", "setup", "run", "up", "status", "logs", "ssh", "delete"])
def test_a_dry_run_prints_commands_and_runs_none(launch, verb, tmp_path):
    secrets = tmp_path / "secrets.env"
    secrets.write_text("HF_TOKEN=hf_secret\n")
    secrets.chmod(0o600)
    command = {"run": TRAIN, "up": TRAIN}.get(verb, [])
    accelerator = UP if verb in ("create", "setup", "run", "up") else []
    env_file = ["--env-file", str(secrets)] if command else []
    result = launch(verb, "--dry-run", *accelerator, *env_file, *command)
    assert launch.commands() == []
    assert result.stdout and all(line.startswith("+ ") for line in result.stdout.splitlines() if "  " not in line)
    expected = {"create": "tpu-vm create", "setup": "worker.sh\\ check", "run": "worker.sh\\ boot"}
    expected |= {"up": "tpu-vm create", "status": "tpu-vm describe", "logs": "storage cat"}
    expected |= {"ssh": "tpu-vm ssh", "delete": "tpu-vm delete"}
    assert expected[verb] in result.stdout
    assert "hf_secret" not in result.stdout + result.stderr


def test_secrets_are_in_no_command_and_no_output(launch, tmp_path):
    secrets = launch.clone / "my.env"  # in the tree, but not in the code that is sent
    secrets.write_text("# mine\nHF_TOKEN=hf_secret\n\nURL=https://me:word@host/?a=$(id)")
    secrets.chmod(0o600)
    launch.cloud.scenario([ENDS])
    result = launch("up", *UP, "--keep", "--env-file", str(secrets), *TRAIN)
    commands = launch.commands()
    secrets.unlink()
    assert "secrets create jaxprm-prm --project=my-project --replication-policy=automatic --quiet" in commands
    assert f"secrets versions add jaxprm-prm --project=my-project --data-file={secrets} --quiet" in commands
    everything = result.stdout + result.stderr + "\n".join(commands)
    everything += "".join(path.read_text() for path in (launch.cloud.bucket / "my-bucket/prm/job").glob("command"))
    assert "hf_secret" not in everything and "word@host" not in everything
    assert (launch.cloud.bucket / "my-bucket/prm/job/command").read_text().split("\n")[1] == "jaxprm-prm"
    (code,) = (launch.cloud.bucket / "my-bucket/prm/job").glob("code-*.tar.gz")
    assert "my.env" not in subprocess.run(["tar", "-tzf", str(code)], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "mode, text, line",
    [
        (0o644, "A=hf_secret\n", "others may read it; chmod 600 it"),
        (0o600, "A=1\nexport B=hf_secret\n", "line 2 is not NAME=value"),
        (0o600, "A=1\nhf_secret", "line 2 is not NAME=value"),
    ],
)
def test_an_env_file_that_is_open_or_malformed_is_refused(launch, tmp_path, mode, text, line):
    path = tmp_path / "secrets.env"
    path.write_text(text)
    path.chmod(mode)
    stderr = launch("up", *UP, "--env-file", str(path), *TRAIN, code=2).stderr
    assert line in stderr and "hf_secret" not in stderr
    assert launch.commands() == []


def test_an_env_file_that_a_later_call_would_send_is_refused(launch):
    secrets = launch.clone / "my-secrets"
    secrets.write_text("A=1\n")
    secrets.chmod(0o600)
    stderr = launch("up", *UP, "--env-file", str(secrets), *TRAIN, code=2).stderr
    secrets.unlink()
    assert "is in the tree that is sent to the bucket; rename it to my-secrets.env" in stderr
    (launch.clone / "ignored").mkdir(exist_ok=True)
    hidden = launch.clone / "ignored" / "secrets"
    hidden.write_text("A=1\n")
    hidden.chmod(0o600)
    assert launch("up", "--dry-run", *UP, "--env-file", str(hidden), *TRAIN).stdout


def test_a_missing_gcloud_is_reported(clone, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "tr", "cat", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        [str(clone / "launch_tpu.sh"), "create", *COMMON, *UP],
        env={"PATH": str(tmp_path / "bin"), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "no gcloud: install the Google Cloud CLI" in result.stderr
