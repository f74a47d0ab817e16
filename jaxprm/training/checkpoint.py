"""Orbax checkpoints of a training run: state, data position and identity, committed together or not at all."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxprm.errors import UserError

logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The latest checkpoints of one run. `identity` is what a checkpoint must agree with to be resumed from."""

    def __init__(self, directory: Path, identity: dict[str, Any], *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)
        self._identity = identity
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
        for name, value in self._identity.items():
            if meta["identity"].get(name) != value:
                raise UserError(
                    f"checkpoint {self._directory}/{step}: its {name} differs from this run's; "
                    "use another work directory or --redo"
                )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))
        return step, restored["state"], meta["position"]

    def save(self, step: int, state: Any, position: dict) -> None:
        """Writes in the background; an unfinished write is never visible as a checkpoint.

        Raises OSError (ENOSPC), here or in the next call, when the disk is full.
        """
        meta = {"identity": self._identity, "position": position}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._full_disk():
            self._manager.save(step, args=args)

    def close(self) -> None:
        """Waits for the last write."""
        with self._full_disk():
            self._manager.wait_until_finished()
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
