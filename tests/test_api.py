"""The Python interface, as an agent's loop uses it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import jaxprm
from data_pipeline.chat_template import as_messages
from data_pipeline.errors import DataError
from data_pipeline.trajectory import Trajectory
from jaxprm.api import ActionScore
from jaxprm.errors import UserError
from tests.model import tiny

STATE = tiny.reward_model()
MESSAGES = tiny.conversation(3, turns=4)
TEXTS = ["Action: get 1 stick", "Action: craft torch"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_reward_model(tmp_path_factory.mktemp("model"), STATE)


@pytest.fixture(scope="module")
def model(directory):
    return jaxprm.load(directory, rows=2, max_tokens=480)


def promises(messages) -> np.ndarray:
    encoded = tiny.encoder().trajectory(messages, row="")
    return tiny.values(STATE, encoded.tokens[None])[0, encoded.read_positions]


def acted(messages, text) -> list[dict]:
    return [*messages, {"role": "assistant", "content": text}]


def test_every_form_of_a_trajectory_gives_the_same_scores(model):
    trajectory = Trajectory(id="row", messages=as_messages(MESSAGES, "test"))
    results = model.score([MESSAGES, {"messages": MESSAGES, "reward": 1}, trajectory, trajectory.messages])
    for result in results:  # one call: they share a prompt, and rounding depends on the position in a row
        assert [step["message"] for step in result["steps"]] == [1, 3, 5, 7]
        tiny.assert_close([step["promise"] for step in result["steps"]], promises(MESSAGES))
    assert results[0]["score"] == results[0]["steps"][-1]["promise"]


@pytest.mark.parametrize("end", [1, 3, 7])
def test_an_action_scores_as_the_last_step_of_its_conversation(model, end):
    scores = model.score_actions(MESSAGES[:end], TEXTS)
    assert len(scores) == len(TEXTS)
    for score, text in zip(scores, TEXTS, strict=True):
        assert isinstance(score, ActionScore)
        last = model.score([acted(MESSAGES[:end], text)])[0]["steps"][-1]
        tiny.assert_close(score.promise, last["promise"])
        if end == 1:
            assert (score.progress, last["progress"]) == (None, None)
        else:
            assert score.progress == pytest.approx(last["progress"], abs=2e-5)


def test_messages_and_texts_are_the_same_candidates(model):
    texts = model.score_actions(MESSAGES[:3], TEXTS)
    assert model.score_actions(MESSAGES[:3], [{"role": "assistant", "content": text} for text in TEXTS]) == texts
    assert model.score_actions(as_messages(MESSAGES[:3], "test"), TEXTS) == texts
    assert model.score_actions(MESSAGES[:3], []) == []


def test_progress_is_relative_to_the_last_message_that_is_a_step(model):
    messages = [*MESSAGES[:3], {"role": "assistant", "content": "Understood.", "step": False}, MESSAGES[4]]
    before, after = promises([*MESSAGES[:2]])[-1], promises(acted(messages, TEXTS[0]))[-1]
    (score,) = model.score_actions(messages, TEXTS[:1])
    assert score.progress == pytest.approx(after - before, abs=2e-5)


def test_an_agents_loop_encodes_only_what_is_new(directory):
    model = jaxprm.load(directory, rows=2, max_tokens=480)
    history = MESSAGES[:1]
    for observation in MESSAGES[2:7:2]:
        scores = model.score_actions(history, TEXTS)
        history = [*acted(history, TEXTS[int(np.argmax([score.promise for score in scores]))]), observation]
    before = model.usage["encoded"]
    model.score_actions(history, TEXTS)
    # The action and observation of the last turn, the opening of the next, and two candidates.
    assert 0 < model.usage["encoded"] - before < 80
    assert len(tiny.encoder().prompt(history)) > 120


def test_a_discounted_model_gives_no_progress(tmp_path):
    model = jaxprm.load(tiny.write_reward_model(tmp_path, STATE, targets={"discount": 0.5}), rows=2, max_tokens=480)
    assert [score.progress for score in model.score_actions(MESSAGES[:3], TEXTS)] == [None, None]
    assert model.recipe["targets"] == {"discount": 0.5}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.score(MESSAGES), "list of trajectories"),
        (lambda model: model.score({"messages": MESSAGES}), "list of trajectories"),
        (lambda model: model.score_actions(MESSAGES[:1], "get 1 stick"), "list of candidates"),
        (lambda model: model.score_actions([], TEXTS), "messages: is empty"),
        (lambda model: model.score_actions([{"role": "user", "content": "a <|end|> b"}], TEXTS), "special token"),
    ],
)
def test_mistakes_are_named(model, call, words):
    with pytest.raises((UserError, DataError), match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_one_bad_row_costs_no_other(model):
    rows = [MESSAGES, [{"role": "user", "content": "x"}], {"id": "row"}, [{"role": "robot", "content": "x"}], MESSAGES]
    scores = model.score(rows)
    for score in (scores[0], scores[4]):
        tiny.assert_close([step["promise"] for step in score["steps"]], promises(MESSAGES))
        assert "error" not in score
    beginnings = ["trajectory 1: no assistant", "trajectory 2: has no", "trajectory 3: mess"]
    for score, words in zip(scores[1:4], beginnings, strict=True):
        assert (score["steps"], score["score"]) == ([], -np.inf) and score["error"].startswith(words)


def test_one_bad_candidate_costs_no_other(model):
    """Its error has its index, also if it is there twice; the best promise is never that of a candidate without one."""
    bad, user = "a <|end|> b", {"role": "user", "content": "x"}
    scores = model.score_actions(MESSAGES[:3], [TEXTS[0], bad, user, TEXTS[1], bad])
    assert [scores[0], scores[3]] == model.score_actions(MESSAGES[:3], TEXTS) and scores[0].error is None
    for index, words in ((1, "special token"), (2, "assistant message"), (4, "special token")):
        assert scores[index] == (-np.inf, None)
        assert scores[index].error.startswith(f"candidate {index}: ") and words in scores[index].error
    assert [score.error is None for score in model.score_actions(MESSAGES[:3], [bad, user])] == [False, False]


def test_a_character_missing_from_the_vocabulary_is_such_an_error(directory, tmp_path):
    """As in a byte-level vocabulary without all bytes, where the text cannot be decoded again."""
    lacking = shutil.copytree(directory, tmp_path / "model")
    tokenizer = json.loads((lacking / "tokenizer.json").read_text())
    letter = tokenizer["model"]["vocab"].pop("z")
    tokenizer["model"]["vocab"]["unused"] = letter
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "z" not in "".join(pair)]
    (lacking / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = jaxprm.load(lacking, rows=2, max_tokens=480)
    good, bad = model.score_actions(MESSAGES[:1], ["get 1 stick", "get 1 lapiz"])
    assert good.error is None and "candidate 1: decoding the token ids does not give the text" in bad.error
    rows = model.score([MESSAGES, [*MESSAGES[:1], {"role": "assistant", "content": "zz"}]])
    assert "error" not in rows[0] and rows[1]["error"].startswith("trajectory 1: decoding")


def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys, jaxprm; dir(jaxprm); heavy = ('jax', 'flax', 'tensorflow', 'torch', 'transformers', 'numpy'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_offers_its_surface_and_nothing_else():
    assert {"load", "Model", "ActionScore"} <= set(dir(jaxprm))
    assert jaxprm.load.__module__ == jaxprm.Model.__module__ == "jaxprm.api"
    assert callable(jaxprm.targets.lambda_returns)
    assert callable(jaxprm.losses.agent_prm_loss)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        jaxprm.lode  # noqa: B018
