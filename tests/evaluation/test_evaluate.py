"""The report of `evaluate`, from promises constructed so that the correct numbers are known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation.evaluate import EvaluatedModel, Settings, evaluate_scores
from jaxprm.evaluation.labels import Labels, validation_tasks
from jaxprm.evaluation.scored import ScoredFile, ScoredTrajectory
from jaxprm.evaluation.statistics import Resampling
from jaxprm.evaluation.tables import evaluation_table
from jaxprm.objectives import OBJECTIVES
from jaxprm.scoring.sources import reward_model

QUICK = Resampling(samples=60)
MODELS = [EvaluatedModel("m", 1.0)]


def make_row(task, promises, labels=None, outcome=None, group=None, *others):
    step_labels = (
        None if labels is None else Labels(np.array([math.nan if x is None else x for x in labels], float), False)
    )
    return ScoredTrajectory(
        task, group, outcome, None, False, step_labels, tuple(np.array(values, float) for values in (promises, *others))
    )


def report_of(rows, models=MODELS, **settings):
    report = evaluate_scores(
        ScoredFile(list(rows), len(rows), "0" * 64, 0), models, Settings(**({"resampling": QUICK} | settings))
    )
    report = files.without_nan(report)
    json.dumps(report, allow_nan=False)
    assert evaluation_table(report)
    return report


def planted(count=24, seed=0, labels="planted"):
    """Trajectories with promises below .3 or above .7; steps are labelled wrong below one half, or at random."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        low = random.random(4) < 0.3
        promises = np.where(low, 0, 0.7) + 0.3 * random.random(4)
        wrong = low if labels == "planted" else random.random(4) < 0.5
        rows.append(make_row(f"t{number // 2}", promises, 1.0 - wrong, outcome=float(random.random() < 0.5)))
    return rows


def means(criterion):
    return {name: estimate["mean"] for name, estimate in criterion["metrics"].items()}


def test_a_planted_threshold_is_chosen_and_every_metric_is_perfect():
    report = report_of(planted())
    promise = report["step_labels"]["models"]["m"]["promise"]
    assert all(0.3 <= threshold <= 0.7 for threshold in promise["thresholds"].values())
    assert set(means(promise).values()) == {1.0}
    baselines = report["step_labels"]["baselines"]
    assert means(baselines["constant"])["balanced_accuracy"] == 0.5 and means(baselines["constant"])["f1"] == 0.0
    assert means(baselines["depth"])["step_accuracy"] < 0.9


def test_random_labels_give_chance_level():
    report = report_of(planted(80, labels="random"), resampling=Resampling(samples=400))
    metrics = report["step_labels"]["models"]["m"]["promise"]["metrics"]
    for name in ("balanced_accuracy", "step_accuracy", "auroc"):
        assert metrics[name]["low"] <= 0.5 <= metrics[name]["high"], name


def test_thresholds_come_from_the_validation_tasks_alone():
    """Inverting every label of the test part keeps the thresholds and inverts the accuracy."""
    rows = planted()
    chosen = validation_tasks({row.task for row in rows}, 0.5, 0)
    turned = [row if row.task in chosen else make_row(row.task, row.promises[0], 1 - row.labels.values) for row in rows]
    before, after = (report_of(labelled)["step_labels"]["models"]["m"]["promise"] for labelled in (rows, turned))
    assert before["thresholds"] == after["thresholds"]
    assert means(before)["step_accuracy"] == 1.0 and means(after)["step_accuracy"] == 0.0


def test_numbers_come_from_the_test_tasks_alone():
    """Without the validation part, and with a fixed threshold instead, the numbers are the same."""
    rows = planted()
    chosen = validation_tasks({row.task for row in rows}, 0.5, 0)
    report = report_of(rows)
    assert report["labels"]["parts"]["validation"]["tasks"] == len(chosen)
    alone = report_of([row for row in rows if row.task not in chosen], threshold=0.5)
    assert alone["labels"]["parts"]["validation"]["trajectories"] == 0
    assert means(alone["step_labels"]["models"]["m"]["promise"]) == means(
        report["step_labels"]["models"]["m"]["promise"]
    )
    assert report["labels"]["parts"]["test"] == alone["labels"]["parts"]["test"]


