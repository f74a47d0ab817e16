"""Loads a reward model for scoring, and turns promises into the step tables that users read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.encode import Encoder, Reasoning, SpecialTokens
from jaxprm import config as config_lib
from jaxprm.artifacts.directory import files_of, is_checkpoint, read_recipe
from jaxprm.errors import UserError
from jaxprm.hf import reader
from jaxprm.hf.safetensors import open_tensors
from jaxprm.hf.writer import DTYPES
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import Shapes, TurnTokens
from jaxprm.model.sharding import ONE_DEVICE, Layout, make_mesh
from jaxprm.objectives import OBJECTIVES
from jaxprm.scoring.scorer import Scorer


def load_reward_model(
    model: Path, *, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[TransformerConfig, Any]:
    """(config, parameters) of a Hugging Face directory or a checkpoint.

    Args:
        dtype: of the parameters of a directory; by default bfloat16 if all are stored in it, else float32. Those of a
            checkpoint are always float32.
        mesh: devices that the parameters are sharded over, as in training.

    Raises UserError if the model does not divide over the mesh.
    """
    parameter_shardings = None
    if mesh is not None:
        from jaxprm.model import sharding

        config = dataclasses.replace(reader.read_config(files_of(model))[0], tie_embeddings=True)
        sharding.check_model(mesh, config)
        parameter_shardings = sharding.shardings(sharding.with_shardings(mesh, reader.abstract(config, reward=True)))
    if not is_checkpoint(model):
        if dtype is None:
            # Weights in bfloat16 stay so in memory, whatever the arithmetic is done in.
            stored = {tensor.dtype for tensor in open_tensors(model).values()}
            dtype = jnp.bfloat16 if stored == {"BF16"} else jnp.float32
        return reader.load_reward_model(model, dtype=dtype, shardings=parameter_shardings)
    from jaxprm.artifacts.checkpoints import read_parameters  # Orbax takes two seconds to import

    config, _ = reader.read_config(files_of(model))
    # Trained without an unembedding, whatever its base had.
    config = dataclasses.replace(config, tie_embeddings=True)
    return config, read_parameters(model, reader.abstract(config, reward=True), parameter_shardings)


def load_encoder(
    model: Path,
    template: str | None = None,
    *,
    reasoning: Reasoning | None = None,
    special_tokens: SpecialTokens | None = None,
) -> Encoder:
    """The encoder of a model.

    Args:
      template: a chat template in place of the model's own, as in Encoder.load.
      reasoning, special_tokens: as in Encoder.load; by default as the model was trained. `drop` fits every model whose
        template prints no reasoning.

    Raises UserError if it differs from the encoder that the model was trained with.
    """
    recipe = read_recipe(model)
    trained_reasoning = recipe.get("reasoning", "keep")
    encoder = Encoder.load(
        files_of(model),
        template,
        reasoning=reasoning or trained_reasoning,
        special_tokens=special_tokens or recipe.get("special_tokens", "error"),
    )
    # A model from elsewhere has no recipe, and nothing to compare with. One whose template prints no reasoning was
    # trained on none: to drop it changes nothing that the model knows.
    is_same = encoder.reasoning == trained_reasoning or (encoder.reasoning == "drop" and not encoder.prints_reasoning)
    if recipe and not is_same:
        raise UserError(
            f"model {model}: trained with --reasoning {trained_reasoning}, so its promises are about conversations "
            f"like these; leave --reasoning {reasoning} out"
        )
    fingerprint = encoder.fingerprint_with(trained_reasoning)
    trained_with = recipe.get("fingerprints", {}).get("tokenizer", fingerprint)
    if trained_with != fingerprint:
        raise UserError(
            f"model {model}: trained with tokenizer {trained_with[:12]}, but its directory has "
            f"{fingerprint[:12]}; put the tokenizer.json and the chat template of the training run there, "
            "or leave --chat-template out"
        )
    return encoder


def load_scorer(
    model: Path,
    *,
    rows: int = 8,
    max_tokens: int = 2048,
    dtype: str = "float32",
    template: str | None = None,
    reasoning: Reasoning | None = None,
    special_tokens: SpecialTokens | None = None,
    mesh: config_lib.MeshConfig | None = None,
    shapes: Shapes = Shapes(),
) -> Scorer:
    """The scorer of a model directory or checkpoint, as returned by `find_model`.

    Args:
      rows, max_tokens, dtype: as in Scorer.
      template, reasoning, special_tokens: as in `load_encoder`.
      mesh: devices of this process that share the work; None is the first device alone.
      shapes: lengths to compile for, widened if the model was trained on longer turns.

    Raises UserError for an unknown dtype, a mesh that does not fit, and a model whose tokenizer is not its own.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    encoder = load_encoder(model, template, reasoning=reasoning, special_tokens=special_tokens)
    layout = ONE_DEVICE
    if mesh is not None:
        # This process's devices: in a run of several processes, process 0 scores alone.
        layout = Layout(make_mesh(mesh, jax.local_devices()))
    config, parameters = load_reward_model(model, mesh=layout.mesh)
    reader.check_vocabulary(model, config, encoder.vocabulary_size)
    # Turns longer than the shapes would be encoded again with their whole conversation.
    if turns := read_turn_tokens(model):
        shapes = shapes.for_turns(**turns)
    return Scorer(
        config, parameters, encoder, rows=rows, max_tokens=max_tokens, dtype=dtype, shapes=shapes, layout=layout
    )


