"""Loading a model from a path, its encoder, and shapes for its turns."""

import json

import pytest

from data_pipeline.errors import DataError
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import MAX_TURN_WIDTH, Shapes, TurnTokens
from jaxprm.scoring import loading
from tests.model import tiny


@pytest.fixture
def run(tmp_path):
    """A work directory with two reward models, one of them with two seeds."""
    for name in ("agentprm/seed-0", "agentprm/seed-1", "orm/seed-0"):
        folder = tmp_path / "reward_models" / name / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("path", ["reward_models/orm", "reward_models/orm/seed-0", "reward_models/orm/seed-0/model"])
def test_the_only_model_at_or_below_a_path_is_found(run, path):
    assert find_model(run / path) == run / "reward_models/orm/seed-0/model"


@pytest.mark.parametrize(("path", "count"), [("", 3), ("reward_models", 3), ("reward_models/agentprm", 2)])
def test_several_models_are_listed(run, path, count):
    with pytest.raises(UserError, match=f"holds {count} reward models") as caught:
        find_model(run / path)
    assert str(run / "reward_models/agentprm/seed-1/model") in str(caught.value)


def test_no_model_is_said_in_words(run):
    (run / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model\.safetensors there"):
        find_model(run / "empty")
    with pytest.raises(UserError, match="no such directory"):
        find_model(run / "nowhere")


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    directory = tiny.write_reward_model(tmp_path, fingerprints={"tokenizer": "0123456789abcdef"})
    with pytest.raises(UserError, match="trained with tokenizer 0123456789ab"):
        loading.load_scorer(directory)
    tiny.write_reward_model(tmp_path, fingerprints={"tokenizer": tiny.encoder().fingerprint})
    assert loading.load_scorer(directory).config == tiny.CONFIG
    (directory / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        loading.load_scorer(directory)


def test_a_model_may_have_no_recipe(tmp_path):
    assert read_recipe(tmp_path) == {}
    (tmp_path / "reward_model.json").write_text(json.dumps({"label": "pvm"}))
    assert read_recipe(tmp_path) == {"label": "pvm"}
    (tmp_path / "reward_model.json").write_text("{")
    with pytest.raises(UserError, match=r"reward_model\.json: "):
        read_recipe(tmp_path)


def test_turns_as_long_as_those_of_the_training_data_are_encoded_once(tmp_path):
    turns = {"action": {"median": 150, "most": 300}, "observation": {"median": 9, "most": 400}}
    directory = tiny.write_reward_model(tmp_path, turn_tokens=turns)
    scorer = loading.load_scorer(directory, rows=1, max_tokens=1000)
    assert scorer.engine.shapes == Shapes(growth=(16, 128, 512), packed=(128, 256, 512, 1024), ring_width=512)
    encoder, state = scorer.encoder, tiny.conversation(1)[:1]
    long = [f"Action: get {number} stick" + " and then the lantern" * 25 for number in (1, 2)]
    lengths = [
        len(encoder.trajectory([*state, {"role": "assistant", "content": text}], row="").tokens) for text in long
    ]
    assert all(256 < length - len(encoder.prompt(state)) <= 512 for length in lengths)

    def after_state(texts):
        return [[*state, {"role": "assistant", "content": text}] for text in texts]

    promises = scorer.score_actions([state], [long])[0]
    tiny.assert_close(promises, [steps[-1] for steps in scorer.score(after_state(long))])
    before = scorer.usage["encoded"]
    kept = len(encoder.trajectory(after_state(long)[1], row="").tokens)
    state = [*after_state(long)[1], {"role": "user", "content": "Got 2 stick"}]
    scorer.score_actions([state], [["Action: get 1 stick"]])
    (last,) = after_state(["Action: get 1 stick"])
    assert scorer.usage["encoded"] - before == len(encoder.trajectory(last, row="").tokens) - kept


@pytest.mark.parametrize(
    "broken", [[], 3, {"action": {"median": 1, "most": 2}}, {"action": {"median": -1, "most": 2}, "observation": {}}]
)
def test_malformed_turn_lengths_are_refused(tmp_path, broken):
    (tmp_path / "reward_model.json").write_text(json.dumps({"turn_tokens": broken}))
    with pytest.raises(UserError, match=r"reward_model\.json: turn_tokens.* = .*: .*(expected|missing)"):
        loading.read_turn_tokens(tmp_path)


def test_shapes_grow_with_the_turns_but_not_beyond_bounds():
    plain = Shapes()
    assert plain.for_turns(TurnTokens(0, 0), TurnTokens(0, 0)) == plain
    assert plain.for_turns(TurnTokens(64, 256), TurnTokens(256, 256)) == plain
    longer = plain.for_turns(TurnTokens(65, 65), TurnTokens(1, 257))
    assert longer == plain._replace(growth=(16, 128, 512), packed=(64, 128, 256, 512))
    longest = plain.for_turns(*[TurnTokens(10**9, 10**9)] * 2)
    assert longest[:3] == ((64, 512, MAX_TURN_WIDTH), (256, 512, 1024, MAX_TURN_WIDTH), MAX_TURN_WIDTH)
