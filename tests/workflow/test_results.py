"""results.json of a small work directory: aggregations, searches and budgets, computed by hand."""

from types import SimpleNamespace

import msgspec
import pytest

from jaxprm import config, files
from jaxprm.errors import UserError
from jaxprm.report.labels import search_name
from jaxprm.report.results import load_results
from jaxprm.search.methods import search_specs
from jaxprm.workflow.results import ResultsBuilder

SEARCH = config.SearchConfig(
    pool=2,
    best_of_n=(1, 2),
    prefix_best_of_n=(1, 2),
    beams=((2, 2),),
    stepwise=(),
    mcts=((3, 2),),
    aggregations=("mean", "product", "vote", "weighted_vote"),
)


MESSAGES = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
TRAJECTORIES = [(task, number) for task in ("t", "u") for number in (0, 1)]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(search): the results of two tasks, a pool of two and the searches of these settings.

    The first trajectory of each task fails, the second succeeds. Every search succeeds.
    """
    monkeypatch.setattr("jaxprm.workflow.results.flops_of_tokens", lambda run: (10.0, 2.0))

    def write(name, lines):
        files.write_atomic(tmp_path / f"search/{name}.jsonl", "".join(map(files.line, lines)))

    def build(search):
        models = tuple(config.RewardModelConfig(label=label) for label in ("good", "bad"))
        experiment = config.Experiment(name="small", search=search, reward_models=models, bootstrap_samples=50)
        line = {"messages": MESSAGES}
        write(
            "pool",
            [
                line
                | {"id": f"{task}{number}", "task": task, "outcome": float(number)}
                | {"meta": {"tokens": 30, "answer": f"{number}"}}
                for task, number in TRAJECTORIES
            ],
        )
        # Of "good" the final promises are right and the means are not; of "bad" the other way round.
        values = {"good": ([0.9, 0.1], [0.1, 0.5]), "bad": ([0.1, 0.5], [0.9, 0.1])}
        for label, promises in values.items():
            lengths = {"tokens": 140, "prompt_tokens": 100}
            lines = [{"id": f"{task}{number}", "values": promises[number]} | lengths for task, number in TRAJECTORIES]
            write(f"values-pool-{label}-0", lines)
        searched = {"policy_tokens": 50, "reward_tokens": 150, "environment_steps": 4, "merged": 1, "proposed": 4}
        # The sums of log-ratios choose the success, as "good" does.
        promises = ([-3.0, -9.0], [-3.0, 2.0])
        lines = [{"id": f"{task}{number}", "values": promises[number]} | lengths for task, number in TRAJECTORIES]
        write("values-pool-progress_advantage-0", [*lines[:3], {"id": "u1", "error": "a byte"}])
        for label in ("good", "bad", "random", "progress_advantage"):
            for spec in search_specs(search):
                encoded = {"reward_encoded": 75.0 if spec.kind == "mcts" else 300.0}
                lines = [{"task": task, "outcome": 1.0, "errors": 0} | encoded | searched for task in ("t", "u")]
                if spec.kind == "beam":
                    lines[0]["ended"] = "budget"
                write(spec.file_name(label, 0), lines)
        return ResultsBuilder(SimpleNamespace(experiment=experiment, work=tmp_path))

    return build


@pytest.fixture
def results(build):
    return build(SEARCH)


def test_best_of_n_by_other_scores_than_the_final_step(results):
    methods = results.methods()["good"]
    assert methods["best_of_n"]["2"]["mean"] == 1.0
    # Means .5 and .3, products .09 and .05: both choose the failure.
    assert methods["best_of_n_mean"]["2"]["mean"] == methods["best_of_n_product"]["2"]["mean"] == 0.0
    assert methods["best_of_n_mean"]["1"]["mean"] == 0.5
    # Two answers with a vote each: a draw. Weighted by final promises of .1 and .5 the right one wins.
    assert methods["best_of_n_vote"]["2"]["mean"] == 0.5
    assert methods["best_of_n_weighted_vote"]["2"]["mean"] == 1.0
    assert "best_of_n_mean" not in results.methods()["random"]


def test_a_search_appears_among_methods_and_paired_differences(results):
    assert results.methods()["bad"]["mcts"]["3x2"]["mean"] == 1.0
    (gain,) = [row for row in results.paired() if (row["a"], row["b"], row["at"]) == ("good", "policy", "mcts 3x2")]
    assert gain["mean"] == 0.5


def test_costs_of_a_search_are_keyed_and_counted(results):
    costs = results.compute()["methods"]["good"]
    assert costs["2x2"]["reward_encoded_ratio"] == 2.0
    assert costs["mcts 3x2"]["reward_encoded_ratio"] == 0.5
    assert costs["2x2"]["flops"] == 50 * 10 + 150 * 2
    assert "reward_encoded_ratio" not in results.compute()["methods"]["random"]["2x2"]
    assert costs["2x2"]["ended_early"] == 1 and "ended_early" not in costs["mcts 3x2"]


def test_a_search_is_compared_with_best_of_n_of_equal_cost(results):
    rows = {(row["label"], row["at"], row["unit"]): row for row in results.budget()["equal"]}
    assert len(rows) == 2 * 2 * 2
    # 200 tokens less 100 of the prompt, at 30 + 40 a candidate; FLOPs 800 less 200, at 300 + 80.
    tokens, flops = rows["good", "beam 2x2", "tokens"], rows["good", "beam 2x2", "flops"]
    assert tokens["n"] == pytest.approx(100 / 70) and flops["n"] == pytest.approx(600 / 380)
    # Best of 1 is .5, best of 2 is 1.
    assert tokens["best_of_n"]["mean"] == pytest.approx(0.5 + 0.5 * (100 / 70 - 1))
    assert tokens["difference"]["mean"] == pytest.approx(1 - tokens["best_of_n"]["mean"])


def test_the_budget_at_which_a_label_reaches_the_score_of_another(results):
    rows = {(row["a"], row["b"]): row for row in results.budget()["needed"]}
    # The best of 2 by bad is 0, which good exceeds with 1 sample. Bad never reaches the 1.0 of good.
    assert (rows["good", "bad"]["mean"], rows["bad", "good"]["mean"]) == (2.0, 0.0)
    assert rows["bad", "good"]["reached"] == 0.0


def test_pool_values_without_token_counts_give_no_equal_budgets(results):
    path = results.folder / "values-pool-good-0.jsonl"
    lines = [{"id": line["id"], "values": line["values"]} for line in files.read_lines(path)]
    files.write_atomic(path, "".join(map(files.line, lines)))
    budget = results.budget()
    assert {row["label"] for row in budget["equal"]} == {"bad"}
    assert len(budget["needed"]) == 2


def test_values_are_compared_on_the_validation_rows_with_an_outcome(results, tmp_path):
    """Rows with step labels alone, and pairs, have neither `success` nor `outcome`."""
    row = {"messages": MESSAGES, "task": "t"}
    pair = row | {"id": "pair", "chosen": MESSAGES[1], "rejected": [MESSAGES[1]]}
    rows = [row | {"id": "labels", "step_labels": [1, 0]}, pair, row | {"id": "rewards", "rewards": [0, 1]}]
    scored = [{"id": line["id"], "values": [0.5, 0.5]} for line in rows]

    def quality(*outcomes: dict) -> dict:
        lines = [*rows, *outcomes]
        files.write_atomic(tmp_path / "trajectories/validation.jsonl", "".join(map(files.line, lines)))
        values = [*scored, *({"id": line["id"], "values": [0.5, 1.0]} for line in outcomes)]
        for label in ("good", "bad"):
            path = results.folder / f"values-validation-{label}-0.jsonl"
            files.write_atomic(path, "".join(map(files.line, values)))
        return results.value_quality()

    assert quality() == {"value_by_depth": {}, "calibration": {}, "validation": {}}
    success = row | {"id": "outcome", "outcome": 1.0, "success": True}
    measured = quality(success)
    assert measured["validation"]["good"]["loss"]["mean"] == pytest.approx(0.5**2 / 2 / 2)
    assert [line["depth"] for line in measured["value_by_depth"]["bad"]] == [1, 2]


def test_a_search_from_outside_the_package_is_reported_under_its_label(build, tmp_path):
    results = build(msgspec.structs.replace(SEARCH, custom={"tests.search.toy:FIRST": ((3,),)}))
    value = {"methods": results.methods(), "paired": results.paired(), "searches": results.custom_searches()}
    files.write_json(tmp_path / "results.json", value)
    reported = load_results(tmp_path / "results.json")
    assert reported.at("good", "first", "3").mean == 1.0
    assert search_name("first 3", reported.custom_labels) == "first of 3 draws"
    assert "first 3" in {row.at for row in reported.paired}
    assert results.compute()["methods"]["good"]["first 3"]["policy_tokens"] == 50


def test_without_searches_from_outside_nothing_about_them_is_written(results):
    assert results.custom_searches() == {}


@pytest.mark.parametrize(
    ("name", "keep", "problem"),
    [
        ("pool", 3, r"pool\.jsonl: task u has 1 trajectories, not 2"),
        ("pool", 0, r"pool\.jsonl: is empty"),
        ("values-pool-good-0", 3, r"values-pool-good-0\.jsonl: has no values of u1"),
        ("beam-2x2-bad-0", 1, r"beam-2x2-bad-0\.jsonl: has 1 tasks, not the 2 of pool\.jsonl"),
    ],
)
def test_a_file_of_the_search_that_lost_lines_is_named(build, tmp_path, name, keep, problem):
    """Records of earlier versions have no digests."""
    build(SEARCH)
    path = tmp_path / f"search/{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    write = files.write_atomic

    def write_less(target, text):
        write(target, "".join(lines[:keep]) if target == path else text)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=problem) as error:
        patch.setattr(files, "write_atomic", write_less)
        build(SEARCH).methods()
    assert "\n" not in str(error.value)


def test_progress_advantage_is_one_more_guide_with_one_seed(build, monkeypatch):
    monkeypatch.setattr("jaxprm.workflow.results.flops_of_log_ratio", lambda run: 7.0)
    advantage = config.ProgressAdvantageConfig(reference="somewhere")
    with_it, without = (build(msgspec.structs.replace(SEARCH, progress_advantage=value)) for value in (advantage, None))
    assert with_it.methods().keys() - without.methods().keys() == {"progress_advantage"}
    numbers = with_it.methods()["progress_advantage"]
    # Sums of log-ratios are no probabilities, and most are below 0.
    assert "best_of_n_mean" in numbers and "best_of_n_vote" in numbers
    assert not {"best_of_n_product", "best_of_n_weighted_vote"} & numbers.keys()
    # In task t the sum chooses the success; in u that one could not be scored.
    assert numbers["best_of_n"]["2"]["mean"] == 0.5 and numbers["beam"]["2x2"]["mean"] == 1.0
    pairs = {(row["a"], row["b"]) for row in with_it.paired()}
    new = pairs - {(row["a"], row["b"]) for row in without.paired()}
    others = ("policy", "random")
    assert new == {(label, "progress_advantage") for label in ("good", "bad")} | {
        ("progress_advantage", other) for other in others
    }
    costs = {label: cost["2x2"]["flops"] for label, cost in with_it.compute()["methods"].items() if label != "policy"}
    # It reads as many tokens as a reward model, at the price of two models.
    assert costs["progress_advantage"] - costs["good"] == 150 * (7.0 - 2.0)


def test_candidates_without_a_score_are_counted(build, tmp_path):
    results = build(SEARCH)
    path = tmp_path / "search/beam-2x2-good-0.jsonl"
    lines = list(files.read_lines(path))
    files.write_atomic(path, "".join(files.line(line | {"unscored": 2}) for line in lines))
    costs = results.compute()["methods"]
    assert costs["good"]["2x2"]["unscored"] == 4 and "unscored" not in costs["bad"]["2x2"]
