"""Orbax checkpoints of a training run: written with the data position, read back on any mesh, inspected."""

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
import numpy as np
import orbax.checkpoint as ocp

from jaxprm.artifacts.directory import find_checkpoint
from jaxprm.errors import UserError

logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one run: the latest `keep_latest`, and the `keep_best` of the smallest validation loss.

    `identity` is what a checkpoint must agree with to be resumed from; `config` is written beside it, to be read.
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
            # Either is enough to be kept, so the latest is never deleted for not being among the best.
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_latest), best]),
            best_fn=loss,
            best_mode="min",
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)
        self._meta = {"identity": identity, "config": config or {}}
        self._directory = directory

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict] | None:
        """(step, state, data position) of the newest checkpoint, laid out like `abstract_state`; None if there is none.

        Raises UserError when the checkpoint belongs to another config, data set or tokenizer.
        """
        step = self.latest_step()
        if step is None:
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        for name, value in self._meta["identity"].items():
            if meta["identity"].get(name) != value:
                raise UserError(
                    f"checkpoint {self._directory}/{step}: its {name} differs from this run's; "
                    "use another work directory or --redo"
                )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))
        return step, restored["state"], meta["position"]

    def save(self, step: int, state: Any, position: dict, *, validation_loss: float | None = None) -> None:
        """Writes in the background; an unfinished write is never visible as a checkpoint. A step is written once.

        validation_loss: of this state, where it was measured; only such a checkpoint can be among the best.

        Raises OSError (ENOSPC), here or in the next call, when the disk is full.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(self._meta | {"position": position})
        )
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        with self._full_disk():
            if step != self.latest_step():
                self._manager.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Returns when the last write is committed."""
        with self._full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last write."""
        self.wait()
        with self._full_disk():
            self._manager.close()

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Storage errors arrive as ValueError from a background thread; a full disk is one that users can mend."""
        try:
            yield
        except ValueError as error:
            if "No space left on device" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "No space left on device", str(self._directory)) from error


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state, to restore into."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


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


PARTS = ("parameters", "optimizer", "target")
_BELOW = ("checkpoints", "seed-*/checkpoints", "*/seed-*/checkpoints", "reward_models/*/seed-*/checkpoints")


def inspect(directory: str | Path) -> dict[str, Any]:
    """Step, fingerprints, sizes, shardings, data position and config of a checkpoint.

    A fingerprint is the sha256 over every array of a part, by name: its name, dtype, shape and bytes. It does not
    depend on the mesh, and two runs that agree in it agree to the last bit. One array at a time is read.

    Returns:
        {"checkpoint", "step", "fingerprints": {"parameters", "optimizer", "target"?}, "sizes": {part: {"arrays",
        "numbers", "bytes"}}, "shardings": {name: {"shape", "dtype", "split"}}, "position", "identity", "config"}
    """
    path = find_checkpoint(Path(directory)).absolute()  # Orbax finds nothing under a relative path
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of metadata that only a manager's folder has
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
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
    meta = json.loads((path / "meta" / "metadata").read_text())
    return {
        "checkpoint": str(path),
        "step": int(path.name),
        "fingerprints": {part: digest.hexdigest() for part, digest in digests.items()},
        "sizes": sizes,
        "shardings": {"/".join(name): _placed(leaf) for name, leaf in sorted(leaves.items())},
        "position": meta["position"],
        "identity": meta["identity"],
        "config": meta.get("config", {}),
    }


def summary(found: dict[str, Any]) -> str:
    """`inspect` for a reader: the same without the arrays one by one."""
    lines = [f"checkpoint   {found['checkpoint']}", f"step         {found['step']}"]
    for part, digest in found["fingerprints"].items():
        size = found["sizes"][part]
        counts = f"{size['arrays']} arrays, {size['numbers']:,} numbers, {size['bytes']:,} bytes"
        lines.append(f"{part:<12} {digest}  {counts}")
    split = sum(bool(one["split"]) for one in found["shardings"].values())
    lines.append(f"sharding     {split} of {len(found['shardings'])} arrays are split")
    for name in ("position", "identity", "config"):
        lines.append(f"{name:<12} {json.dumps(found[name])}")
    return "\n".join(lines)


def _leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, metadata) of every array; nodes without any are left out."""
    if isinstance(tree, dict):
        for name, node in tree.items():
            yield from _leaves(node, (*above, str(name)))
    elif isinstance(tree, (list, tuple)):
        for index, node in enumerate(tree):
            yield from _leaves(node, (*above, str(index)))
    elif getattr(tree, "shape", None) is not None:
        yield above, tree


def _read(reader: ocp.Checkpointer, path: Path, tree: Any, name: tuple[str, ...]) -> np.ndarray:
    """One array as it is stored, whole and on the host; the others stay on the disk."""
    wanted = _only(tree, name)
    options = ocp.args.PyTreeRestore(
        item=wanted, restore_args=_map(wanted, ocp.RestoreArgs(restore_type=np.ndarray)), partial_restore=True
    )
    found = reader.restore(path, args=options)
    (array,) = (leaf for _, leaf in _leaves(found))
    return array


def _only(tree: Any, name: tuple[str, ...]) -> Any:
    """The tree without everything but the array of that name; lists keep their places."""
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


def _placed(leaf: Any) -> dict[str, Any]:
    """Shape, dtype, and the mesh axes with their sizes that each axis was split over when it was saved."""
    placed = leaf.sharding
    axes = getattr(placed, "partition_spec", ())
    sizes = dict(zip(getattr(placed, "axis_names", ()), np.ravel(getattr(placed, "shape", ())).tolist(), strict=True))
    named = [axis if isinstance(axis, (list, tuple)) else [axis] for axis in axes]
    split = [{str(one): sizes[one] for one in axis if one is not None and sizes[one] > 1} for axis in named]
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype)), "split": split if any(split) else []}
