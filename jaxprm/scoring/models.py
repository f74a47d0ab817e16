"""Where a reward model is found: a model directory, a training's output, or a whole work directory."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.encode import Encoder
from jaxprm.errors import UserError
from jaxprm.model import huggingface
from jaxprm.scoring.scorer import Scorer


def model_directory(path: str | Path) -> Path:
    """The directory in Hugging Face format that `path` means.

    Accepts that directory, a training's output (its model/), reward_models/<label> (its first seed), or a work
    directory (its agentprm, else its only label). Raises UserError saying what was looked for.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model {path}: no such directory")
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return path
    places = [path / "model", *sorted(path.glob("seed-*/model"))]
    labels = sorted((path / "reward_models").glob("*")) if (path / "reward_models").is_dir() else []
    labels = [one for one in labels if one.name == "agentprm"] or labels
    if len(labels) == 1:
        places += sorted(labels[0].glob("seed-*/model"))
    for place in places:
        if (place / "config.json").is_file():
            return place
    if len(labels) > 1:
        raise UserError(f"model {path}: holds {', '.join(one.name for one in labels)}; name one of reward_models/*")
    raise UserError(f"model {path}: no config.json and model.safetensors, here or in model/ or seed-*/model/")


def load_scorer(path: str | Path, **settings) -> Scorer:
    """A scorer for the reward model at `path`, with its own tokenizer and chat template."""
    directory = model_directory(path)
    config, parameters = huggingface.load_reward_model(directory)
    return Scorer(config, parameters, Encoder.load(directory), **settings)
