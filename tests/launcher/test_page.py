"""Every launch_tpu.sh command of docs/tpu.md is accepted, as a dry run in a user's clone."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from tests.docs import pages

ENVIRONMENT = {"JAXPRM_PROJECT": "my-project", "JAXPRM_ZONE": "us-west4-a", "JAXPRM_BUCKET": "my-bucket"}
LINES = [line for block in pages.blocks("tpu.md") if block.language == "sh" for line in block.text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("./launch_tpu.sh ")]


def test_the_page_shows_every_verb():
    verbs = {"create", "setup", "run", "up", "status", "logs", "ssh", "delete"}
    assert {line.split()[1] for line in COMMANDS} == verbs
    assert {line.split()[0] for line in LINES} == {"./launch_tpu.sh", "gcloud", "export", "python"}
    (export,) = [line for line in LINES if line.startswith("export ")]
    assert export == "export " + " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_are_accepted(clone, cloud, tmp_path, line):
    (tmp_path / "secrets.env").write_text("A=1\n")
    (tmp_path / "secrets.env").chmod(0o600)
    _, verb, *arguments = shlex.split(line)
    process = subprocess.run(
        [str(clone / "launch_tpu.sh"), verb, *["--dry-run"] * ("--dry-run" not in arguments), *arguments],
        env=cloud.environment(**ENVIRONMENT),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "+ gcloud " in process.stdout
    assert cloud.calls() == []


def test_the_page_names_every_image_and_verb():
    text = (pages.ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    options = (pages.ROOT / "scripts" / "tpu_options.sh").read_text()
    images = set(re.findall(r"IMAGE=([a-z0-9-]+)", options))
    assert len(images) == 4 and {image for image in images if f"`{image}`" not in text} == set()
    verbs = re.search(r'VERBS_WITH_WORKDIR="(.*?)"', options)[1].split()
    assert {verb for verb in verbs if f"`{verb}`" not in text} == set()
