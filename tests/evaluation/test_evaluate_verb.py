"""The `evaluate` verb from a file to its table and JSON, with a small random reward model."""

import hashlib
import itertools
import json
import random
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprm import cli
from jaxprm.evaluation import scored
from jaxprm.scoring import files as score_files
from jaxprm.scoring import loading
from jaxprm.scoring.files import score_file
from tests.model import tiny

CONVERSATIONS = [tiny.conversation(seed, turns=2 + seed % 3) for seed in range(4)]
TASKS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def promises(model, tmp_path_factory):
    """The promise of every step of CONVERSATIONS."""
    folder = tmp_path_factory.mktemp("scores")
    write(folder / "in.jsonl", [{"id": "a", "messages": messages} for messages in CONVERSATIONS])
    score_file(model, folder / "in.jsonl", folder / "out.jsonl")
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return [[step["promise"] for step in line["steps"]] for line in lines]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(make):
    """Trajectories with the same conversations in every task, so that both parts of a split have the same values."""
    return [
        {"id": f"{task}#{number}", "task": f"task/{task}", "messages": messages} | make(task, number)
        for task in range(TASKS)
        for number, messages in enumerate(CONVERSATIONS)
    ]


def planted_threshold(promises):
    """(below, above): the widest gap of values with a trajectory above it and a step below it."""
    values = sorted(value for trajectory in promises for value in trajectory)
    lowest = sorted(min(trajectory) for trajectory in promises)
    neighbours = [pair for pair in itertools.pairwise(values) if lowest[0] <= pair[0] < lowest[-1]]
    return max(neighbours, key=lambda pair: pair[1] - pair[0])


def run(capsys, *arguments):
    """(exit status, stdout, stderr)."""
    code = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report_of(capsys, tmp_path, model, rows, *arguments, code=0):
    input, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.json"
    status, out, err = run(capsys, "--model", model, "--input", input, "--json", output, "--samples", 100, *arguments)
    assert status == code, err
    refuse_constant = lambda name: pytest.fail(f"{name} in the JSON")
    return json.loads(output.read_text(), parse_constant=refuse_constant), out