def read_turn_tokens(model: Path) -> dict[str, TurnTokens]:
    """{"action", "observation"}: lengths of the turns that a model was trained on; {} if its recipe has none.

    Raises UserError if the recipe is malformed.
    """
    turns = read_recipe(model).get("turn_tokens")
    roles = ("action", "observation") if turns else ()
    return {role: TurnTokens(turns[role]["median"], turns[role]["most"]) for role in roles}


def all_devices() -> config_lib.MeshConfig | None:
    """The default mesh of commands: rows are split over all devices of this process. None if there is only one."""
    return config_lib.MeshConfig() if jax.local_device_count() > 1 else None


def defines_progress(recipe: dict[str, Any]) -> bool:
    """Whether a model's progress is the difference of neighbouring promises, which holds without discounting only."""
    return recipe.get("targets", {}).get("discount", 1.0) == 1.0


def predicts_outcomes(recipe: Mapping[str, Any]) -> bool:
    """Whether a model's promises are expected outcomes. Those of a model of pairs only order the actions of a state."""
    name = recipe.get("objective", "")
    if name in OBJECTIVES:
        return OBJECTIVES[name].supervision != "pairs"
    # An objective from outside the package: the recipe of a model of pairs, and no other, has no range.
    return not name or "value_range" in recipe


def step_table(messages: Sequence[int] | np.ndarray, promises: np.ndarray, *, progress: bool) -> dict[str, Any]:
    """{"steps": [{"message", "promise", "progress"}], "score"} from message indices [S] and promises [S].

    The score is the last promise. Progress is null for the first step, and for all steps without `progress`.

    Raises UserError for promises that are not finite.
    """
    check_finite(promises)
    gains = [None, *(shortest_float(gain) for gain in np.diff(promises))] if progress else [None] * len(promises)
    steps = [
        {"message": int(message), "promise": shortest_float(promise), "progress": gain}
        for message, promise, gain in zip(messages, promises, gains, strict=True)
    ]
    return {"steps": steps, "score": steps[-1]["promise"]}


def check_finite(values: np.ndarray) -> None:
    """Raises UserError for scores that are not finite."""
    if not np.isfinite(values).all():
        raise UserError("the model's scores are not finite; its weights are broken")


def shortest_float(value: np.floating) -> float:
    """The shortest decimal that is this float32, in place of the sixteen digits of its double."""
    return float(str(np.float32(value)))
