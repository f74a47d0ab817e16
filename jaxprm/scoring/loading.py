"""From a directory or a checkpoint to a reward model ready to score, and from promises to the steps a user reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from data_pipeline.encode import Encoder
from jaxprm import config as config_lib
from jaxprm.artifacts.directory import RECIPE, files_of, is_checkpoint, read_recipe
from jaxprm.errors import UserError
from jaxprm.hf import reader
from jaxprm.hf.safetensors import open_tensors
from jaxprm.hf.writer import DTYPES
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import Shapes, TurnTokens
from jaxprm.model.sharding import ONE_DEVICE, Layout
from jaxprm.scoring.scorer import Scorer

_Count = Annotated[int, msgspec.Meta(ge=0)]


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
    places = None
    if mesh is not None:
        from jaxprm.model import sharding

        config = dataclasses.replace(reader.read_config(files_of(model))[0], tie_embeddings=True)
        sharding.check_model(mesh, config)
        places = sharding.shardings(sharding.with_shardings(mesh, reader.abstract(config, reward=True)))
    if not is_checkpoint(model):
        if dtype is None:
            stored = {tensor.dtype for tensor in open_tensors(model).values()}
            dtype = jnp.bfloat16 if stored == {"BF16"} else jnp.float32
        return reader.load_reward_model(model, dtype=dtype, shardings=places)
    from jaxprm.artifacts.checkpoints import read_parameters  # Orbax takes two seconds to import

    config, _ = reader.read_config(files_of(model))
    # Trained without an unembedding, whatever its base had.
    config = dataclasses.replace(config, tie_embeddings=True)
    return config, read_parameters(model, reader.abstract(config, reward=True), places)


def load_encoder(model: Path, template: str | None = None) -> Encoder:
    """A model's encoder, with a chat template that is not its own where one is chosen, as in Encoder.load.

    Raises UserError where it is not the one the model was trained with.
    """
    encoder = Encoder.load(files_of(model), template)
    trained_with = read_recipe(model).get("fingerprints", {}).get("tokenizer", encoder.fingerprint)
    if trained_with != encoder.fingerprint:
        raise UserError(
            f"model {model}: trained with tokenizer {trained_with[:12]}, beside it lies "
            f"{encoder.fingerprint[:12]}; put tokenizer.json and the chat template it was trained with beside it"
        )
    return encoder


def load_scorer(
    model: Path,
    *,
    rows: int = 8,
    max_tokens: int = 2048,
    dtype: str = "float32",
    template: str | None = None,
    mesh: config_lib.MeshConfig | None = None,
    shapes: Shapes = Shapes(),
) -> Scorer:
    """The scorer of a model that `find_model` found, computing in `dtype`; template: as in `load_encoder`.

    mesh: the devices of this process that share the work; None is the first of them. shapes: what is compiled for, or
    wider where the model was trained on longer turns.

    Raises UserError where model and tokenizer do not belong together.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    encoder = load_encoder(model, template)
    layout = ONE_DEVICE
    if mesh is not None:
        from jaxprm.model.sharding import make_mesh

        layout = Layout(make_mesh(mesh, jax.local_devices()))
    config, parameters = load_reward_model(model, mesh=layout.mesh)
    reader.check_vocabulary(model, config, encoder.vocabulary_size)
    if turns := read_turn_tokens(model):
        shapes = shapes.for_turns(**turns)
    options = {"rows": rows, "max_tokens": max_tokens, "dtype": dtype, "shapes": shapes, "layout": layout}
    return Scorer(config, parameters, encoder, **options)


def read_turn_tokens(model: Path) -> dict[str, TurnTokens]:
    """{"action", "observation"} of what a model was trained on; {} where its recipe does not say."""
    found = read_recipe(model).get("turn_tokens")
    if found is None:
        return {}
    try:
        turns = msgspec.convert(found, dict[Literal["action", "observation"], dict[Literal["median", "most"], _Count]])
        return {name: TurnTokens(turns[name]["median"], turns[name]["most"]) for name in ("action", "observation")}
    except (msgspec.ValidationError, KeyError, TypeError):
        raise UserError(
            f"{files_of(model) / RECIPE}: turn_tokens must have median and most, whole numbers, of action and "
            f"observation, found {str(found)[:200]}"
        ) from None


def all_devices() -> config_lib.MeshConfig | None:
    """The mesh of what computes much and was told no other: rows go to all devices of this process."""
    return config_lib.MeshConfig() if jax.local_device_count() > 1 else None


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
