"""The log-ratio of a policy and its reference, against torch's cross-entropy of the same models."""

import json

import numpy as np
import pytest
import torch
import transformers

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.evaluation.evaluate import Settings, evaluate
from jaxprm.evaluation.statistics import Resampling
from jaxprm.hf import writer
from jaxprm.scoring import log_ratio, sources
from jaxprm.scoring.engine import LENGTH_BUCKETS
from jaxprm.scoring.log_ratio import LOGITS_AT_ONCE, load_log_ratio
from tests.model import tiny

# The last one is in a row of 384 tokens, the others in rows of 256.
CONVERSATIONS = [tiny.conversation(seed, turns=turns) for seed, turns in enumerate((3, 3, 3, 12))]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A policy and its reference with other weights; one has an unembedding of its own, and no chat template."""
    folder = tmp_path_factory.mktemp("models")
    policy = tiny.write_policy(folder / "policy")
    reference = tiny.write_policy(folder / "reference")
    ids = {"pad_id": tiny.encoder().pad_id, "end_id": tiny.encoder().end_id, "max_length": 1024}
    writer.write_model(reference, tiny.UNTIED, tiny.transformer(tiny.UNTIED, seed=5), **ids)
    (reference / "chat_template.jinja").unlink(missing_ok=True)
    return policy, reference


@pytest.fixture(scope="module")
def scorer(directories):
    return load_log_ratio(*directories)


def torchs(directories, messages) -> list[float]:
    """Log-ratio of each action: the text of the action and its end token, after the text before it."""
    encoder, ratios = tiny.encoder(), []
    models = [transformers.AutoModelForCausalLM.from_pretrained(path).double().eval() for path in directories]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encoder.prompt(messages[:index])
        action = [*encoder.rendered(message["content"]), encoder.end_id]
        tokens = torch.tensor([[*prompt, *action]])
        sums = []
        for model in models:
            with torch.no_grad():
                logits = model(tokens).logits[0, len(prompt) - 1 : -1]
            sums.append(-torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :], reduction="sum").item())
        ratios.append(sums[0] - sums[1])
    return ratios


def test_log_ratios_are_those_of_torch(scorer, directories):
    encoded = [tiny.encoder().trajectory(messages, row="") for messages in CONVERSATIONS]
    ours = scorer.log_ratios(encoded, ["a", "b", "c", "d"])
    for ratios, messages in zip(ours, CONVERSATIONS, strict=True):
        expected = torchs(directories, messages)
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(ratios, expected, rtol=1e-4, atol=1e-3)
    sums = scorer.score_encoded(encoded, ["a", "b", "c", "d"])
    np.testing.assert_allclose(sums[0], np.cumsum(ours[0]))


def test_a_candidate_scores_as_the_last_step_of_its_conversation(scorer):
    messages = CONVERSATIONS[0]
    states, actions = [messages[:3], messages[:1]], [["get 1 stick", "a <|end|> b", "get 1 stick"], ["craft torch"]]
    first, second = scorer.score_actions(states, actions)
    for value, state, action in ((first[0], states[0], actions[0][0]), (second[0], states[1], actions[1][0])):
        full = tiny.encoder().trajectory([*state, {"role": "assistant", "content": action}], row="")
        assert value == pytest.approx(scorer.score_encoded([full], [""])[0][-1], abs=1e-4)
    assert first[1] == -np.inf and first[2] == first[0]
    assert "special token" in scorer.refusal(states[0], actions[0][1])
    assert scorer.refusal(states[0], actions[0][0]) is None
    before = scorer.usage["encoded"]
    assert np.array_equal(scorer.score_actions(states, actions)[0], first) and scorer.usage["encoded"] == before
    scorer.forget()
    scorer.score_actions(states, actions)
    assert scorer.usage["encoded"] > before


def test_every_length_of_a_row_is_cut_into_whole_chunks():
    lengths = [len(tiny.encoder().trajectory(messages, row="").tokens) for messages in CONVERSATIONS]
    assert max(lengths[:3]) <= LENGTH_BUCKETS[0] < lengths[3] <= LENGTH_BUCKETS[1]
    assert not any(width % LOGITS_AT_ONCE for width in LENGTH_BUCKETS)


def test_equal_models_give_zero(directories):
    same = load_log_ratio(directories[0], directories[0])
    (values,) = same.score_actions([CONVERSATIONS[0][:1]], [["get 1 stick"]])
    assert values.tolist() == [0.0]


def test_tokenizers_that_differ_are_refused(directories, tmp_path):
    other = tmp_path / "other"
    tiny.write_policy(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"token 'a' is \d+ there and \d+ here \(2 differ\)"):
        load_log_ratio(directories[0], other)


@pytest.fixture
def input(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [
        {"id": f"{task}/{n}", "task": task, "outcome": n % 2, "step_labels": [1, 0, 1], "messages": messages}
        for task in ("a", "b", "c")
        for n, messages in enumerate(CONVERSATIONS[:3])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_score_writes_the_log_ratio_of_every_step_and_their_sum(directories, scorer, input, tmp_path, monkeypatch):
    monkeypatch.setattr(log_ratio, "load_log_ratio", lambda *_, **__: scorer)
    policy, reference = map(str, directories)
    output = tmp_path / "out.jsonl"
    arguments = ["--policy", policy, "--reference", reference, "--input", str(input), "--output", str(output)]
    assert cli.main(["score", *arguments]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    encoded = tiny.encoder().trajectory(CONVERSATIONS[0], row="")
    ratios = scorer.log_ratios([encoded], [""])[0]
    assert [step["message"] for step in lines[0]["steps"]] == [1, 3, 5]
    np.testing.assert_allclose([step["log_ratio"] for step in lines[0]["steps"]], ratios, rtol=1e-4, atol=1e-4)
    assert lines[0]["score"] == pytest.approx(ratios.sum(), abs=1e-3)


def test_evaluate_ranks_with_log_ratios_and_calls_nothing_calibrated(directories, scorer, input, monkeypatch):
    monkeypatch.setattr(log_ratio, "load_log_ratio", lambda *_, **__: scorer)
    source = sources.progress_advantage(*directories)
    report = evaluate([source], input, Settings(resampling=Resampling(samples=50)))
    numbers = report["outcomes"]["models"][source.name]
    assert numbers["summary"].keys() == {"auroc", "auroc_within_task"} and numbers["calibration"] == []
    criteria = report["step_labels"]["models"][source.name]
    assert criteria.keys() == {"promise", "progress"}
    # The progress of a step is its log-ratio; that of the first step too, unlike that of a reward model.
    encoded = [tiny.encoder().trajectory(messages, row="") for messages in CONVERSATIONS[:3]]
    lowest = [int(np.argmin(ratios)) for ratios in scorer.log_ratios(encoded, ["", "", ""])]
    expected = np.mean([index == 1 for index in lowest])
    assert criteria["progress"]["metrics"]["argmin_accuracy"]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize("verb", ["score", "evaluate"])
@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (["--policy", "a"], "--reference is missing"),
        (["--reference", "a"], "--policy is missing"),
        ([], "give --model, or --policy and --reference"),
        (["--policy", "missing/", "--reference", "default"], "missing"),
    ],
)
def test_half_a_pair_and_missing_models_are_one_line(verb, pair, words, input, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")] if verb == "score" else []
    assert cli.main([verb, *pair, "--input", str(input), *output]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
