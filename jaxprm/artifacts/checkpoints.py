"""Orbax checkpoints of a training run: writing and restoring them, reading parameters only, and inspecting them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp

from data_pipeline import typed_json
from data_pipeline.errors import shown
from jaxprm.artifacts.directory import find_checkpoint
from jaxprm.errors import UserError

_NEWER = "a running training run may have deleted it: give a newer checkpoint"
# Parts of a training state that `inspect` has a fingerprint of.
PARTS = ("parameters", "optimizer", "target")

# Orbax logs every phase of every save and restore at level INFO.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one training run: the last `keep_latest`, and the `keep_best` with the least validation loss.

    Args:
        identity: fingerprints that a checkpoint must agree with to be resumed from.
        config: stored in the checkpoint for `inspect`.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict[str, Any],
        *,
        keep_latest: int = 2,
        keep_best: int = 0,
        config: dict[str, Any] | None = None,
    ):
        def loss(metrics: dict[str, float]) -> float:
            return metrics["validation_loss"]

        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            # A checkpoint is kept if either policy keeps it: the latest must survive even if it is not among the best.
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_latest), best]),
            best_fn=loss,
            best_mode="min",
            enable_async_checkpointing=True,
            # What a killed process left unfinished is removed when the next one starts.
            cleanup_tmp_directories=True,
        )
        # The manager reads the metadata of every checkpoint that is there.
        with _broken_files(directory, "delete the broken checkpoint in it"):
            self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)
        self._meta = {"identity": identity, "config": config or {}}
        self._directory = directory

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict] | None:
        """(step, state, data position) of the newest checkpoint, or None; `abstract_state` has shapes and shardings.

        The mesh may differ from that of the run that saved it.

        Raises UserError if the identity differs (another config, data set or tokenizer), and for a broken checkpoint.
        """
        step = self.latest_step()
        if step is None:
            return None
        checkpoint = self._directory / str(step)
        # Before the state: Orbax would silently cut or pad arrays of another config.
        meta = _read_meta(checkpoint)
        for name, value in self._meta["identity"].items():
            if meta.identity.get(name) != value:
                raise UserError(
                    f"checkpoint {checkpoint}: its {name} differs from this run's; use another work directory or --redo"
                )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        with _broken_files(checkpoint, "delete it: the run then resumes from the one before"):
            restored = self._manager.restore(step, args=arguments)
        return step, restored["state"], meta.position

    def save(self, step: int, state: Any, position: dict, *, validation_loss: float | None = None) -> None:
        """Writes a checkpoint in the background, unless there is one of this step.

        An unfinished write is not visible as a checkpoint.

        Args:
            position: of the input pipeline; any JSON object.
            validation_loss: of this state. A checkpoint without it cannot be among the best.

        Raises OSError (ENOSPC), here or in the next call, if the disk is full.
        """
        # One Composite: state and data position are committed together, so a resumed run continues with the same batch.
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(self._meta | {"position": position})
        )
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        with self._full_disk():
            if step != self.latest_step():
                self._manager.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Blocks until the last write is complete."""
        with self._full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Blocks until the last write is complete, and releases the manager."""
        self.wait()
        with self._full_disk():
            self._manager.close()

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Raises OSError (ENOSPC) for a full disk."""
        # Orbax reports storage errors of its background thread as ValueError. Users can fix only this one.
        try:
            yield
        except ValueError as error:
            if "No space left on device" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "No space left on device", str(self._directory)) from error


class _Meta(msgspec.Struct):
    """What is stored with a state: see `Checkpoints`."""

    identity: dict[str, Any]
    position: dict[str, Any]
    config: dict[str, Any] = {}


def _read_meta(checkpoint: Path) -> _Meta:
    path = checkpoint / "meta" / "metadata"
    with _broken_files(checkpoint, _NEWER):
        return typed_json.read(path, _Meta, fix=_NEWER, error=UserError)


