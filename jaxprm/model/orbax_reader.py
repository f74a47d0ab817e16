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


def read_parameters(directory: Path, shapes: Any) -> Any:
    """The parameters of a checkpoint, as its directory holds them and nothing else of it, on this process' device.

    shapes: their tree with shapes and dtypes. The run's own `Checkpoints` would tidy up what a live training is
    writing; this touches nothing.

    Raises UserError for parameters of other shapes, and for a checkpoint that is gone before it is read.
    """
    import orbax.checkpoint as ocp  # two seconds, for those who read no checkpoint

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    item = {"parameters": wanted}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    state = (directory / "state").absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            _check_shapes(checkpointer.metadata(state).item_metadata.tree["parameters"], wanted, directory)
            return checkpointer.restore(state, args=arguments)["parameters"]
    except (FileNotFoundError, KeyError) as error:
        raise UserError(
            f"checkpoint {directory}: cannot be read ({error}); a training that goes on keeps its last checkpoints "
            "only: name a newer one"
        ) from None


def _check_shapes(found: Any, wanted: Any, directory: Path) -> None:
    """Restoring would cut or pad an array of another shape without a word."""
    saved = {_path(path[:-1]): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    needed = {_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    for name in sorted(saved.keys() | needed.keys()):
        if saved.get(name) != needed.get(name):
            raise UserError(
                f"checkpoint {directory}: parameter {name} has shape {saved.get(name)}, its config.json means "
                f"{needed.get(name)}; it belongs to another model"
            )


def _path(keys: tuple) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)
