"""A user's objective, defined outside the package, trained by registered name and by "module:attribute"."""

from __future__ import annotations

import json

import msgspec
import numpy as np

from jaxprm import config, files, objectives
from jaxprm.export.model_card import model_card
from jaxprm.objectives import Objective, register
from jaxprm.targets import outcomes
from jaxprm.training.train import train_reward_model

USER_MODULE = """
import jax.numpy as jnp
from jaxprm.losses import LossSums
from jaxprm.objectives import Objective
from jaxprm.targets import returns_to_go


def failures(values, rewards, is_last, valid, settings, state_values):
    return 1 - returns_to_go(rewards, is_last, valid), valid


def absolute_errors(values, targets, is_first, mask, weights, settings):
    weights = jnp.where(mask, weights, 0)
    errors = jnp.abs(jnp.where(mask, values - targets, 0))
    return LossSums(jnp.sum(weights * errors), jnp.zeros(()), jnp.sum(weights))


objective = Objective(name="failures", targets=failures, card_text="the chance of failure", loss=absolute_errors)
"""


def last_outcomes(values, rewards, is_last, valid, settings, state_values):
    """Twice the outcome, at the last step: a target range that no built-in objective has."""
    return 2 * outcomes(rewards, is_last, valid), valid & is_last


def train(toy, output, **changes):
    """(losses by step, reward_model.json) of a run with these settings, and its experiment through a config.json."""
    settings = toy.settings(epochs=2, **changes)
    experiment = msgspec.structs.replace(toy.experiment, reward_models=(settings,))
    experiment = config.from_dict(config.to_dict(experiment), where="config.json")
    model = train_reward_model(
        experiment, experiment.reward_models[0], 0, shards=toy.shards, base=toy.base, output=output
    )
    losses = [line["loss"] for line in files.read_lines(output / "metrics.jsonl") if "loss" in line]
    return losses, json.loads((model / "reward_model.json").read_text())


def test_a_registered_objective_is_trained_and_its_loss_falls(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    register(Objective(name="doubled", targets=last_outcomes, card_text="twice the outcome"))
    losses, recipe = train(toy, tmp_path, objective="doubled")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    lines = [line for line in files.read_lines(tmp_path / "metrics.jsonl") if "target_mean" in line]
    assert max(line["target_mean"] for line in lines) > 1  # of outcomes in [0, 1]
    assert all(line["progress_loss"] >= 0 for line in lines) and recipe["targets"]["beta"] == 0.0
    assert recipe["objective"] == "doubled" and recipe["objective_text"] == "twice the outcome"


def test_an_objective_of_a_module_is_trained_with_its_own_loss(toy, tmp_path, monkeypatch):
    (tmp_path / "user_failures.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    losses, recipe = train(toy, tmp_path / "run", objective="user_failures:objective")
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert recipe["objective"] == "user_failures:objective"
    # The card has the recorded text: a later process need not have the module.
    config_json = json.loads((tmp_path / "run/model/config.json").read_text())
    assert "- Target: the chance of failure" in model_card(recipe, config_json, {}, None)
