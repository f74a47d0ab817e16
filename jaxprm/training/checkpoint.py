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
        best = policies.BestN(
            get_metric_fn=loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        )
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
