"""What is in a checkpoint, without the model, the data or the mesh that made it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxprm.errors import UserError

PARTS = ("parameters", "optimizer", "target")
_BELOW = ("checkpoints", "seed-*/checkpoints", "*/seed-*/checkpoints", "reward_models/*/seed-*/checkpoints")


def find_checkpoint(directory: Path) -> Path:
    """A step's own directory: `directory`, the newest of a training output, or of the only training of a run.

    Raises UserError where there is none, or where there are several trainings to choose from.
    """
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such directory; give a training output or a run")
    if directory.name.isdigit() and (directory / "state").is_dir():
        return directory
    if found := _steps(directory):
        return found[-1]
    trainings = sorted({one for pattern in _BELOW for one in directory.glob(pattern) if _steps(one)})
    if not trainings:
        raise UserError(f"checkpoint {directory}: no checkpoint there, nor below it")
    if len(trainings) > 1:
        named = ", ".join(str(one.parent) for one in trainings[:8]) + (", ..." if len(trainings) > 8 else "")
        raise UserError(f"checkpoint {directory}: holds {len(trainings)} trainings, name one of them: {named}")
    return _steps(trainings[0])[-1]


def _steps(directory: Path) -> list[Path]:
    """Committed steps by number; a write that was interrupted has another name."""
    found = [one for one in directory.iterdir() if one.name.isdigit() and (one / "state").is_dir()]
    return sorted(found, key=lambda one: int(one.name))


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
