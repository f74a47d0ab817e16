"""From a directory to a reward model ready to score, and from promises to the steps a user reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data_pipeline.encode import Encoder
from jaxprm.errors import UserError
from jaxprm.model import huggingface
from jaxprm.scoring.scorer import Scorer

WEIGHTS, RECIPE = "model.safetensors", "reward_model.json"
# Everything a score depends on.
MODEL_FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", RECIPE)
_BELOW = ("model", "seed-*/model", "*/seed-*/model", "reward_models/*/seed-*/model")


def find_model(path: str | Path) -> Path:
    """The model's own directory: `path`, the model of a training output, or the only reward model of a run.

    Raises UserError where there is none, or where there are several to choose from.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model {path}: no such directory; give a trained or exported reward model")
    if (path / WEIGHTS).is_file():
        return path
    found = sorted({one for pattern in _BELOW for one in path.glob(pattern) if (one / WEIGHTS).is_file()})
    if not found:
        raise UserError(f"model {path}: no {WEIGHTS} there, and no trained reward model below it")
    if len(found) > 1:
        named = ", ".join(str(one) for one in found[:8]) + (", ..." if len(found) > 8 else "")
        raise UserError(f"model {path}: holds {len(found)} reward models, name one of them: {named}")
    return found[0]


def read_recipe(directory: Path) -> dict[str, Any]:
    """What reward_model.json says of a model; nothing where there is none."""
    path = directory / RECIPE
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def load_scorer(directory: Path, *, rows: int = 8, max_tokens: int = 2048) -> Scorer:
    """The scorer of a model's own directory. Raises UserError where model and tokenizer do not belong together."""
    config, parameters = huggingface.load_reward_model(directory)
    encoder = Encoder.load(directory)
    huggingface.check_vocabulary(directory, config, encoder.vocabulary_size)
    trained_with = read_recipe(directory).get("fingerprints", {}).get("tokenizer", encoder.fingerprint)
    if trained_with != encoder.fingerprint:
        raise UserError(
            f"model {directory}: trained with tokenizer {trained_with[:12]}, beside it lies "
            f"{encoder.fingerprint[:12]}; put tokenizer.json and the chat template it was trained with beside it"
        )
    return Scorer(config, parameters, encoder, rows=rows, max_tokens=max_tokens)


def defines_progress(recipe: dict[str, Any]) -> bool:
    """Progress is the difference of two neighbouring promises only where nothing is discounted between them."""
    return recipe.get("targets", {}).get("discount", 1.0) == 1.0


def step_table(messages: Sequence[int], promises: np.ndarray, *, progress: bool) -> dict[str, Any]:
    """{"steps": [{"message", "promise", "progress"}], "score"} from message indices and promises, [S] each.

    Progress is null for the first step, and for all where it is not defined; the score is the last promise.
    """
    if not np.isfinite(promises).all():
        raise UserError("the model's scores are not finite; its weights are broken")
    gains = [None, *(plain(gain) for gain in np.diff(promises))] if progress else [None] * len(promises)
    steps = [
        {"message": int(message), "promise": plain(promise), "progress": gain}
        for message, promise, gain in zip(messages, promises, gains, strict=True)
    ]
    return {"steps": steps, "score": steps[-1]["promise"]}


def plain(value: np.float32) -> float:
    """The shortest number that is this float32, not the sixteen digits of its double."""
    return float(str(np.float32(value)))
