"""Weights & Biases: what TensorBoard gets, in a run that a resumed training goes on with. The package is an extra.

The key is read from the environment by wandb itself, and from nowhere else; git remotes, code and console are not sent.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.redaction import redact

KEY = "WANDB_API_KEY"
BINS = 20
# A machine that is taken away cannot wait for an upload; what was not sent stays in the folder, for `wandb sync`.
FINISH_SECONDS = 20.0


def check(settings: config_lib.Logging) -> None:
    """Raises UserError where the package or the key is missing."""
    if settings.wandb == "off":
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb = {settings.wandb}: the package wandb is not installed; pip install 'jaxprm[wandb]', or "
            "set it to off"
        )
    if settings.wandb == "online" and not os.environ.get(KEY):
        raise UserError(f"logging.wandb = online: the environment has no {KEY}; set it, or logging.wandb=offline")


class WandbSink:
    """One W&B run for one training, in however many processes. Its id is in OUTPUT/wandb.json.

    Everything is keyed by the training's step, for W&B never goes back: what a resumed training computes again is there
    twice, with the same numbers at the same step.

    Raises UserError as `check` does, and where W&B refuses or cannot be reached.
    """

    def __init__(self, settings: config_lib.Logging, output: Path, *, name: str, group: str, config: dict[str, Any]):
        check(settings)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # tracebacks hold what variables hold
        import wandb

        self._wandb, online = wandb, settings.wandb == "online"
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=name,
                group=group,
                id=_run_id(output),
                resume="allow" if online else None,  # offline files of one id are joined when they are sent
                mode=settings.wandb,
                dir=str(output),
                config=config,
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, silent=True, finish_timeout=FINISH_SECONDS
                ),
            )
        except wandb.errors.Error as error:
            said = redact(" ".join(str(error).split()), os.environ.get(KEY))
            raise UserError(f"logging.wandb = {settings.wandb}: {said}; mend it, or set it to offline") from None
        if online:
            print(f"W&B: {self._run.url}")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, numbers: Mapping[str, float | None], step: int) -> None:
        self._run.log({name: value for name, value in numbers.items() if value is not None} | {"step": step})

    def histogram(self, name: str, values: np.ndarray, step: int, *, weights: np.ndarray) -> None:
        counted = np.histogram(values, BINS, weights=weights)
        self._run.log({name: self._wandb.Histogram(np_histogram=counted), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(output: Path) -> str:
    path = output / "wandb.json"
    if not path.exists():
        files.write_json(path, {"id": secrets.token_hex(8)})
    return files.read_json(path)["id"]
