"""What a run refuses before any work is spent."""

from __future__ import annotations

import pytest

from jaxprm import config
from jaxprm.errors import UserError
from jaxprm.workflow.run import run


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("no_module_of_mine:HALF", r"^reward_models\[1\]\.objective 'no_module_of_mine:HALF': no module "),
        ("jaxprm.objectives:HALF", r"^reward_models\[1\]\.objective .*'HALF' does not exist in "),
        ("jaxprm.objectives:OBJECTIVES", r"^reward_models\[1\]\.objective is .*: is a dict; name a "),
    ],
)
def test_an_objective_that_does_not_exist_is_refused_before_anything_is_collected(objective, message, tmp_path):
    models = (config.RewardModelConfig(label="a"), config.RewardModelConfig(label="b", objective=objective))
    experiment = config.Experiment(name="x", reward_models=models)
    with pytest.raises(UserError, match=message):
        run(experiment, tmp_path, until="train")
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "trajectories").exists()
