"""The recipes that ship say what the paper says, and differ in nothing but the model."""

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


def test_every_recipe_of_the_paper_is_known():
    assert {path.stem for path in CONFIGS.glob("paper_*.py")} == set(PAPER)


@pytest.mark.parametrize("name, model", PAPER.items())
def test_a_recipe_has_the_papers_settings(name, model):
    """docs/method.md, sections 3, 6 and 7, by hand."""
    found = config.load(CONFIGS / f"{name}.py")
    assert found.name == name and found.base_model == found.policy.endpoint.model == model
    assert (found.collection.trajectories_per_task, found.collection.temperature) == (16, 1.0)
    assert (found.search.temperature, found.search.beams) == (0.7, ((2, 2), (4, 4), (8, 8)))
    assert {8, 16, 32, 64} <= set(found.search.best_of_n)
    assert {one.label: (one.objective, one.beta) for one in found.reward_models} == {
        "agentprm": ("agentprm", 1.0),
        "agentprm_no_progress": ("agentprm", 0.0),
        "pvm": ("pvm", 0.0),
        "orm": ("orm", 0.0),
    }
    for one in found.reward_models:
        assert (one.gae_lambda, one.discount, one.epochs, one.learning_rate) == (0.95, 1.0, 5, 1e-6)
    assert found.environment.name == "textcraft" and not found.environment.arguments  # AgentGym's: 10 distractors


def test_the_recipes_differ_in_the_model_alone():
    plain = []
    for name in PAPER:
        found = config.to_dict(config.load(CONFIGS / f"{name}.py"))
        found["policy"]["endpoint"].pop("model")
        plain.append({key: value for key, value in found.items() if key not in ("name", "base_model")})
    assert all(one == plain[0] for one in plain)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_opens_with_its_command(path):
    experiment = config.load(path)
    assert f"configs/{path.name}" in (path.read_text(encoding="utf-8").split('"""')[1])
    assert config.from_dict(msgspec.to_builtins(experiment, str_keys=True), where=path.name) == experiment
