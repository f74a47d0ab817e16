"""Parameters of an Orbax checkpoint, read while the training that writes it may still be running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jaxprm.errors import UserError

# Beside OUTPUT/checkpoints: config, tokenizer and recipe of the model they belong to.
DESCRIPTION = "model-files"


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory is a checkpoint, finished, of a training run."""
    return (directory / "_CHECKPOINT_METADATA").is_file() and (directory / "state").is_dir()


def newest_checkpoint(directory: Path) -> Path | None:
    """The last finished checkpoint below OUTPUT/checkpoints; the training may still be running."""
    found = [one for one in directory.glob("*") if one.name.isdigit() and is_checkpoint(one)]
    return max(found, key=lambda one: int(one.name), default=None)


def read_parameters(directory: Path, shapes: Any, shardings: Any = None) -> Any:
    """The parameters of a checkpoint, as its directory holds them and nothing else of it, on this process' device.

    shapes: their tree with shapes and dtypes; shardings: a like tree, where they go instead. The run's own
    `Checkpoints` would tidy up what a live training is writing; this touches nothing.

    Raises UserError for parameters of other shapes, and for a checkpoint that is gone before it is read.
    """
    import orbax.checkpoint as ocp  # two seconds, for those who read no checkpoint

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda leaf: here, shapes) if shardings is None else shardings
    wanted = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)
    item = {"parameters": wanted}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    state, handler = (directory / "state").absolute(), ocp.PyTreeCheckpointHandler()
    try:
        _check_shapes(handler.metadata(state).tree["parameters"], wanted, directory)
        return handler.restore(state, args=arguments)["parameters"]
    except UserError:
        raise
    except (OSError, KeyError, ValueError) as error:  # the last is Orbax' word for a file that is missing or broken
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"checkpoint {directory}: cannot be read ({reason}); a training that goes on keeps its last checkpoints "
            "only: name a newer one"
        ) from None


def _check_shapes(found: Any, wanted: Any, directory: Path) -> None:
    """Restoring would cut or pad an array of another shape without a word."""
    saved, needed = _shapes(found), _shapes(wanted)
    for name in sorted(saved.keys() | needed.keys()):
        if saved.get(name) != needed.get(name):
            raise UserError(
                f"checkpoint {directory}: parameter {name} has shape {saved.get(name)}, its config.json means "
                f"{needed.get(name)}; it belongs to another model"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; a parameter's own box, `value`, is no part of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [[str(getattr(key, "key", getattr(key, "name", key))) for key in path] for path, _ in leaves]
    return {
        ".".join(path[:-1] if path[-1] == "value" else path): tuple(leaf.shape)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    }
