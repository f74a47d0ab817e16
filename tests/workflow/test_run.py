"""A complete quick run from the command line, and what users do with its work directory afterwards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprm import files

ROOT = Path(__file__).parents[2]
CONFIG = "configs/textcraft_tiny.py"
pytestmark = pytest.mark.slow


def jaxprm(*arguments, check=True):
    command = [sys.executable, "-m", "jaxprm", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    work = tmp_path_factory.mktemp("quick") / "run"
    return work, jaxprm("run", CONFIG, "--quick", "--workdir", work)


def test_a_run_ends_with_a_table_and_the_path_of_its_report(quick):
    work, done = quick
    assert "agentprm" in done.stdout and "plain policy" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"report: {work / 'report/index.html'}"
    assert (work / "report/index.html").stat().st_size > 10_000


def test_results_have_the_documented_form(quick):
    results = json.loads((quick[0] / "results.json").read_text())
    assert {"policy", "oracle", "methods", "paired", "compute", "seconds", "provenance"} <= set(results)
    assert set(results["policy"]) == {"sampled", "greedy"}
    assert set(results["methods"]) == {"agentprm", "pvm", "orm", "random"}
    for by_search in results["methods"].values():
        assert {"best_of_n", "beam", "stepwise"} <= set(by_search)
        assert set(by_search["best_of_n"]) == {"1", "2", "4"} and set(by_search["beam"]) == {"2x2"}
        assert all(set(r) == {"mean", "low", "high", "n"} and r["n"] == 4 for r in by_search["beam"].values())
    assert all({"a", "b", "at", "mean", "low", "high"} <= set(row) for row in results["paired"])
    assert set(results["oracle"]) == {"1", "2", "4"}


def test_best_of_one_is_the_plain_policy_and_nothing_beats_the_oracle(quick):
    results = json.loads((quick[0] / "results.json").read_text())
    sampled = results["policy"]["sampled"]["mean"]
    for by_search in results["methods"].values():
        assert by_search["best_of_n"]["1"]["mean"] == pytest.approx(sampled)
        for n, r in by_search["best_of_n"].items():
            assert r["mean"] <= results["oracle"][n]["mean"] + 1e-9
    assert results["methods"]["random"]["best_of_n"]["4"]["mean"] == pytest.approx(sampled)


def test_no_task_is_in_two_splits(quick):
    splits = [
        {line["task"] for line in files.read_lines(quick[0] / path)}
        for path in ("trajectories/train.jsonl", "trajectories/validation.jsonl", "search/pool.jsonl")
    ]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_a_second_run_does_nothing_and_a_changed_config_is_refused(quick):
    work, _ = quick
    before = (work / "results.json").read_bytes()
    jaxprm("run", CONFIG, "--quick", "--workdir", work)
    assert (work / "results.json").read_bytes() == before
    refused = jaxprm("run", CONFIG, "--quick", "seed=5", "--workdir", work, check=False)
    assert refused.returncode == 2 and "seed = 0, now 5" in refused.stderr and refused.stderr.count("\n") == 1
    assert (work / "results.json").read_bytes() == before


def test_the_same_trajectories_from_files_train_the_same_models(quick, tmp_path):
    work, own = quick[0], tmp_path / "own"
    data = [f"--data={work / f'trajectories/{split}.jsonl'}" for split in ("train", "validation")]
    done = jaxprm("run", CONFIG, "--quick", "--workdir", own, *data)
    assert done.stdout.startswith("trajectories: 24 train, 16 validation\n") and "run ends here" in done.stdout
    trained = sorted(path.relative_to(work) for path in work.glob("reward_models/*/seed-0/model/model.safetensors"))
    assert len(trained) == 3
    for path in trained:
        assert (own / path).read_bytes() == (work / path).read_bytes()


def test_a_lost_search_file_is_made_again_bit_for_bit(quick, tmp_path):
    work = tmp_path / "copy"
    shutil.copytree(quick[0], work)
    lost = work / "search/beam-2x2-agentprm-0.jsonl"
    before = lost.read_bytes()
    lost.unlink()
    jaxprm("run", CONFIG, "--quick", "--workdir", work)
    assert lost.read_bytes() == before


def test_the_score_verb_agrees_with_the_run_and_reports_a_bad_line(quick, tmp_path):
    work, _ = quick
    source, output = tmp_path / "in.jsonl", tmp_path / "scores.jsonl"
    good = (work / "trajectories/validation.jsonl").read_text().splitlines(keepends=True)
    source.write_text("".join([*good[:2], "{broken\n", *good[2:]]))
    done = jaxprm("score", "--model", work / "reward_models/pvm", "--input", source, "--output", output, check=False)
    assert done.returncode == 1
    scores = list(files.read_lines(output))
    assert len(scores) == len(good) + 1 and "error" in scores[2]
    expected = {line["id"]: line["values"] for line in files.read_lines(work / "search/values-validation-pvm-0.jsonl")}
    for score in scores[:2] + scores[3:]:
        assert [step["promise"] for step in score["steps"]] == pytest.approx(expected[score["id"]], abs=1e-5)
        assert score["steps"][0]["progress"] is None and score["score"] == score["steps"][-1]["promise"]


def test_the_export_is_verified_against_transformers(quick, tmp_path):
    work, output = quick[0], tmp_path / "hf"
    trajectories, model = work / "trajectories/validation.jsonl", work / "reward_models/agentprm"
    done = jaxprm("export", "--model", model, "--output", output, "--verify", "--input", trajectories)
    assert "verified" in done.stdout
    assert json.loads((output / "config.json").read_text())["architectures"] == ["Qwen2ForSequenceClassification"]


def test_a_search_from_outside_the_package_is_in_the_results_and_the_report(quick, tmp_path):
    work = tmp_path / "copy"
    shutil.copytree(quick[0], work)
    jaxprm("run", CONFIG, "--quick", 'search.custom={"tests.search.toy:FIRST": [[2]]}', "--workdir", work)
    results, before = (json.loads((path / "results.json").read_text()) for path in (work, quick[0]))
    assert results["searches"] == {"first": {"label": "first of {} draws", "card": "first of {} draws at every step"}}
    for label, by_search in results["methods"].items():
        assert by_search.pop("first")["2"]["n"] == 4
        assert by_search == before["methods"][label]
    assert "first of 2 draws" in (work / "report/index.html").read_text()
