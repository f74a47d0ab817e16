"""Reward models judged on preference pairs: accuracies and ranks by hand, and the verb on a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.toy import make_toy
from data_pipeline.preferences import parse_preference, read_rows
from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.evaluation import pairs
from jaxprm.evaluation.pairs import State, evaluate_pairs, merged_states, pairs_table, report_of
from jaxprm.evaluation.statistics import Resampling
from jaxprm.hf import writer
from jaxprm.scoring.sources import Source
from jaxprm.training.reward_model import from_policy

FEW = Resampling(samples=50)


def state(task: str, *promises: list[float], group: str | None = None) -> State:
    return State(task, group, tuple(map(np.array, promises)))


def test_pairwise_accuracy_and_mrr_by_hand():
    """Model a: chosen first, second of three with a tie, last. Model b: always first."""
    first = [3.0, 1.0, 2.0]
    states = [
        state("x", [0.5, 0.1], [1.0, 0.0], group="web"),
        state("x", [0.5, 0.9, 0.5], first, group="web"),
        state("y", [0.1, 0.4, 0.3], first),
    ]
    report = report_of(states, ["a", "b"], FEW)
    a = report["pairs"]["models"]["a"]
    assert a["pairwise_accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5 + 0 + 0) / 5)
    assert a["mrr"]["mean"] == pytest.approx((1 + 1 / 2.5 + 1 / 3) / 3)
    assert {r["mean"] for r in report["pairs"]["models"]["b"].values()} == {1.0}
    assert report["counts"] == {"states": 3, "pairs": 5, "tasks": 2}
    # Of two actions the chosen one is first or second, of three first, second or third.
    assert report["pairs"]["random"]["mrr"] == pytest.approx((3 / 4 + 2 * (11 / 18)) / 3)
    assert report["groups"]["web"]["counts"]["pairs"] == 3
    assert report["groups"]["web"]["pairs"]["models"]["a"]["pairwise_accuracy"]["mean"] == pytest.approx(1.5 / 3)
    difference = {pair["metric"]: pair["mean"] for pair in report["paired"]}
    assert difference == {"pairwise_accuracy": pytest.approx(-0.7), "mrr": pytest.approx((1.7333333 - 3) / 3)}


def line(id: str, chosen: str, *rejected: str, task: str = "t") -> str:
    action = lambda text: {"role": "assistant", "content": text}
    messages = [{"role": "user", "content": "start at 3, reach 6"}]
    row = {"id": id, "task": task, "messages": messages, "chosen": action(chosen)}
    return json.dumps(row | {"rejected": list(map(action, rejected))})


def test_lines_of_one_state_and_chosen_action_are_one_state():
    rows = [parse_preference(line(str(n), "go to 4", f"go to {n}"), where="x") for n in (1, 2)]
    other = parse_preference(line("3", "go to 5", "go to 2"), where="x")
    values = [np.array([0.5, 0.1]), np.array([0.5, 0.7]), np.array([0.2, 0.4])]
    states = merged_states([(row, [value], None) for row, value in zip([*rows, other], values, strict=True)])
    assert [s.promises[0].tolist() for s in states] == [[0.5, 0.1, 0.7], [0.2, 0.4]]


class Encoder:
    def trajectory(self, messages, *, row, tools):
        return SimpleNamespace(tokens=[0], text=messages[-1].content)


class Scorer:
    """Promises "go to N" the value N."""

    encoder = Encoder()

    def __init__(self, **options):
        assert options == {"reasoning": None, "special_tokens": None}

    def score_encoded(self, encoded, owners):
        return [np.array([float(conversation.text.split()[-1])]) for conversation in encoded]


def source(name: str = "fake", load=Scorer) -> Source:
    return Source(name=name, identity={"of": name}, load=load, table=lambda messages, values: {})


def write(path, *lines: str):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_every_model_scores_every_line_of_a_file(tmp_path):
    file = write(tmp_path / "pairs.jsonl", line("1", "go to 4", "go to 2"), "{", line("2", "go to 3", "go to 5"))
    report = evaluate_pairs([source("a"), source("b")], file, FEW)
    assert report["counts"] == {"states": 2, "pairs": 2, "tasks": 1}
    assert report["pairs"]["models"]["a"]["pairwise_accuracy"]["mean"] == 0.5
    assert report["input"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (report["input"]["lines"], report["input"]["errors"]) == (3, 1)
    assert [model["name"] for model in report["models"]] == ["a", "b"]


def test_a_report_has_the_digest_of_a_models_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    file = write(tmp_path / "pairs.jsonl", line("1", "go to 4", "go to 2"))
    report = evaluate_pairs([dataclasses.replace(source(), directory=tmp_path)], file, FEW)
    assert report["models"] == [{"name": "fake", "sha256": hashlib.sha256(b"weights").hexdigest()}]


def test_a_file_that_changes_and_a_group_that_no_line_has_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    file = write(tmp_path / "pairs.jsonl", line("1", "go to 4", "go to 2"))
    never = source(load=lambda **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"group meta\.site: no line has it"):
        evaluate_pairs([never], file, FEW, group="meta.site")

    def growing(path, **options):
        write(path, line("1", "go to 4", "go to 2"), line("2", "go to 4", "go to 1"))
        return read_rows(path, **options)

    monkeypatch.setattr(pairs, "read_rows", growing)
    with pytest.raises(UserError, match="changed while it was read"):
        evaluate_pairs([never], file, FEW)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--policy", "p", "--reference", "r"], "--policy and --reference"),
        (["--labels", "meta.label", "--threshold", "0.5"], "--labels, --threshold"),
        (["--label-kind", "soft", "--validation-share", "0.2"], "--label-kind, --validation-share"),
    ],
)
def test_options_that_a_file_of_pairs_has_no_use_for_are_refused(tmp_path, capsys, options, named):
    file = write(tmp_path / "pairs.jsonl", line("1", "go to 4", "go to 2"))
    assert cli.main(["evaluate", "--model", "m", "--input", str(file), *options]) == 2
    assert f"{named} with {file}, a file of pairs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_verb_judges_a_file_of_pairs(tmp_path, capsys):
    toy = make_toy(tmp_path / "toy")
    config, parameters = from_policy(toy.base, 0)
    model = tmp_path / "model"
    model.mkdir()
    writer.write_model(model, config, parameters, pad_id=0, end_id=1, max_length=128)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((toy.base / name).read_bytes())
    file = tmp_path / "pairs.jsonl"
    lines = [line("1", "go to 4", "go to 2"), line("2", "go to 4", "go to 1", "go to 5", task="u"), "{"]
    file.write_text("\n".join(lines) + "\n")
    report_file = tmp_path / "report.json"
    arguments = ["evaluate", "--model", str(model), "--input", str(file), "--json", str(report_file)]
    assert cli.main([*arguments, "--samples", "20"]) == 1  # a line could not be used
    report, printed = json.loads(report_file.read_text()), capsys.readouterr().out
    assert report["counts"] == {"states": 2, "pairs": 3, "tasks": 2} and report["input"]["errors"] == 1
    assert f"{file}: 3 pairs in 2 states of 2 tasks" in printed and "random order" in printed
    # The promises are those of the whole conversations.
    import jaxprm

    scores = jaxprm.load(model).score_actions(
        [{"role": "user", "content": "start at 3, reach 6"}], ["go to 4", "go to 2", "go to 1", "go to 5"]
    )
    chosen, *rejected = [score.promise for score in scores]
    accuracy = np.mean([chosen > value for value in rejected])
    assert report["pairs"]["models"][str(model)]["pairwise_accuracy"]["mean"] == pytest.approx(accuracy)
    file.write_text('{"chosen": 1}\n{"chosen": 2}\n')
    with pytest.raises(UserError, match="none of its 2 lines could be scored"):
        evaluate_pairs([model], file, FEW)
    assert pairs_table(report).count("\n") >= 4
