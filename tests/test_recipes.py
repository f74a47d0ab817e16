"""The shipped recipes of the paper have its settings, and differ only in the model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from jaxprm import config

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER = {
    "paper_qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "paper_qwen2_5_3b": "Qwen/Qwen2.5-3B-Instruct",
    "paper_qwen2_5_7b": "Qwen/Qwen2.5-7B-Instruct",
    "paper_llama3_1_8b": "meta-llama/Llama-3.1-8B-Instruct",
}


def test_every_recipe_of_the_paper_is_tested():
    assert {path.stem for path in CONFIGS.glob("paper_*.py")} == set(PAPER)


@pytest.mark.parametrize("name, base_model", PAPER.items())
def test_a_recipe_has_the_papers_settings(name, base_model):
    """Values copied by hand from docs/method.md, sections 3, 6 and 7."""
    experiment = config.load(CONFIGS / f"{name}.py")
    assert experiment.name == name and experiment.base_model == experiment.policy.endpoint.model == base_model
    assert (experiment.collection.trajectories_per_task, experiment.collection.temperature) == (16, 1.0)
    assert (experiment.search.temperature, experiment.search.beams) == (0.7, ((2, 2), (4, 4), (8, 8)))
    assert {8, 16, 32, 64} <= set(experiment.search.best_of_n)
    assert {model.label: (model.objective, model.beta) for model in experiment.reward_models} == {
        "agentprm": ("agentprm", 1.0),
        "agentprm_no_progress": ("agentprm", 0.0),
        "pvm": ("pvm", 0.0),
        "orm": ("orm", 0.0),
    }
    for model in experiment.reward_models:
        assert (model.gae_lambda, model.discount, model.epochs, model.learning_rate) == (0.95, 1.0, 5, 1e-6)
    assert (
        experiment.environment.name == "textcraft" and not experiment.environment.arguments
    )  # AgentGym's: 10 distractors


def test_the_recipes_differ_only_in_the_model():
    plain = []
    for name in PAPER:
        experiment = config.to_dict(config.load(CONFIGS / f"{name}.py"))
        experiment["policy"]["endpoint"].pop("model")
        plain.append({key: value for key, value in experiment.items() if key not in ("name", "base_model")})
    assert all(settings == plain[0] for settings in plain)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_docstring_of_every_config_has_its_command(path):
    experiment = config.load(path)
    assert f"configs/{path.name}" in (path.read_text(encoding="utf-8").split('"""')[1])
    assert config.from_dict(msgspec.to_builtins(experiment, str_keys=True), where=path.name) == experiment