@given(st.integers(0, 20), st.floats(0.05, 0.95), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_no_task_is_in_both_parts(seed, share, tasks):
    rows = [make_row(f"t{n % tasks}", [0.1 * (n % 7), 0.5], [n % 2, 1]) for n in range(3 * tasks)]
    parts = report_of(rows, validation_share=share, resampling=Resampling(samples=2, seed=seed))["labels"]["parts"]
    assert parts["validation"]["tasks"] + parts["test"]["tasks"] == tasks
    assert parts["validation"]["trajectories"] == 3 * parts["validation"]["tasks"]
    assert parts["test"]["tasks"] >= 1 and parts["validation"]["tasks"] >= 1


def test_the_order_of_the_rows_changes_nothing():
    """Up to the rounding of sums."""
    rows = planted(labels="random")
    rounded = lambda report: json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 9) + 0.0)
    assert rounded(report_of(rows)) == rounded(report_of(rows[::-1]))


def test_a_given_threshold_is_used_on_all_rows_and_nothing_is_chosen():
    rows = [make_row("t", [0.2, 0.6], [1, 0]), make_row("t", [0.9, 0.4], [1, 0])]
    report = report_of(rows, threshold=0.5)
    (criterion,) = report["step_labels"]["models"]["m"]
    metrics = means(report["step_labels"]["models"]["m"]["promise"])
    assert criterion == "promise" and metrics["step_accuracy"] == 0.5 and metrics["first_error_accuracy"] == 0.5
    assert set(report["step_labels"]["baselines"]) == {"constant"}
    assert means(report["step_labels"]["baselines"]["constant"])["step_accuracy"] == 0.5
    with pytest.raises(UserError, match="all on one task.*--threshold"):
        report_of(rows)


def test_ternary_labels_have_two_thresholds():
    rows = []
    for number in range(12):
        labels = [[-1, 0, 1], [1, 0, 0], [0, 1, 1]][number % 3]
        rows.append(make_row(f"t{number}", [label + 0.01 * number for label in labels], labels))
    report = report_of(rows)
    promise = report["step_labels"]["models"]["m"]["promise"]
    low, high = promise["thresholds"]["ternary_accuracy"]
    assert -0.9 < low <= 0.5 < high <= 1.1
    assert means(promise)["ternary_accuracy"] == 1.0 and means(promise)["first_error_accuracy"] == 1.0
    fixed = report_of(rows, threshold=-0.5)["step_labels"]["models"]["m"]["promise"]
    assert means(fixed)["ternary_accuracy"] is None and means(fixed)["step_accuracy"] == 1.0


def test_soft_labels_are_compared_without_thresholds():
    random = np.random.default_rng(0)
    rows = []
    for number in range(10):
        promises = random.random(3)
        rows.append(make_row(f"t{number}", promises, [2 * promises[0] - 0.5, None, 2 * promises[2] - 0.5]))
    report = report_of(rows)
    assert report["labels"]["kind"] == "soft" and report["counts"]["null_labels"] == 10
    promise = means(report["step_labels"]["models"]["m"]["promise"])
    values = np.array([row.promises[0][[0, 2]] for row in rows])
    labels = 2 * values - 0.5
    assert promise["correlation"] == pytest.approx(1) and promise["rank_correlation"] == pytest.approx(1)
    assert promise["mse"] == pytest.approx(np.mean((values - labels) ** 2))
    assert means(report["step_labels"]["baselines"]["constant"])["mse"] == pytest.approx(labels.var())
    assert means(report["step_labels"]["baselines"]["constant"])["correlation"] is None
    assert "mse" not in means(report["step_labels"]["models"]["m"]["progress"])


def test_steps_without_a_label_are_ignored():
    """An unlabelled step with the lowest promise is not a first error, whatever the threshold."""
    rows = [make_row(f"t{n}", [0.9, -5.0, 0.8, 0.1], [1, None, 1, 0]) for n in range(4)]
    metrics = means(report_of(rows)["step_labels"]["models"]["m"]["promise"])
    assert metrics["f1"] is None  # there is no correct trajectory
    assert metrics["first_error_accuracy"] == 1.0 and metrics["step_accuracy"] == 1.0