def test_labels_planted_at_a_threshold_are_all_predicted(capsys, tmp_path, model, promises):
    low, high = planted_threshold(promises)
    labels = lambda task, number: {"step_labels": [float(value > low) for value in promises[number]]}
    report, out = report_of(capsys, tmp_path, model, rows_of(labels))
    (criteria,) = report["step_labels"]["models"].values()
    promise = criteria["promise"]
    assert all(low < threshold <= high for threshold in promise["thresholds"].values())
    assert {name: estimate["mean"] for name, estimate in promise["metrics"].items()} == dict.fromkeys(
        promise["metrics"], 1.0
    )
    assert promise["metrics"]["f1"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": TASKS // 2}
    assert report["labels"]["kind"] == "binary" and report["outcomes"] is None
    assert f"{model}, promise" in out and "thresholds from 6 tasks, numbers from 6 others" in out


def test_random_labels_are_predicted_half_the_time(capsys, tmp_path, model, promises):
    draw = random.Random(0)
    labels = lambda task, number: {"step_labels": [draw.randint(0, 1) for _ in promises[number]]}
    report, _ = report_of(capsys, tmp_path, model, rows_of(labels))
    accuracy = next(iter(report["step_labels"]["models"].values()))["promise"]["metrics"]["balanced_accuracy"]
    assert accuracy["low"] <= 0.5 <= accuracy["high"] and 0.3 < accuracy["mean"] < 0.7


def test_a_first_wrong_step_in_meta_and_a_fixed_threshold(capsys, tmp_path, model, promises):
    low, high = planted_threshold(promises)

    def label(task, number):
        below = [index for index, value in enumerate(promises[number]) if value <= low]
        return {"meta": {"label": below[0] if below else -1}}

    report, out = report_of(
        capsys, tmp_path, model, rows_of(label), "--labels", "meta.label", "--threshold", (low + high) / 2
    )
    (criteria,) = report["step_labels"]["models"].values()
    assert set(criteria) == {"promise"} and criteria["promise"]["metrics"]["f1"]["mean"] == 1.0
    assert report["labels"]["kind"] == "first-error" and report["labels"]["parts"]["test"]["tasks"] == TASKS
    errors = sum(min(trajectory) <= low for trajectory in promises) * TASKS
    assert report["step_labels"]["baselines"]["constant"]["metrics"]["first_error_accuracy"]["mean"] == pytest.approx(
        1 - errors / (4 * TASKS)
    )
    assert "wrong is a promise below" in out


def test_outcomes_by_hand(capsys, tmp_path, model, promises):
    """The first two conversations of each task succeed: all numbers follow from the four rows of promises."""
    report, out = report_of(capsys, tmp_path, model, rows_of(lambda task, number: {"outcome": float(number < 2)}))
    numbers = next(iter(report["outcomes"]["models"].values()))
    values = np.array([value for trajectory in promises for value in trajectory])
    success = np.array([number < 2 for number, trajectory in enumerate(promises) for _ in trajectory])
    higher = (values[success][:, None] > values[~success][None]).mean()
    assert numbers["summary"]["auroc"]["mean"] == pytest.approx(higher)
    assert numbers["summary"]["mse"]["mean"] == pytest.approx(np.mean((values - success) ** 2), rel=1e-5)
    firsts = np.array([trajectory[0] for trajectory in promises])
    assert numbers["by_depth"][0]["auroc"]["mean"] == pytest.approx((firsts[:2][:, None] > firsts[2:]).mean())
    assert numbers["by_depth"][0]["success"]["mean"] == pytest.approx(firsts[:2].mean(), rel=1e-5)
    best = max(range(4), key=lambda number: promises[number][-1])
    assert numbers["best_of_n"][-1]["n"] == 4 and numbers["best_of_n"][-1]["final"]["mean"] == float(best < 2)
    assert report["outcomes"]["baselines"]["constant"]["auroc"]["mean"] == 0.5
    assert "Against outcomes" in out and "other attempts" in out


def test_bad_lines_are_counted_named_and_exit_1(capsys, tmp_path, model, promises):
    rows = rows_of(lambda task, number: {"outcome": float(number < 2), "meta": {"label": -1}})
    rows[3]["meta"]["label"] = 99
    rows[5]["ended"] = "error"
    rows[7]["meta"] = {}
    rows.insert(2, "{broken")
    report, out = report_of(capsys, tmp_path, model, rows, "--labels", "label", code=1)
    assert report["input"]["lines"] == 4 * TASKS + 1 and report["input"]["errors"] == 2
    first, second = report["input"]["examples"]
    assert first.startswith("in.jsonl:3: ") and second.startswith("in.jsonl:5: label = 99: ")
    counts = report["counts"]
    assert counts["trajectories"] == 4 * TASKS - 1 and counts["ended_in_error"] == 1
    assert counts["with_outcome"] == counts["with_labels"] == 4 * TASKS - 2
    assert "2 of 49 lines could not be used:" in out and "in.jsonl:5: label = 99" in out
    assert "1 ended in an error" in out


def test_two_models_and_a_group(capsys, tmp_path, model):
    other = tiny.write_reward_model(tmp_path / "other", tiny.reward_model(seed=1), targets={"discount": 0.9})
    rows = rows_of(lambda task, number: {"outcome": float(number < 2), "split": "ab"[task % 2]})
    report, out = report_of(capsys, tmp_path, model, rows, "--model", other, "--group", "split")
    assert [entry["name"] for entry in report["models"]] == [str(model), str(other)]
    paired = {row["metric"]: row for row in report["paired"]}
    summaries = [report["outcomes"]["models"][str(path)]["summary"] for path in (model, other)]
    assert paired["mse"]["mean"] == pytest.approx(summaries[0]["mse"]["mean"] - summaries[1]["mse"]["mean"])
    assert set(report["groups"]) == {"a", "b"} and report["groups"]["a"]["counts"]["tasks"] == TASKS // 2
    assert "Paired by task" in out and "== a: 24 trajectories of 6 tasks" in out


def test_a_chunk_is_scored_at_a_time(model, tmp_path, monkeypatch):
    rows = rows_of(lambda task, number: {"outcome": float(number < 2)})
    input, sizes, original = write(tmp_path / "in.jsonl", rows), [], score_files.score_lines

    def score_lines(scorer, rows):
        sizes.append(len(rows))
        return original(scorer, rows)

    unchunked = scored.score_models([model], input, labels="step_labels")
    monkeypatch.setattr(score_files, "score_lines", score_lines)
    chunked = scored.score_models([model], input, labels="step_labels", chunk=10)
    assert sizes == [10, 10, 10, 10, 8]
    for first, second in zip(unchunked.rows, chunked.rows, strict=True):
        assert first.task == second.task
        np.testing.assert_allclose(first.promises[0], second.promises[0], atol=1e-5)


def test_a_line_that_one_model_cannot_score_is_left_out_for_all(model, tmp_path, monkeypatch):
    input, calls = write(tmp_path / "in.jsonl", rows_of(lambda *_: {"outcome": 1.0})[:6]), []
    score_lines = score_files.score_lines

    def second_fails(scorer, rows):
        calls.append(len(rows))
        results = score_lines(scorer, rows)
        if len(calls) == 2:
            results[4] = score_files.ScoredLine(5, error="in.jsonl:5: too long")
        return results

    monkeypatch.setattr(score_files, "score_lines", second_fails)
    scored_file = scored.score_models([model, model], input, labels="step_labels")
    assert (scored_file.errors, scored_file.examples, len(scored_file.rows)) == (1, ["in.jsonl:5: too long"], 5)
    assert all(len(row.promises) == 2 for row in scored_file.rows)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--input", "nothing.jsonl"], ["nothing.jsonl", "no such file"]),
        (["--model", "none"], ["none", "no such directory"]),
        (["--json", "."], ["json .", "directory"]),
        (["--json", "in.jsonl"], ["json in.jsonl", "the input"]),
        (["--validation-share", "0"], ["validation share 0.0", "(0, 1)"]),
        (["--samples", "0"], ["samples 0"]),
        (["--labels", "meta.nothing"], ["labels meta.nothing", "no line has any"]),
    ],
)
def test_a_mistake_gives_a_message_of_one_line(capsys, tmp_path, monkeypatch, model, arguments, parts):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", rows_of(lambda task, number: {"outcome": 1.0})[:2])
    model_too = ["--model", model] if "--model" not in arguments else []
    input_too = ["--input", "in.jsonl"] if "--input" not in arguments else []
    code, _, err = run(capsys, *model_too, *input_too, *arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("jaxprm: ")]
    assert code == 2
    for part in parts:
        assert part in line, line


