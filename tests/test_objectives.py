"""The registry of objectives, what a record decides about a training run, and which settings are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxprm import config, objectives
from jaxprm.errors import UserError
from jaxprm.objectives import (
    Objective,
    check_objective,
    check_settings,
    find_objective,
    has_target_network,
    progress_beta,
    reads_states,
    register,
)
from jaxprm.targets import objective_targets

ROOT = Path(__file__).parents[1]


def half_targets(values, rewards, is_last, valid, settings, state_values):
    """One half at every step."""
    return np.full(values.shape, 0.5), valid


HALF = Objective(name="half", targets=half_targets, card_text="one half, at every step")


@pytest.fixture
def registry(monkeypatch) -> dict[str, Objective]:
    """The registry, restored after the test."""
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    return objectives.OBJECTIVES


def refused(match: str, call, *arguments, **options) -> None:
    with pytest.raises(UserError, match=match) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_a_registered_objective_is_found_by_name_in_targets_and_configs(registry, tmp_path):
    register(HALF)
    assert find_objective("half") is HALF
    row = (np.ones(2), np.ones(2), np.array([False, True]), np.ones(2, bool))
    targets, mask = objective_targets("half", *row, gae_lambda=0.5, discount=1.0)
    assert targets.tolist() == [0.5, 0.5] and mask.tolist() == [True, True]
    path = tmp_path / "experiment.py"
    path.write_text(
        "from jaxprm import config as lib\n"
        "config = lib.Experiment(name='x', reward_models=(lib.RewardModelConfig(label='x', objective='half'),))\n"
    )
    assert config.load(path).reward_models[0].objective == "half"
    del registry["half"]
    choices = ", ".join(objectives.OBJECTIVES)
    refused(rf"reward_models\[0\].objective is 'half': use one of {choices}, or your own", config.load, path)


def test_a_config_file_may_register_the_objective_that_it_names_and_be_read_twice(registry, tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(
        "from jaxprm import config as lib\n"
        "from jaxprm.objectives import Objective, register\n"
        "def targets(values, rewards, is_last, valid, settings, state_values):\n"
        "    return rewards, valid\n"
        "register(Objective(name='mine', targets=targets, card_text='the reward'))\n"
        "config = lib.Experiment(name='x', reward_models=(lib.RewardModelConfig(label='x', objective='mine'),))\n"
    )
    assert config.load(path) == config.load(path)
    assert find_objective("mine").card_text == "the reward"


def test_module_and_attribute_name_an_objective_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "user_objective.py").write_text(
        "from jaxprm.objectives import Objective, pvm_targets\n"
        "mine = Objective(name='mine', targets=pvm_targets, card_text='mine')\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_objective("user_objective:mine").name == "mine"
    refused(
        "'user_objective:number': is a int; name a jaxprm.objectives.Objective", find_objective, "user_objective:number"
    )
    refused("'other' does not exist in .*user_objective.py", find_objective, "user_objective:other")
    refused("no module 'no_such_module_x'", find_objective, "no_such_module_x:mine")


@pytest.mark.parametrize("name", ["agentprm", "Mine", "a:b", ""])
def test_a_built_in_or_unusable_name_is_not_registered(registry, name):
    before = dict(registry)
    refused("objective name", register, Objective(name=name, targets=half_targets, card_text=""))
    assert registry == before


def test_the_record_decides_about_states_target_network_and_beta(registry):
    register(HALF)
    settings = {"bootstrap": "state", "target_update": "ema", "beta": 2.0}
    for name, used in (("agentprm", True), ("pvm", False), ("half", False)):
        model = config.RewardModelConfig(label="x", objective=name, **settings)
        assert reads_states(model) == has_target_network(model) == used, name
        assert progress_beta(model) == (2.0 if used else 0.0)
    register(Objective(name="bootstrapping", targets=half_targets, card_text="", bootstraps=True))
    model = config.RewardModelConfig(label="x", objective="bootstrapping", **settings)
    assert reads_states(model) and has_target_network(model) and progress_beta(model) == 0.0


def test_configs_and_the_registry_are_loaded_without_jax():
    code = (
        "import sys; from jaxprm import config, objectives; config.load('configs/textcraft_tiny.py'); "
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


GOOD = {"beta": 1.0, "gae_lambda": 0.95, "discount": 1.0}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("agentprm", {}),
        ("agentprm", {"beta": 0.0, "discount": 0.9, "dense_rewards": True}),
        ("agentprm", {"gae_lambda": 0.0, "bootstrap": "next", "progress_gradient": "previous"}),
        ("pvm", {"beta": 0.0, "gae_lambda": 0.0}),
        ("orm", {"beta": 0.0}),
    ],
)
def test_settings_that_can_be_trained_pass(name, changes):
    check_objective(name, **(GOOD | changes))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("agentprm", {"discount": 0.9}, "beta is 1.0 with discount 0.9.*set beta to 0"),
        ("agentprm", {"dense_rewards": True}, "beta is 1.0 with rewards before the last step"),
        ("orm", {}, "beta is 1.0 with objective orm"),
        ("pvm", {}, "beta is 1.0 with objective pvm"),
        ("agentprm", {"gae_lambda": 0.0}, "gae_lambda is 0 with bootstrap action"),
        ("agentprm", {"gae_lambda": 1.2}, r"gae_lambda is 1.2: it must be in \[0, 1\]"),
        ("agentprm", {"discount": float("nan")}, "discount is nan"),
        ("agentprm", {"beta": -1.0}, "beta is -1.0"),
        ("agentprm", {"beta": float("nan")}, "beta is nan"),
        ("prm", {}, f"objective is 'prm': use one of {', '.join(objectives.OBJECTIVES)}"),
        ("agentprm", {"bootstrap": "none"}, "bootstrap is 'none'"),
        ("agentprm", {"progress_gradient": "next"}, "progress_gradient is 'next'"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_in_one_line(name, changes, message):
    refused(message, check_objective, name, **(GOOD | changes))


def test_settings_of_a_reward_model_are_checked_with_all_their_fields():
    """lambda 0 teaches nothing with bootstrap "action" only; beta of a baseline counts as 0."""
    check_settings(config.RewardModelConfig(label="x", gae_lambda=0.0, bootstrap="next"))
    check_settings(config.RewardModelConfig(label="x", objective="pvm"), dense_rewards=True)
    refused("gae_lambda is 0", check_settings, config.RewardModelConfig(label="x", gae_lambda=0.0))
    refused("rewards before the last step", check_settings, config.RewardModelConfig(label="x"), dense_rewards=True)
