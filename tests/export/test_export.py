"""An export has the scores of its model, is complete or absent, and replaces nothing but an earlier export."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import jaxprm
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from jaxprm.errors import UserError
from jaxprm.export import export as export_module
from jaxprm.export import model_card
from jaxprm.export import tokenizer as export_tokenizer
from jaxprm.export import verify as export_verify
from jaxprm.export.export import MARKER, export
from jaxprm.hf import writer
from tests.data_pipeline.conftest import make_tokenizer
from tests.model import tiny

STATE = tiny.reward_model()
RECIPE = {
    "label": "agentprm",
    "trained_on": {"trajectories": 1234, "tokens": 56789},
    "validation": {"loss": 0.0625, "auroc": 0.75, "by_depth": {"1": 0.5}, "note": "text"},
    "seed": 3,
    "max_tokens": 1024,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_reward_model(tmp_path_factory.mktemp("model"), STATE, **RECIPE)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Six conversations, one with two steps in a message, and an episode that failed before its first action."""
    path = tmp_path_factory.mktemp("data") / "trajectories.jsonl"
    conversations = [tiny.conversation(seed, turns=turns) for seed, turns in enumerate((1, 2, 7, 3, 10, 5))]
    conversations[1][1]["content"] = [{"type": "text", "text": "I look.\n"}, {"type": "text", "text": "get 1 stick"}]
    lines = [json.dumps({"id": str(index), "messages": messages}) for index, messages in enumerate(conversations)]
    lines.append(json.dumps({"id": "failed", "messages": tiny.conversation(0)[:1], "ended": "error"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def exported(model, trajectories, tmp_path_factory):
    """(directory, result of export), verified by transformers on the trajectories."""
    output = tmp_path_factory.mktemp("hub") / "agentprm"
    return output, export(model, output, verify=True, trajectories=trajectories)


def names(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_transformers_gives_our_score_at_every_read_position(exported):
    output, result = exported
    assert result["trajectories"] == 6
    assert result["read_positions"] == 1 + 3 + 7 + 3 + 10 + 5
    assert 0 < result["largest_difference"] <= result["bound"] == pytest.approx(1e-4 * max(1, result["rms"]))
    assert result["largest_difference"] < 1e-5
    assert result["rms"] > 0.3
    assert names(output) == {*result["files"], MARKER}
    assert names(output.parent) == {"agentprm"}


def test_the_config_has_what_consumers_need(exported):
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert (config["num_labels"], config["problem_type"], config["id2label"]) == (1, "regression", {"0": "value"})
    encoder = tiny.encoder()
    assert config["pad_token_id"] == encoder.pad_id
    read = encoder.trajectory(tiny.conversation(0), row="").tokens[-1]
    assert config["pad_token_id"] not in (config["eos_token_id"], read)


def test_the_code_of_the_model_card_runs_and_gives_our_scores(exported):
    output, _ = exported
    blocks = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=output,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(jaxprm.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, steps, actions = done.stdout.strip().splitlines()
    theirs = [ast.literal_eval(line) for line in (first, second)]
    ours = ast.literal_eval(steps)
    assert [step["message"] for step in theirs] == [step["message"] for step in ours] == [1, 3]
    tiny.assert_close([step["promise"] for step in ours], [step["promise"] for step in theirs])
    assert theirs[0]["progress"] is ours[0]["progress"] is None
    assert ours[1]["progress"] == pytest.approx(theirs[1]["progress"], abs=2e-5)
    # The first candidate is the action that was taken.
    assert float(re.search(r"promise=([-\d.e]+)", actions)[1]) == pytest.approx(ours[1]["promise"], abs=1e-5)


def test_the_model_card_states_facts_and_checks(exported):
    output, result = exported
    card = (output / "README.md").read_text()
    for words in (
        "pipeline_tag: text-classification",
        "base_model: policies/tiny",
        "AgentPRM (arXiv 2511.08325)",
        "1,234 trajectories",
        "[0, 1]",
        "gae_lambda 0.95",
        "Read position: last token",
        "Seed: 3",
        f"all {result['read_positions']} read positions of 6 conversations",
        f"{result['largest_difference']:.1e}",
        "were not run",
        "| auroc | 0.75 |",
        "| by_depth 1 | 0.5 |",
        "head_dim is not hidden_size / heads",
    ):
        assert words in card
    assert "note" not in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_format", "dtype"), [("sequence", "bfloat16"), ("token", "float32"), ("token", "bfloat16")]
)
def test_every_format_and_precision_is_verified_and_a_wrong_tensor_is_detected(
    model, trajectories, tmp_path, monkeypatch, head_format, dtype
):
    options = {
        "head_format": head_format,
        "dtype": dtype,
        "max_shard_size": "20KB",
        "verify": True,
        "trajectories": trajectories,
    }
    result = export(model, tmp_path / "out", **options)
    assert result["read_positions"] == 1 + 3 + 7 + 3 + 10 + 5 and result["largest_difference"] < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    if dtype == "float32":
        assert "rounding" not in result and "against the model as it was trained" in card
    else:
        # Eight bits of mantissa: far above the bound of the comparison, far below the spread of the scores.
        assert result["bound"] < result["rounding"] < 0.1
        assert f"moved scores by up to {result['rounding']:.1e}" in card
    original = writer.tensors_of

    def swapped(config, state):
        """The keys of layer 0 are written with the values of layer 1; the model in memory is unchanged."""
        tensors = {tensor.name: tensor for tensor in original(config, state)}
        first, second = (f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1))
        return list((tensors | {first: tensors[second]._replace(name=first)}).values())

    monkeypatch.setattr(writer, "tensors_of", swapped)
    reason = "scores differ by" if dtype == "float32" else r"transformer\.blocks\.key differs from the model's own,"
    with pytest.raises(UserError, match=f"{reason} .*nothing was exported"):
        export(model, tmp_path / "wrong", **options)
    assert names(tmp_path) == {"out"}


@pytest.mark.slow
def test_a_missing_tensor_is_an_error(plain):
    tensors = load_file(plain / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot read the export: .*score\.weight"):
        export_verify.score_with_transformers(plain, [])


def test_the_results_of_the_run_are_on_the_card(tmp_path):
    work = tmp_path / "runs" / "demo"
    directory = tiny.write_reward_model(work / "reward_models" / "agentprm" / "seed-1" / "model", STATE, **RECIPE)
    estimate = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 48}
    methods = {"beam": {"4x4": estimate(0.458)}, "stepwise": {"4": estimate(0.333)}, "best_of_n": {"16": estimate(0.5)}}
    results = {
        "name": "textcraft-tiny",
        "policy": {"sampled": estimate(0.336), "greedy": estimate(0.25)},
        "methods": {"agentprm": methods, "orm": methods, "random": {"beam": {"4x4": estimate(0.208)}}},
        "provenance": {"seeds": [0, 1]},
    }
    (work / "results.json").write_text(json.dumps(results))
    export(directory, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "run `textcraft-tiny`",
        "seeds [0, 1]",
        "| the policy alone, one sample | 33.6 [23.6, 43.6] | 48 |",
        "| beam 4x4, guided by agentprm | 45.8 [35.8",
        "| best of 4 at every step, guided by agentprm | 33.3",
        "| best of 16, guided by agentprm | 50.0",
        "| beam 4x4, random scores | 20.8 [10.8, 30.8] | 48 |",
    ):
        assert row in card
    assert "guided by orm" not in card
    # The table is exported again with the export.
    export(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card


def test_jaxprm_loads_an_export(exported, model):
    conversation = [tiny.conversation(4, turns=5)]
    ours, theirs = (jaxprm.load(directory).score(conversation) for directory in (model, exported[0]))
    assert ours == theirs


@pytest.fixture
def plain(model, tmp_path):
    """An export without verification."""
    export(model, tmp_path / "out")
    return tmp_path / "out"


def test_the_card_of_an_unverified_export_says_so(plain):
    assert "Nothing: exported without `--verify`" in (plain / "README.md").read_text()


def test_an_earlier_export_is_replaced_without_leftovers(plain, tmp_path):
    other = tiny.write_reward_model(tmp_path / "other", tiny.reward_model(seed=1))
    before = (plain / "model.safetensors").read_bytes()
    export(other, plain)
    assert (plain / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes() != before
    assert names(tmp_path) == {"out", "other"}


def test_a_directory_with_other_files_is_refused_and_not_touched(model, plain, tmp_path):
    (plain / ".git").mkdir()
    before = names(plain)
    with pytest.raises(UserError, match=r"holds \.git, which export did not write"):
        export(model, plain)
    assert names(plain) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and was not made by export"):
        export(model, foreign)
    assert names(foreign) == {"thesis.tex"}
    with pytest.raises(UserError, match="is a file"):
        export(model, foreign / "thesis.tex")
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "mine").touch()
    with pytest.raises(UserError, match="no interrupted command left it"):
        export(model, tmp_path / "new")


def test_an_empty_directory_is_filled(model, tmp_path):
    (tmp_path / "out").mkdir()
    result = export(model, tmp_path / "out")
    assert names(tmp_path / "out") == {*result["files"], MARKER}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_export_keeps_the_earlier_one(model, plain, tmp_path, monkeypatch, error):
    before = {path.name: path.read_bytes() for path in plain.iterdir()}

    def fail(*_):
        raise error

    monkeypatch.setattr(export_module, "model_card", fail)
    for output in (plain, tmp_path / "new"):
        with pytest.raises(type(error)):
            export(model, output)
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before
    assert names(tmp_path) == {"out"}


def test_leftovers_of_a_killed_export_are_removed(model, plain, tmp_path):
    """Killed while writing, and killed between the two renames."""
    for name in (".out.partial", ".out.old"):
        leftover = tmp_path / name
        leftover.mkdir()
        (leftover / (MARKER + ".tmp")).touch()
        (leftover / "model.safetensors").write_bytes(b"half")
    export(model, plain)
    assert names(tmp_path) == {"out"}
    plain.rename(tmp_path / ".out.old")
    export(model, plain)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("broken", ["value", "nan"])
def test_scores_that_differ_are_an_error_and_nothing_is_exported(model, trajectories, tmp_path, monkeypatch, broken):
    def wrong(_, cases):
        values = [tiny.values(STATE, np.array([case["tokens"]]))[0, case["read_positions"]].tolist() for case in cases]
        values[2][4] = np.nan if broken == "nan" else values[2][4] + 2e-4
        return {"values": values, "transformers": "5", "torch": "2"}

    monkeypatch.setattr(export_verify, "score_with_transformers", wrong)
    with pytest.raises(UserError, match=r"scores differ by .* in .*trajectories.jsonl:3, bound 1.00e-04"):
        export(model, tmp_path / "out", verify=True, trajectories=trajectories)
    assert names(tmp_path) == set()


def test_the_error_of_transformers_is_passed_on_in_one_line(plain):
    (plain / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"transformers cannot read the export: .") as caught:
        export_verify.score_with_transformers(plain, [])
    assert "\n" not in str(caught.value)


def test_without_torch_the_message_says_how_to_install_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install torch=="):
        export(model, tmp_path / "out", verify=True)
    assert names(tmp_path) == set()
    export(model, tmp_path / "out")


def test_the_message_names_trajectories_that_cannot_be_read(model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "x"}\n')
    for path, words in ((bad, r"bad\.jsonl:1"), (tmp_path / "missing.jsonl", r"missing\.jsonl: cannot be read")):
        with pytest.raises(DataError, match=words):
            export(model, tmp_path / "out", verify=True, trajectories=path)
    bad.write_text("")
    with pytest.raises(UserError, match="no trajectory to verify on"):
        export(model, tmp_path / "out", verify=True, trajectories=bad)
    with pytest.raises(UserError, match="add --verify"):
        export(model, tmp_path / "out", trajectories=bad)
    assert names(tmp_path) == {"bad.jsonl"}


def test_tools_are_verified_as_the_encoder_gives_them_to_the_template(tmp_path):
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = make_tokenizer(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")
    tool = {"name": "look", "description": "ends in <|im_end|>", "input_schema": {"type": "object"}}
    row = {"id": "a", "messages": tiny.conversation(0, turns=1), "tools": [tool]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    encoder = Encoder(tokenizer, special_tokens="break")
    (question,) = export_verify._cases(encoder, tmp_path / "in.jsonl").questions
    text = tokenizer.apply_chat_template(question["messages"], tools=question["tools"], tokenize=False)
    assert "input_schema" not in text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == question["tokens"]


def test_a_pad_token_that_ends_messages_is_replaced(tmp_path):
    directory = tiny.write_reward_model(tmp_path / "model", STATE)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|end|>"}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|end|>", "eos_token": "<|end|>"}))
    export(directory, tmp_path / "out")
    names = ("config.json", path.name, "special_tokens_map.json")
    config, tokenizer, special = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    assert (config["pad_token_id"], tokenizer["pad_token"]) == (tiny.encoder().pad_id, "<|pad|>")
    assert special == {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.pad_token_id != theirs.eos_token_id


def test_a_model_whose_special_tokens_all_end_messages_is_refused(tmp_path):
    directory = tiny.write_reward_model(tmp_path / "model", STATE)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|end|>"}))
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text("{% if false %}<|pad|>{% endif %}" + template)
    with pytest.raises(UserError, match=r"pad_token is '<\|end\|>', which also ends a message"):
        export(directory, tmp_path / "out")
    assert names(tmp_path) == {"model"}


TEXT = "get 1 stick, 12 in all"


def test_a_tokenizer_that_transformers_would_rebuild_declares_the_plain_class(model, plain):
    """It keeps the space before a number in the word; by Qwen2's rules AutoTokenizer would split it off."""
    ours = tiny.encoder().prompt([{"role": "user", "content": TEXT}])[:-1]
    assert AutoTokenizer.from_pretrained(model)(f"<|user|>{TEXT}<|end|>")["input_ids"] != ours
    assert AutoTokenizer.from_pretrained(plain)(f"<|user|>{TEXT}<|end|>")["input_ids"] == ours
    assert "without `trust_remote_code`" in (plain / "README.md").read_text()


def test_a_tokenizer_with_the_rules_of_its_family_needs_no_declaration(tmp_path):
    directory = tiny.write_reward_model(tmp_path / "model", STATE)
    path = directory / "tokenizer.json"
    settings = json.loads(path.read_text())
    words = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    byte_level = settings["pre_tokenizer"] | {"use_regex": False}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, byte_level]}
    path.write_text(json.dumps(settings))
    export(directory, tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()
    ours = Encoder.load(directory).prompt([{"role": "user", "content": TEXT}])[:-1]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(f"<|user|>{TEXT}<|end|>")["input_ids"] == ours


def test_a_tokenizer_that_transformers_cannot_reproduce_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_tokenizer, "_PLAIN_CLASS", {})
    with pytest.raises(UserError, match="AutoTokenizer does not give the tokens it was trained on"):
        export(model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_the_card_of_a_model_of_pairs_promises_no_outcome():
    sizes = dict.fromkeys(("head_dim", "num_attention_heads", "hidden_size", "max_position_embeddings"), 1)
    sizes |= {"pad_token_id": 0, "dtype": "float32", "architectures": ["Qwen2ForSequenceClassification"]}
    card = lambda objective: model_card.model_card({"objective": objective}, sizes, {}, None)
    assert "the outcome to expect" in card("agentprm")
    assert "the outcome to expect" not in card("preference") and "the better of two actions" in card("preference")


@pytest.mark.parametrize(
    ("base", "shown"),
    [("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("/home/someone/policies/mine", "mine"), (None, "unknown")],
)
def test_the_base_model_is_named_without_local_paths(base, shown):
    assert export_module.base_name({"base": base}) == shown
    sizes = {
        "head_dim": 1,
        "num_attention_heads": 1,
        "hidden_size": 1,
        "max_position_embeddings": 8,
        "pad_token_id": 0,
        "dtype": "float32",
        "architectures": ["Qwen2ForSequenceClassification"],
    }
    card = model_card.model_card({"base": shown}, sizes, {}, None)
    assert f"Base model: {shown}" in card
    assert ("base_model:" in card) == ("/" in shown)
    assert "Data: not recorded" in card and "targets: not recorded" in card and "Trained on up to" not in card
