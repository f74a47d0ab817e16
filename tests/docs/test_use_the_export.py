"""docs/use-the-export.md, executed: its commands, and its programs, whose scores equal ours."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxprm
from tests.docs import pages
from tests.model import tiny

pytestmark = pytest.mark.slow
PAGE = "use-the-export.md"
MODEL = "runs/demo/reward_models/agentprm/seed-0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and its commands run on a reward model where it expects the demo's."""
    folder = tmp_path_factory.mktemp("export")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    tiny.write_reward_model(folder / MODEL / "model")
    for arguments in pages.shell(PAGE):
        assert "verified: largest difference" in run(folder, *arguments)
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ours(folder: Path, model: str, *actions: str) -> list[float]:
    messages = [{"role": "user", "content": "Goal: craft torch."}]
    for action in actions:
        messages += [{"role": "assistant", "content": action}, {"role": "user", "content": "Got 1 coal"}]
    (result,) = jaxprm.load(folder / model).score([messages[:-1]])
    return [step["promise"] for step in result["steps"]]


def test_a_sequence_classifier_scores_candidates_as_we_do(folder):
    expected = [ours(folder, MODEL, f"Action: get 1 {item}")[0] for item in ("coal", "stick")]
    assert ast.literal_eval(run(folder, "of_sequences.py")) == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_a_token_classifier_scores_all_steps_as_we_do(folder):
    expected = ours(folder, "my-prm-token", "Action: get 1 coal", "Action: inventory")
    assert ast.literal_eval(run(folder, "of_tokens.py")) == pytest.approx(expected, abs=1e-5)
    # Its weights were rounded, and moved the scores by less than the page's reader would care for.
    assert expected == pytest.approx(ours(folder, MODEL, "Action: get 1 coal", "Action: inventory"), abs=0.1)


def test_we_read_it_ourselves(folder):
    expected = ours(folder, "my-prm-token", "Action: get 1 coal")
    assert float(run(folder, "again.py")) == pytest.approx(expected[0], abs=1e-5)


def test_untested_programs_are_marked():
    text = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    for section in ("vLLM", "SGLang", "TRL"):
        assert re.search(rf"^## {section}\n\n\*Needs .*, not run here\.\*", text, re.MULTILINE)