def test_progress_has_its_own_threshold_and_is_left_out_for_a_model_with_a_discount():
    """Promises start anywhere below 0, and a wrong step is one at which the promise falls."""
    random = np.random.default_rng(1)
    rows = []
    for number in range(40):
        wrong = random.random(4) < 0.4
        wrong[0] = False
        gains = np.where(wrong, -0.2, 0.1)
        rows.append(make_row(f"t{number}", 3 * random.random() - 3 + np.cumsum(gains), 1.0 - wrong))
    criteria = report_of(rows)["step_labels"]["models"]["m"]
    assert means(criteria["progress"])["f1"] == 1.0 and -0.2 < criteria["progress"]["thresholds"]["f1"] <= 0.1
    assert means(criteria["promise"])["f1"] < 0.8
    assert set(report_of(rows, [EvaluatedModel("m", 0.9)])["step_labels"]["models"]["m"]) == {"promise"}


def test_without_failures_nothing_is_nan():
    report = report_of([make_row(f"t{n}", [0.5, 0.6], [1, 1], outcome=1.0) for n in range(3)])
    summary = report["outcomes"]["models"]["m"]["summary"]
    assert summary["auroc"]["mean"] is None and summary["mse"]["mean"] == pytest.approx((0.25 + 0.16) / 2)
    promise = means(report["step_labels"]["models"]["m"]["promise"])
    assert promise["f1"] is None and promise["accuracy_on_correct"] is None and promise["step_accuracy"] == 1.0


def test_groups_share_the_thresholds_and_have_their_own_numbers():
    rows = planted(48)
    for index, row in enumerate(rows):
        wrong = row.labels.values if index % 2 else 1 - row.labels.values
        rows[index] = make_row(row.task, row.promises[0], wrong, row.outcome, group="good" if index % 2 else "bad")
    report = report_of([*rows, make_row("t0", [0.5], None, 0.0, group="bare")], threshold=0.5)
    accuracy = lambda part: means(part["step_labels"]["models"]["m"]["promise"])["step_accuracy"]
    assert accuracy(report) == 0.5
    assert accuracy(report["groups"]["good"]) == 1.0 and accuracy(report["groups"]["bad"]) == 0.0
    assert report["groups"]["good"]["counts"]["trajectories"] == 24
    assert report["groups"]["bare"]["step_labels"] is None
    squares = [np.mean((row.promises[0] - row.outcome) ** 2) for row in rows if row.group == "good"]
    summary = report["groups"]["good"]["outcomes"]["models"]["m"]["summary"]
    assert summary["mse"]["mean"] == pytest.approx(np.mean(squares))


