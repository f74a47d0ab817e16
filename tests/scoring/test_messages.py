"""Messages as agents have them, in `score` and `score_actions`; reasoning as the model was trained."""

from __future__ import annotations

import copy
import json
import re

import pytest

import jaxprm
from data_pipeline.chat_template import write_tokenizer
from data_pipeline.encode import Encoder
from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.scoring.files import score_file
from jaxprm.scoring.loading import load_encoder
from tests.model import tiny

UNUSED = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
PLAIN = tiny.conversation(3, turns=3)
DUMPED = [message | (UNUSED if message["role"] == "assistant" else {}) for message in PLAIN]
BLOCKS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PLAIN]
# What a user says and the result of a tool are two messages for us: indices are those of the caller.
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "Got 1 coal"}
TWO = [{"role": "user", "content": [RESULT, {"type": "text", "text": "on"}]}, {"role": "assistant", "content": "x"}]


def thinking(messages):
    """The messages with reasoning in every reply."""
    return [m | ({"reasoning_content": "hm"} if m["role"] == "assistant" else {}) for m in messages]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return jaxprm.load(tiny.write_reward_model(tmp_path_factory.mktemp("model")), rows=2, max_tokens=256)


def test_dumps_and_blocks_score_as_plain_messages(model):
    plain, dumped, blocks = model.score([PLAIN, DUMPED, BLOCKS])
    assert [s["message"] for s in plain["steps"]] == [s["message"] for s in dumped["steps"]] == [1, 3, 5]
    for other in (dumped, blocks):
        tiny.assert_close([s["promise"] for s in other["steps"]], [s["promise"] for s in plain["steps"]])
    candidates = ["Action: x", {"role": "assistant", "content": "Action: x", **UNUSED}]
    candidates.append({"role": "assistant", "content": [{"type": "text", "text": "Action: x"}]})
    scores = model.score_actions(DUMPED[:1], candidates)
    tiny.assert_close([score.promise for score in scores], [scores[0].promise] * 3)


def test_a_step_is_named_by_the_index_of_the_callers_message(model):
    (result,) = model.score([[*PLAIN[:2], *TWO]])
    assert [step["message"] for step in result["steps"]] == [1, 3]


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"refusal": "no"}, r"message 1 \(assistant\): unknown field `refusal`"),
        ({"audio": {"id": "a"}}, r"message 1 \(assistant\) has `audio`"),
        ({"reasoning": "a", "reasoning_content": "b"}, "has different reasoning_content and reasoning"),
        ({"reasoning_content": "a"}, r"the reasoning in message 1 .* leave it out with --reasoning drop"),
    ],
)
def test_what_would_be_lost_is_an_error_that_names_it(model, field, reason):
    (of_row,) = model.score([[PLAIN[0], PLAIN[1] | field]])
    assert re.search(reason, of_row["error"]) and of_row["steps"] == []
    (of_candidate,) = model.score_actions(PLAIN[:1], [PLAIN[1] | field])
    assert "candidate 0" in of_candidate.error
    (of_system,) = model.score([{"system": "x", "messages": PLAIN}])
    assert "`system` is next to the messages" in of_system["error"]


def test_a_model_that_was_trained_without_reasoning_scores_without_it(tmp_path):
    encoder = Encoder(tiny.encoder().tokenizer, reasoning="drop")
    # As training records it.
    assert encoder.choices == {"reasoning": "drop"} and tiny.encoder().choices == {}
    recipe = {"fingerprints": {"tokenizer": encoder.fingerprint}, **encoder.choices}
    directory = tiny.write_reward_model(tmp_path / "model", **recipe)
    model = jaxprm.load(directory)
    with_thoughts, without = model.score([thinking(PLAIN), PLAIN])
    tiny.assert_close([s["promise"] for s in with_thoughts["steps"]], [s["promise"] for s in without["steps"]])
    with pytest.raises(UserError, match="trained with --reasoning drop.*leave --reasoning keep out"):
        jaxprm.load(directory, reasoning="keep")
    kept = tiny.write_reward_model(tmp_path / "kept", fingerprints={"tokenizer": tiny.encoder().fingerprint})
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "messages": thinking(PLAIN)}) + "\n")
    assert score_file(directory, rows, tmp_path / "out.jsonl").errors == 0
    assert score_file(kept, rows, tmp_path / "kept.jsonl").errors == 1


def test_the_advice_to_drop_reasoning_can_be_followed_where_the_model_has_seen_none(tmp_path, capsys, monkeypatch):
    """The template of this model prints no reasoning, so it was trained without."""
    model = tiny.write_reward_model(tmp_path / "model", fingerprints={"tokenizer": tiny.encoder().fingerprint})
    rows = tmp_path / "rows.jsonl"
    row = {"messages": thinking(PLAIN), "success": True}
    rows.write_text("".join(json.dumps(row | {"id": str(k), "task": str(k)}) + "\n" for k in range(2)))
    assert score_file(model, rows, tmp_path / "out.jsonl", reasoning="drop").errors == 0
    arguments = ["--model", str(model), "--input", str(rows)]
    assert cli.main(["evaluate", *arguments, "--samples", "10"]) == 2
    assert "--reasoning drop" in capsys.readouterr().err
    assert cli.main(["evaluate", *arguments, "--samples", "10", "--reasoning", "drop"]) == 0

    def load_scorer(model, **options):
        raise UserError(f"loaded with {options}")

    monkeypatch.setattr(loading, "load_scorer", load_scorer)
    pairs = tmp_path / "pairs.jsonl"
    chosen, rejected = ({"role": "assistant", "content": text} for text in "ab")
    pairs.write_text(json.dumps({"id": "a", "messages": PLAIN[:1], "chosen": chosen, "rejected": rejected}) + "\n")
    for verb, input in (("check-scorer", rows), ("evaluate", pairs)):
        arguments = [verb, "--model", str(model), "--input", str(input)]
        assert cli.main([*arguments, "--reasoning", "drop", "--special-tokens", "break"]) == 2
        assert "loaded with {'reasoning': 'drop', 'special_tokens': 'break'}" in capsys.readouterr().err


def test_reasoning_that_a_model_was_trained_with_is_not_dropped(tmp_path):
    tokenizer = copy.deepcopy(tiny.encoder().tokenizer)
    start = "{{ '<|assistant|>' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(start, start + "{{ message.reasoning_content or '' }}", 1)
    directory = tiny.write_reward_model(tmp_path, fingerprints={"tokenizer": Encoder(tokenizer).fingerprint})
    write_tokenizer(tokenizer.chat_template, tokenizer.eos_token, tiny.tokenizer_directory(), directory)
    assert load_encoder(directory).prints_reasoning
    with pytest.raises(UserError, match="trained with --reasoning keep.*leave --reasoning drop out"):
        load_encoder(directory, reasoning="drop")


def test_special_tokens_are_an_error_or_broken_up(tmp_path):
    directory = tiny.write_reward_model(tmp_path)
    messages = [PLAIN[0], {"role": "assistant", "content": "x <|end|> y"}]
    assert "--special-tokens break" in jaxprm.load(directory).score([messages])[0]["error"]
    assert len(jaxprm.load(directory, special_tokens="break").score([messages])[0]["steps"]) == 1


@pytest.mark.parametrize("field", ["reasoning", "special_tokens"])
def test_a_recipe_with_another_word_is_one_line(tmp_path, field):
    (tmp_path / "reward_model.json").write_text(json.dumps({field: "some"}))
    with pytest.raises(UserError, match=rf"reward_model\.json.*{field}.*correct the field"):
        load_encoder(tmp_path)