@contextmanager
def _broken_files(checkpoint: Path, fix: str) -> Iterator[None]:
    """Raises what Orbax raises for missing or broken files as a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore check little: any class may come of a wrong byte
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"checkpoint {checkpoint}: cannot be read ({shown(reason)[1:-1]}); {fix}") from error


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state of arrays, for `Checkpoints.restore`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def read_parameters(directory: Path, shapes: Any, shardings: Any = None) -> Any:
    """The parameters of a checkpoint; optimizer and target network are not read.

    Args:
        shapes: tree of their shapes and dtypes.
        shardings: a tree like `shapes`; None puts everything on the first device.

    Raises UserError if the checkpoint has parameters of other shapes, or cannot be read.
    """
    # Not by a CheckpointManager: it would remove the unfinished writes of a training run that is still running.
    if shardings is None:
        first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda leaf: first_device, shapes)
    expected = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    item = {"parameters": expected}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    state, handler = (directory / "state").absolute(), ocp.PyTreeCheckpointHandler()
    with _broken_files(directory, _NEWER):
        _check_shapes(handler.metadata(state).tree["parameters"], expected, directory)
        return handler.restore(state, args=arguments)["parameters"]


def _check_shapes(saved: Any, expected: Any, directory: Path) -> None:
    """Raises UserError unless both trees have the same parameters with the same shapes."""
    # Orbax silently cuts or pads an array of another shape.
    saved_shapes, expected_shapes = _shapes(saved), _shapes(expected)
    for name in sorted(saved_shapes.keys() | expected_shapes.keys()):
        if saved_shapes.get(name) != expected_shapes.get(name):
            raise UserError(
                f"checkpoint {directory}: parameter {name} has shape {saved_shapes.get(name)}, but its config.json "
                f"means {expected_shapes.get(name)}; it belongs to another model"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted path, with or without the `value` of an nnx.Param at its end."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [[str(getattr(key, "key", getattr(key, "name", key))) for key in path] for path, _ in leaves]
    return {
        ".".join(path[:-1] if path[-1] == "value" else path): tuple(leaf.shape)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    }


def inspect(directory: str | Path) -> dict[str, Any]:
    """Step, fingerprints, sizes, shardings, data position and config of a checkpoint; see `find_checkpoint`.

    A fingerprint is the sha256 over the name, dtype, shape and bytes of every array of a part, in the order of names.
    It does not depend on the mesh: states with equal fingerprints are equal bit for bit. One array is in memory at a
    time.

    Returns:
        {"checkpoint", "step", "fingerprints": {"parameters", "optimizer", "target"?}, "sizes": {part: {"arrays",
        "numbers", "bytes"}}, "shardings": {name: {"shape", "dtype", "split"}}, "position", "identity", "config"}
    """
    path = find_checkpoint(Path(directory)).absolute()  # Orbax cannot read a relative path
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about metadata that only a manager's folder has
    with _broken_files(path, _NEWER), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path / "state").item_metadata.tree
        leaves = dict(_leaves(tree))
        digests = {part: hashlib.sha256() for part in PARTS if any(name[0] == part for name in leaves)}
        sizes = {part: {"arrays": 0, "numbers": 0, "bytes": 0} for part in digests}
        for name in sorted(leaves):
            if name[0] not in digests:
                continue
            array = _read(reader, path / "state", tree, name)
            head = json.dumps(["/".join(name), str(array.dtype), list(array.shape)])
            digests[name[0]].update(head.encode() + b"\n" + np.ascontiguousarray(array).tobytes())
            size = sizes[name[0]]
            size["arrays"], size["numbers"] = size["arrays"] + 1, size["numbers"] + array.size
            size["bytes"] += array.nbytes
    meta = _read_meta(path)
    return {
        "checkpoint": str(path),
        "step": int(path.name),
        "fingerprints": {part: digest.hexdigest() for part, digest in digests.items()},
        "sizes": sizes,
        "shardings": {"/".join(name): _sharding(leaf) for name, leaf in sorted(leaves.items())},
        "position": meta.position,
        "identity": meta.identity,
        "config": meta.config,
    }


def summary(inspection: dict[str, Any]) -> str:
    """The result of `inspect` as text for a terminal, without the list of arrays."""
    lines = [f"checkpoint   {inspection['checkpoint']}", f"step         {inspection['step']}"]
    for part, digest in inspection["fingerprints"].items():
        size = inspection["sizes"][part]
        counts = f"{size['arrays']} arrays, {size['numbers']:,} numbers, {size['bytes']:,} bytes"
        lines.append(f"{part:<12} {digest}  {counts}")
    split = sum(bool(sharding["split"]) for sharding in inspection["shardings"].values())
    lines.append(f"sharding     {split} of {len(inspection['shardings'])} arrays are split")
    for name in ("position", "identity", "config"):
        lines.append(f"{name:<12} {json.dumps(inspection[name])}")
    return "\n".join(lines)


def _leaves(tree: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, metadata) of every array in a tree of metadata."""
    if isinstance(tree, dict):
        for name, node in tree.items():
            yield from _leaves(node, (*parents, str(name)))
    elif isinstance(tree, (list, tuple)):
        for index, node in enumerate(tree):
            yield from _leaves(node, (*parents, str(index)))
    elif getattr(tree, "shape", None) is not None:
        yield parents, tree
    elif isinstance(tree, ocp.metadata.value.Metadata):
        # Orbax leaves out an array that the metadata say to skip; a fingerprint without it would seem complete.
        raise ValueError(f"the metadata do not describe the array {'/'.join(parents)}")


def _read(reader: ocp.Checkpointer, path: Path, tree: Any, name: tuple[str, ...]) -> np.ndarray:
    """One array in its stored dtype, unsharded and on the host; the others are not read."""
    item = _only(tree, name)
    options = ocp.args.PyTreeRestore(
        item=item, restore_args=_map(item, ocp.RestoreArgs(restore_type=np.ndarray)), partial_restore=True
    )
    (array,) = (leaf for _, leaf in _leaves(reader.restore(path, args=options)))
    return array


def _only(tree: Any, name: tuple[str, ...]) -> Any:
    """The tree with only the array of that name. Lists keep their length, since Orbax matches them by index."""
    if not name:
        return tree
    if isinstance(tree, dict):
        key = next(key for key in tree if str(key) == name[0])
        return {key: _only(tree[key], name[1:])}
    return [_only(node, name[1:]) if str(index) == name[0] else None for index, node in enumerate(tree)]


def _map(tree: Any, value: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(node, value) for key, node in tree.items()}
    if isinstance(tree, list):
        return [_map(node, value) for node in tree]
    return None if tree is None else value


def _sharding(leaf: Any) -> dict[str, Any]:
    """Shape, dtype, and for each axis the mesh axes, with their sizes, that it was split over when it was saved."""
    sharding = leaf.sharding
    sizes = np.ravel(getattr(sharding, "shape", ())).tolist()
    mesh_axes = dict(zip(getattr(sharding, "axis_names", ()), sizes, strict=True))
    spec = [axes if isinstance(axes, (list, tuple)) else [axes] for axes in getattr(sharding, "partition_spec", ())]
    split = [{str(axis): mesh_axes[axis] for axis in axes if axis is not None and mesh_axes[axis] > 1} for axes in spec]
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype)), "split": split if any(split) else []}
