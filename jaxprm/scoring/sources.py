"""Where scores come from: a reward model, or the log-ratio of a policy and its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxprm.artifacts.directory import find_model, model_identity, read_recipe
from jaxprm.policies.loading import model_directory
from jaxprm.scoring import loading


@dataclass(frozen=True)
class Source:
    """A scorer that is not loaded yet.

    Attributes:
      name: for messages and reports.
      identity: everything that its scores depend on.
      load: the scorer; takes `dtype`, `template` and `mesh`, as `loading.load_scorer`.
      table: {"steps", "score"} of a line of the output of `score`, from message indices [S] and values [S].
      discount: of the returns that values estimate.
      is_expectation: whether values are expected outcomes, in their units. Otherwise only their order has a meaning.
      start: the value before the first step, from which its progress is counted; -inf if a first step has none.
      reasoning: "keep" or "drop", what `load` does by default with what the agent thought.
      trained_length: tokens of the longest conversation in training, or None if unknown.
      directory: of the reward model, or None.
      directories: all that are read.
    """

    name: str
    identity: Any
    load: Callable[..., Any]
    table: Callable[[Sequence[int], np.ndarray], dict[str, Any]]
    discount: float = 1.0
    is_expectation: bool = True
    start: float = -math.inf
    reasoning: str = "keep"
    trained_length: int | None = None
    directory: Path | None = None
    directories: tuple[Path, ...] = ()


def reward_model(path: str | Path) -> Source:
    """The source of a model location, see `find_model`. Raises UserError if no reward model is there."""
    directory = find_model(path)
    recipe = read_recipe(directory)
    progress, length = loading.defines_progress(recipe), recipe.get("max_tokens")
    return Source(
        name=str(path),
        identity=model_identity(directory),
        load=lambda **options: loading.load_scorer(directory, **options),
        table=lambda messages, values: loading.step_table(messages, values, progress=progress),
        discount=recipe.get("targets", {}).get("discount", 1.0),
        is_expectation=loading.predicts_outcomes(recipe),
        reasoning=recipe.get("reasoning", "keep"),
        trained_length=length if isinstance(length, int) else None,
        directory=directory,
        directories=(directory,),
    )


def progress_advantage(policy: str | Path, reference: str | Path) -> Source:
    """The source of two language models: directories, Hub ids, or "default". Raises UserError if one is missing."""
    from jaxprm.scoring.log_ratio import load_log_ratio

    directories = [
        model_directory(kind, f"--{kind}", str(path)) for kind, path in (("policy", policy), ("reference", reference))
    ]
    return Source(
        name=f"log-ratio of {policy} and {reference}",
        identity={"policy": model_identity(directories[0]), "reference": model_identity(directories[1])},
        load=lambda **options: load_log_ratio(*directories, **options),
        table=log_ratio_table,
        is_expectation=False,
        start=0.0,
        directories=tuple(directories),
    )


def log_ratio_table(messages: Sequence[int], values: np.ndarray) -> dict[str, Any]:
    """{"steps": [{"message", "log_ratio"}], "score"} from message indices [S] and sums of log-ratios [S]."""
    loading.check_finite(values)
    steps = [
        {"message": int(message), "log_ratio": loading.shortest_float(ratio)}
        for message, ratio in zip(messages, np.diff(values, prepend=0.0), strict=True)
    ]
    return {"steps": steps, "score": loading.shortest_float(values[-1])}
