"""`check-scorer` passes a sound model and fails a faulty cache, with the difference."""

import json
import re

import pytest

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import PrefixBank
from jaxprm.scoring.check import Check, Comparison, check_scorer
from tests.model import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_reward_model(tmp_path_factory.mktemp("check") / "model")


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Three conversations, two of which share a prompt, and one without a step, which is skipped."""
    first, second = tiny.conversation(1, turns=3), tiny.conversation(2, turns=2)
    lines = [first, [*first[:3], {"role": "assistant", "content": "Action: craft stick"}], first[:1], second]
    path = tmp_path_factory.mktemp("input") / "trajectories.jsonl"
    texts = [json.dumps({"id": str(number), "messages": line}) + "\n" for number, line in enumerate(lines)]
    path.write_text("".join(texts))
    return path


@pytest.mark.slow
def test_a_sound_model_passes_in_every_way(model, trajectories, capsys):
    assert cli.main(["check-scorer", "--model", str(model), "--input", str(trajectories)]) == 0
    printed = capsys.readouterr().out
    ways = dict(re.findall(r"^(.+?) +(\d+) scores, largest", printed, re.MULTILINE))
    # 3 + 2 + 2 steps. Whole conversations are compared at every token, packed ones without their prompts.
    assert 50 < int(ways["packed behind prompts"]) < int(ways["in padded batches"])
    assert ways["candidates after the cache"] == ways["the same, with evictions"] == "7"
    assert int(ways["in padded batches"]) == int(ways["in bfloat16"]) > 300
    assert re.search(r"^passed: largest difference \d\.\d\de-\d\d, bound 1\.00e-05$", printed, re.MULTILINE)


@pytest.mark.slow
def test_a_cache_that_mixes_up_its_slots_fails(model, monkeypatch, capsys):
    allocate = PrefixBank.allocate
    monkeypatch.setattr(PrefixBank, "allocate", lambda bank, prefixes: allocate(bank, prefixes)[::-1])
    assert cli.main(["check-scorer", "--model", str(model)]) == 1
    assert float(re.search(r"^FAILED: largest difference (\S+), ", capsys.readouterr().out, re.MULTILINE)[1]) > 1e-2


def test_scores_that_are_no_numbers_fail():
    assert not Check(
        [Comparison("a", 1, 0.0), Comparison("b", 1, float("nan"))], 1e-5, Comparison("c", 1, 0.0), 1.0
    ).passed


def test_a_file_without_a_step_is_refused(model, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": tiny.conversation(1)[:1]}) + "\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no trajectory with a step to score"):
        check_scorer(model, path)