def test_two_models_are_compared_on_the_same_tasks():
    random = np.random.default_rng(2)
    rows = []
    for row in planted(40):
        noise = random.random(4)
        rows.append(make_row(row.task, row.promises[0], row.labels.values, row.outcome, None, noise, row.promises[0]))
    report = report_of(rows, [EvaluatedModel("good", 1.0), EvaluatedModel("noise", 1.0), EvaluatedModel("same", 1.0)])
    paired = {(row["a"], row["b"], row["metric"]): row for row in report["paired"]}
    to_noise = paired["good", "noise", "promise balanced_accuracy"]
    criteria = report["step_labels"]["models"]
    gain = (
        means(criteria["good"]["promise"])["balanced_accuracy"]
        - means(criteria["noise"]["promise"])["balanced_accuracy"]
    )
    assert to_noise["mean"] == pytest.approx(gain) and to_noise["low"] > 0
    same = {name: row for name, row in paired.items() if name[:2] == ("good", "same")}
    assert {(row["mean"], row["low"], row["high"]) for row in same.values()} == {(0.0, 0.0, 0.0)}
    assert {"auroc", "mse", "best_of_2", "progress f1"} <= {name[2] for name in same}


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(UserError, match="no line has an outcome, or labels in step_labels"):
        report_of([make_row("t", [0.5])])
    with pytest.raises(UserError, match="labels meta.label: no line has any"):
        report_of([make_row("t", [0.5], outcome=1.0)], labels="meta.label")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"validation_share": 1.0}, r"validation share 1.0: must be in \(0, 1\)"),
        ({"threshold": math.nan}, "threshold nan"),
        ({"resampling": Resampling(samples=0)}, "samples 0"),
        ({"resampling": Resampling(seed=-1)}, "seed -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(**settings)


def first_error(task, promises, error, outcome=None):
    """Steps after the error have no label; error -1: all are right."""
    labels = [1.0] * len(promises) if error < 0 else [1.0] * error + [0.0] + [None] * (len(promises) - error - 1)
    return make_row(task, promises, labels, outcome)


def test_the_lowest_step_counts_among_all_steps_and_ties_share():
    rows = [
        first_error("a", [0.9, 0.2, 0.5], 1),  # promise: step 1; progress: step 1
        first_error("b", [0.9, 0.6, 0.1], 1),  # promise: step 2, which has no label; progress: step 2
        first_error("c", [0.9, 0.1, 0.1], 1),  # promise: a tie of 1 and 2; progress: step 1
        first_error("d", [0.9, 0.8, 0.9], -1),  # no error: not a unit
    ]
    criteria = report_of(rows, threshold=0.5)["step_labels"]
    metric = lambda criterion: criterion["metrics"]["argmin_accuracy"]["mean"]
    assert metric(criteria["models"]["m"]["promise"]) == pytest.approx((1 + 0 + 0.5) / 3)
    # The constant baseline chooses blindly.
    assert metric(criteria["baselines"]["constant"]) == pytest.approx(1 / 3)


def test_progress_has_an_argmin_too_and_its_first_step_is_never_it():
    rows = [first_error(str(n), [0.1, 0.9, 0.5, 0.4], error) for n, error in enumerate([2, 0, 2, 0])]
    report = report_of(rows)
    progress = report["step_labels"]["models"]["m"]["progress"]["metrics"]["argmin_accuracy"]["mean"]
    test = [n for n in range(4) if str(n) not in validation_tasks({str(n) for n in range(4)}, 0.5, 0)]
    assert progress == np.mean([n % 2 == 0 for n in test])


def test_accuracy_on_erroneous_needs_no_correct_trajectory():
    """Where all are erroneous F1 has no value; at the threshold of the first-error accuracy the other has."""
    rows = [first_error(f"t{n}", [0.9, 0.2, 0.1], 1) for n in range(8)]
    metrics = means(report_of(rows)["step_labels"]["models"]["m"]["promise"])
    assert metrics["accuracy_on_erroneous"] == metrics["first_error_accuracy"] == 1.0
    assert metrics["f1"] is None and metrics["accuracy_on_correct"] is None


def test_there_is_no_table_by_step_where_steps_after_the_error_have_no_label():
    rows = [first_error(f"t{n}", [0.9, 0.2, 0.1], n % 3 - 1, outcome=float(n % 3 == 0)) for n in range(12)]
    scored_file = ScoredFile(rows, len(rows), "0" * 64, 0)
    tables = {}
    for kind in ("first-error", "binary"):
        report = evaluate_scores(scored_file, MODELS, Settings(resampling=QUICK, label_kind=kind))
        tables[kind] = evaluation_table(report)
    # Detected from the values, too.
    assert evaluate_scores(scored_file, MODELS, Settings(resampling=QUICK))["labels"]["kind"] == "first-error"
    assert (
        "By step of" not in tables["first-error"]
        and "steps after the first error have no label" in tables["first-error"]
    )
    assert "By step of" in tables["binary"] and "argmin accuracy" in tables["first-error"]


def test_promises_of_a_model_of_pairs_are_judged_by_their_order_alone(tmp_path):
    (tmp_path / "model.safetensors").touch()

    def summary(**recipe) -> tuple[set[str], bool]:
        (tmp_path / "reward_model.json").write_text(json.dumps(recipe))
        source = reward_model(tmp_path)
        model = EvaluatedModel(source.name, source.discount, source.is_expectation, source.start)
        assert model.start == -math.inf  # no promise comes before the first
        numbers = report_of(planted(), [model])["outcomes"]["models"][model.name]
        return set(numbers["summary"]), bool(numbers["calibration"])

    of_outcomes, ranked = summary(), ({"auroc", "auroc_within_task"}, False)
    assert "mse" in of_outcomes[0] and of_outcomes[1]
    for name, objective in OBJECTIVES.items():
        recipe = {"objective": name, "value_range": None if objective.supervision == "pairs" else [0, 1]}
        assert summary(**recipe) == (ranked if name == "preference" else of_outcomes)
    assert summary(objective="mine:PAIRS", value_range=None) == ranked
    assert summary(objective="mine:OUTCOMES", value_range=[0, 1]) == of_outcomes
