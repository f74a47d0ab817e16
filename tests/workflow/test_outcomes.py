"""A run stops before training if the outcomes of its trajectories cannot teach anything."""

from __future__ import annotations

import json

import pytest

from jaxprm import cli
from jaxprm.config import EndpointConfig, EnvironmentConfig, Experiment, PolicyConfig
from jaxprm.errors import UserError
from jaxprm.workflow.context import Run
from jaxprm.workflow.outcomes import check_outcomes


@pytest.fixture
def rows(tmp_path):
    def write(*rows: dict):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ([0.0] * 3, "all 3 trajectories have outcome 0, so no step"),
        ([0.5] * 3, "all 3 trajectories have outcome 0.5"),
        ([1.0] + [0.0] * 199, "1 of 200 trajectories have an outcome above 0"),
    ],
)
def test_outcomes_that_teach_nothing_are_named(rows, outcomes, message):
    path = rows(*({"outcome": outcome} for outcome in outcomes))
    with pytest.raises(UserError, match=message) as caught:
        check_outcomes(path, min_success=0.01)
    assert "docs/your-policy.md" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_outcomes(path, min_success=0)


def test_two_of_two_hundred_are_enough(rows):
    check_outcomes(rows(*({"outcome": float(index < 2)} for index in range(200))), min_success=0.01)


def test_rows_without_a_target_outcome_are_not_counted(rows):
    errors = [{"outcome": 0.0, "ended": "error"}, {"outcome": None}, {"outcome": 0.0, "rewards": [0.5]}]
    check_outcomes(rows(*errors), min_success=0.01)
    with pytest.raises(UserError, match="all 1 trajectories"):
        check_outcomes(rows(*errors, {"outcome": 0.0}), min_success=0.01)


def test_train_stops_with_one_line_before_it_trains(tmp_path, capsys):
    row = {
        "messages": [
            {"role": "user", "content": "Open the door."},
            {"role": "assistant", "content": "push"},
        ],
        "outcome": 0,
    }
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": f"r{n}", "task": f"t{n}"} | row) + "\n" for n in range(40)))
    command = ["train", "configs/textcraft_tiny.py", "--quick", "--data", str(data), "--model", "default"]
    assert cli.main([*command, "--workdir", str(tmp_path / "work")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trajectories have outcome 0" in error
    assert not (tmp_path / "work/reward_models").exists()


def test_served_policies_get_instructions_unless_the_config_says_otherwise():
    served = PolicyConfig(endpoint=EndpointConfig(model="m"))

    def arguments(policy: PolicyConfig, **given) -> dict:
        run = Run(Experiment(name="x", policy=policy, environment=EnvironmentConfig(arguments=given)), work=None)
        assert run.collect_inputs["environment"]["arguments"] == run.environment_arguments
        return run.environment_arguments

    assert arguments(served, max_rounds=4) == {"max_rounds": 4, "instructions": True}
    assert arguments(served, instructions=False) == {"instructions": False}
    assert arguments(PolicyConfig(), max_rounds=4) == {"max_rounds": 4}
