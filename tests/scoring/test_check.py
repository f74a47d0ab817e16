"""`check-scorer` passes sound models and fails faulty caches and arithmetic, with the difference."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.hf import reader
from jaxprm.model import transformer
from jaxprm.model.prefix_bank import PrefixBank
from jaxprm.scoring import reference
from jaxprm.scoring.check import FACTOR, LEAST_ERROR, Check, Comparison, check_scorer
from tests.hf import test_families as families
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
    assert int(ways["each alone"]) == int(ways["in padded batches"]) == int(ways["in bfloat16"]) > 300
    largest, bound = map(float, re.search(r"^passed: largest difference (\S+), bound (\S+)$", printed, re.M).groups())
    error = float(re.search(r"float32 arithmetic alone moves scores of this model by up to (\S+)$", printed, re.M)[1])
    # Far from the bound, so that another machine's rounding passes too.
    assert bound == pytest.approx(FACTOR * error, rel=1e-2) and largest < bound / 3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slots", "last token"])
def test_a_faulty_cache_fails(model, monkeypatch, capsys, fault):
    allocate = PrefixBank.allocate
    faulty = {
        "slots": lambda bank, prefixes, *owner: allocate(bank, prefixes, *owner)[::-1],
        "last token": lambda bank, prefixes, *owner: allocate(bank, [prefix[:-1] for prefix in prefixes], *owner),
    }
    monkeypatch.setattr(PrefixBank, "allocate", faulty[fault])
    assert cli.main(["check-scorer", "--model", str(model)]) == 1
    printed = capsys.readouterr().out
    largest, bound = map(float, re.search(r"^FAILED: largest difference (\S+), bound (\S+)$", printed, re.M).groups())
    assert largest > 1e-2 and bound < 1e-4


@pytest.mark.slow
def test_wrong_arithmetic_fails_in_every_way(tmp_path, monkeypatch):
    """Even if all ways agree with each other: the reference shares no code with them."""
    norm = transformer.rms_norm
    monkeypatch.setattr(transformer, "rms_norm", lambda x, scale, epsilon: norm(x, scale, 1e-3))
    # Sizes that no other test has, because compiled programs are kept by their sizes.
    config = dataclasses.replace(tiny.CONFIG, intermediate_size=72)
    check = check_scorer(tiny.write_reward_model(tmp_path / "model", tiny.reward_model(config), config))
    assert not check.passed and min(way.largest for way in check.ways) > check.bound


@pytest.mark.parametrize("case", families.CASES)
def test_the_reference_is_torchs_forward_pass_in_float64(tmp_path, case):
    model = families.torch_model(case, "SequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path)
    config, parameters = reader.load_reward_model(tmp_path)
    double, tokens = model.double(), families.TOKENS[0]
    with torch.no_grad():
        hidden = double.model(torch.tensor(tokens[None])).last_hidden_state
        expected = double.score(hidden)[0, :, 0].numpy()
    values = {dtype: reference.values(config, parameters, [tokens], dtype)[0] for dtype in (np.float64, np.float32)}
    # torch rounds the angles of the rotary embedding to float32 in any case.
    assert np.abs(values[np.float64] - expected).max() < 1e-6 * np.abs(expected).max()
    error = np.abs(values[np.float32] - values[np.float64]).max()
    assert LEAST_ERROR * np.abs(expected).max() / 10 < error < 1e-5 * np.abs(expected).max()


def test_scores_that_are_no_numbers_fail():
    assert not Check(
        [Comparison("a", 1, 0.0), Comparison("b", 1, float("nan"))], 1e-5, Comparison("c", 1, 0.0), 1.0
    ).passed


def test_a_file_without_a_step_is_refused(model, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": tiny.conversation(1)[:1]}) + "\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no trajectory with a step to score"):
        check_scorer(model, path)