def test_the_same_model_twice_is_refused(capsys, tmp_path, model):
    input = write(tmp_path / "in.jsonl", rows_of(lambda task, number: {"outcome": 1.0})[:2])
    code, _, err = run(capsys, "--model", model, "--model", model, "--input", input)
    assert code == 2 and "is named twice" in err


def test_a_file_of_bad_lines_alone_is_an_error(capsys, tmp_path, model):
    code, _, err = run(capsys, "--model", model, "--input", write(tmp_path / "in.jsonl", ["{]", "not json"]))
    assert code == 2 and "none of its 2 rows could be scored; in.jsonl:1: " in err


def test_a_model_in_several_weight_files_is_named_by_all_of_them(capsys, tmp_path, model):
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    shutil.copytree(model, whole)
    shutil.copytree(model, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    placed = {tensor: names[position % 2] for position, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if placed[tensor] == name}, sharded / name)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    rows = rows_of(lambda task, number: {"outcome": float(number % 2)})
    hashes = []
    for directory in (whole, sharded):
        report, _ = report_of(capsys, tmp_path, directory, rows)
        hashes += [entry["sha256"] for entry in report["models"]]
    assert hashes[0] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert len(hashes[1]) == 64 and hashes[1] != hashes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "meta.labl"], "labels meta.labl: no line has any"),
        (["--label-kind", "ternary"], "labels step_labels: not ternary"),
        (["--group", "meta.domian"], "group meta.domian: no line has it"),
        (["--threshold", "nan"], "threshold nan: must be a finite number"),
        (["--validation-share", "1"], "validation share 1.0: must be in (0, 1)"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(capsys, tmp_path, model, monkeypatch, arguments, words):
    monkeypatch.setattr(loading, "load_scorer", lambda *_, **__: pytest.fail("loaded"))
    rows = rows_of(lambda task, number: {"outcome": 1, "step_labels": [0.5] * (2 + number % 3)})
    input = write(tmp_path / "in.jsonl", rows)
    status, _, err = run(capsys, "--model", model, "--input", input, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1


def test_labels_on_one_task_are_found_before_a_model_is_loaded(capsys, tmp_path, model, monkeypatch):
    monkeypatch.setattr(loading, "load_scorer", lambda *_, **__: pytest.fail("loaded"))
    rows = [row | {"task": "one"} for row in rows_of(lambda task, number: {"step_labels": [1] * (2 + number % 3)})]
    status, _, err = run(capsys, "--model", model, "--input", write(tmp_path / "in.jsonl", rows))
    assert status == 2 and "all on one task" in err


def test_rows_longer_than_the_training_are_counted(capsys, tmp_path):
    lengths = [len(tiny.encoder().trajectory(messages, row="").tokens) for messages in CONVERSATIONS]
    bound = sorted(lengths)[-3]
    model = tiny.write_reward_model(tmp_path / "model", max_tokens=bound)
    rows = rows_of(lambda task, number: {"outcome": number % 2})
    report, out = report_of(capsys, tmp_path, model, rows)
    (described,) = report["models"]
    longer = TASKS * sum(length > bound for length in lengths)
    assert (described["trained_length"], described["longer"], described["longest"]) == (bound, longer, max(lengths))
    assert f"{longer} trajectories are longer than all of its training ({bound} tokens)" in out
    arguments = ["--model", str(model), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "scores")]
    assert cli.main(["score", *arguments]) == 0
    assert f"{longer} of them are longer" in capsys.readouterr().out
    tokens = [json.loads(line).get("tokens") for line in (tmp_path / "scores").read_text().splitlines()]
    assert tokens == [length if length > bound else None for length in lengths] * TASKS


FORMS = {
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "BOM and blank lines": lambda rows: "\ufeff" + "".join(f"\n{json.dumps(row)}\r\n" for row in rows),
    "array": lambda rows: json.dumps(rows, indent=1),
    "as other tools write": lambda rows: "".join(
        json.dumps(row | {"id": n, "outcome": bool(row["outcome"]), "split": None}) + "\n" for n, row in enumerate(rows)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_validate_score_and_evaluate_accept_what_import_accepts(capsys, tmp_path, model, form):
    rows = rows_of(lambda task, number: {"outcome": number % 2})[:8]
    input, reports = tmp_path / "in.jsonl", {}
    for name in ("lines", form):
        input.write_text(FORMS[name](rows), encoding="utf-8")
        output = tmp_path / "out.json"
        status, out, err = run(capsys, "--model", model, "--input", input, "--json", output, "--samples", 20)
        assert status == 0, err
        reports[name] = json.loads(output.read_text()) | {"input": None}
        assert cli.main(["score", "--model", str(model), "--input", str(input), "--output", str(tmp_path / "s")]) == 0
        lines = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
        assert len(lines) == 8 and not any("error" in line for line in lines)
        assert cli.main(["validate", str(input)]) == 0
        assert "8 rows, 8 trajectories, 0 bad" in capsys.readouterr().out
    assert reports["lines"] == reports[form]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": "a", "messages": [{"role": "robot", "content": "x"}]}', "role"),
        ('{"id": "a", "outcome": 7, "messages": [{"role": "user", "content": "x"}]}', "outcome 7.0 is outside"),
        ('{"id": "a"', "not JSON"),
        ("[1]", "object"),
    ],
)
def test_a_bad_row_has_the_same_message_in_all_of_them(capsys, tmp_path, model, text, words):
    input = write(tmp_path / "in.jsonl", [*rows_of(lambda *_: {"outcome": 1})[:2], text])
    cli.main(["validate", str(input)])
    messages = [capsys.readouterr().out]
    _, out, _ = run(capsys, "--model", model, "--input", input, "--samples", 20)
    cli.main(["score", "--model", str(model), "--input", str(input), "--output", str(tmp_path / "s")])
    messages += [out, json.loads((tmp_path / "s").read_text().splitlines()[2])["error"]]
    reasons = [re.search(r"in\.jsonl:3: (.*)", message)[1] for message in messages]
    assert len(set(reasons)) == 1 and words in reasons[0]
