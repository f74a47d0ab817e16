"""results.json of small files: aggregations, searches and budgets, by hand."""

from types import SimpleNamespace

import pytest

from jaxprm import config, files
from jaxprm.workflow.results import Results

SEARCH = config.SearchConfig(
    pool=2,
    best_of_n=(1, 2),
    prefix_best_of_n=(1, 2),
    beams=((2, 2),),
    stepwise=(),
    mcts=((3, 2),),
    aggregations=("mean", "product", "vote", "weighted_vote"),
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two tasks, a pool of two; the first trajectory of each fails, the second succeeds."""
    models = tuple(config.RewardModelConfig(label=label) for label in ("good", "bad"))
    experiment = config.Experiment(name="small", search=SEARCH, reward_models=models, bootstrap_samples=50)

    def write(name, lines):
        files.write_atomic(tmp_path / f"search/{name}.jsonl", "".join(map(files.line, lines)))

    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    names = [(task, number) for task in ("t", "u") for number in (0, 1)]
    write(
        "pool",
        [
            {
                "id": f"{task}{number}",
                "task": task,
                "outcome": float(number),
                "messages": messages,
                "meta": {"tokens": 30, "answer": f"{number}"},
            }
            for task, number in names
        ],
    )
    # good: the final promise tells, the mean does not; bad: the other way round.
    values = {"good": ([0.9, 0.1], [0.1, 0.5]), "bad": ([0.1, 0.5], [0.9, 0.1])}
    searched = {"policy_tokens": 50, "reward_tokens": 150, "environment_steps": 4, "merged": 1, "proposed": 4}
    for label, promises in values.items():
        write(
            f"values-pool-{label}-0",
            [
                {"id": f"{task}{number}", "values": promises[number], "tokens": 140, "prompt_tokens": 100}
                for task, number in names
            ],
        )
    for label in ("good", "bad", "random"):
        for kind, reward in (("beam-2x2", 300.0), ("mcts-3x2", 75.0)):
            lines = [{"task": task, "outcome": 1.0, "errors": 0, "reward_encoded": reward} for task in ("t", "u")]
            if kind == "beam-2x2":
                lines[0]["ended"] = "budget"
            write(f"{kind}-{label}-0", [line | searched for line in lines])
    monkeypatch.setattr("jaxprm.workflow.results.flops_of_tokens", lambda state: (10.0, 2.0))
    return Results(SimpleNamespace(experiment=experiment, work=tmp_path))


def test_best_of_n_by_other_scores(results):
    found = results.methods()["good"]
    assert found["best_of_n"]["2"]["mean"] == 1.0
    # Means .5 and .3, products .09 and .05: both take the failure.
    assert found["best_of_n_mean"]["2"]["mean"] == found["best_of_n_product"]["2"]["mean"] == 0.0
    assert found["best_of_n_mean"]["1"]["mean"] == 0.5
    # Two answers with a vote each: a draw. Weighted by final promises of .1 and .5 the right one wins.
    assert found["best_of_n_vote"]["2"]["mean"] == 0.5
    assert found["best_of_n_weighted_vote"]["2"]["mean"] == 1.0
    assert "best_of_n_mean" not in results.methods()["random"]


def test_every_search_is_a_method_a_pair_and_a_cost(results):
    assert results.methods()["bad"]["mcts"]["3x2"]["mean"] == 1.0
    (gain,) = [row for row in results.paired() if (row["a"], row["b"], row["at"]) == ("good", "policy", "mcts 3x2")]
    assert gain["mean"] == 0.5


def test_tokens_read_are_told_over_the_least_possible(results, monkeypatch):
    costs = results.compute()["methods"]["good"]
    assert costs["2x2"]["reward_encoded_ratio"] == 2.0
    assert costs["mcts 3x2"]["reward_encoded_ratio"] == 0.5
    assert costs["2x2"]["flops"] == 50 * 10 + 150 * 2
    assert "reward_encoded_ratio" not in results.compute()["methods"]["random"]["2x2"]
    assert costs["2x2"]["ended_early"] == 1 and "ended_early" not in costs["mcts 3x2"]


def test_a_search_is_compared_with_the_best_of_n_of_equal_cost(results):
    rows = {(row["label"], row["at"], row["unit"]): row for row in results.budget()["equal"]}
    assert len(rows) == 2 * 2 * 2
    # 200 tokens less 100 of the prompt, at 30 + 40 a candidate; FLOPs 800 less 200, at 300 + 80.
    tokens, flops = rows["good", "beam 2x2", "tokens"], rows["good", "beam 2x2", "flops"]
    assert tokens["n"] == pytest.approx(100 / 70) and flops["n"] == pytest.approx(600 / 380)
    # Best of 1 is .5, best of 2 is 1.
    assert tokens["best_of_n"]["mean"] == pytest.approx(0.5 + 0.5 * (100 / 70 - 1))
    assert tokens["difference"]["mean"] == pytest.approx(1 - tokens["best_of_n"]["mean"])


def test_the_budget_that_a_label_needs_for_anothers_score(results):
    rows = {(row["a"], row["b"]): row for row in results.budget()["needed"]}
    # bad ends at 0, which good has at 1 already; good's 1.0 is never reached by bad.
    assert (rows["good", "bad"]["mean"], rows["bad", "good"]["mean"]) == (2.0, 0.0)
    assert rows["bad", "good"]["reached"] == 0.0


def test_values_of_an_older_run_have_no_equal_budgets(results):
    path = results.folder / "values-pool-good-0.jsonl"
    lines = [{"id": line["id"], "values": line["values"]} for line in files.read_lines(path)]
    files.write_atomic(path, "".join(map(files.line, lines)))
    found = results.budget()
    assert {row["label"] for row in found["equal"]} == {"bad"}
    assert len(found["needed"]) == 2
