"""How good a reward model's step values are on trajectories it was not trained on."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxprm import config as config_lib
from jaxprm.evaluation.value_metrics import StepRecords, validation
from jaxprm.hf import reader
from jaxprm.model import sharding
from jaxprm.model.transformer import ForwardOptions, reward_model_graph
from jaxprm.training.step import FIELDS, make_evaluation_step

if TYPE_CHECKING:
    from data_pipeline.batches import EvaluationBatches

# (promises, returns-to-go), both [B, S], of a batch.
ValuesOf = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array]]

# The estimates' means alone are wanted while training; a few resamples keep them cheap.
_RESAMPLES = 50


def step_values(values_of: ValuesOf, batches: EvaluationBatches) -> StepRecords:
    """Value, return-to-go, depth, task, weight and success of every step of a split, in the order of the batches.

    A trajectory succeeded if its outcome, or where it has none the return of its first step, is above one half.

    Raises ValueError when a value is not finite.
    """
    tasks, outcomes = np.asarray(batches.split.tasks), batches.split.outcomes
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in batches:
        values, returns = (np.asarray(array) for array in values_of(batch))
        valid, example = batch["valid"], batch["example"][batch["valid"]]
        columns["values"].append(values[valid])
        columns["targets"].append(returns[valid])
        columns["depths"].append(batch["step_index"][valid] + 1)
        columns["tasks"].append(tasks[example])
        columns["weights"].append(batch["weights"][valid])
        first = np.maximum.accumulate(np.where(batch["is_first"], np.arange(valid.shape[1]), 0), axis=1)
        total = np.take_along_axis(returns, first, axis=1)[valid]
        columns["success"].append(np.where(np.isnan(outcomes[example]), total, outcomes[example]) > 0.5)
    return StepRecords(**{name: np.concatenate(parts) for name, parts in columns.items()})


def summary(records: StepRecords) -> dict[str, float | None]:
    """loss, explained_variance, auroc and auroc_within_task over all steps, as `value_metrics.validation` defines them.

    None where a number is not defined, such as an AUROC without failures.
    """
    return {name: estimate["mean"] for name, estimate in validation([records], samples=_RESAMPLES).items()}


def evaluate_model(
    model: Path,
    shards: Path,
    split: str,
    data: config_lib.DataConfig,
    *,
    mesh: config_lib.MeshConfig | None = None,
    discount: float = 1.0,
) -> StepRecords:
    """`step_values` of a trained reward model (a directory in Hugging Face format) on a split of a dataset.

    Raises UserError for what is no reward model, DataError for shards of another tokenizer.
    """
    from data_pipeline.batches import evaluation_batches
    from data_pipeline.encode import Encoder
    from data_pipeline.shards import open_dataset

    config, _ = reader.read_config(model)
    fingerprint = Encoder.load(model).fingerprint
    dataset = open_dataset(shards, encoder_fingerprint=fingerprint, skip_bad=data.skip_bad)
    devices = sharding.make_mesh(mesh or config_lib.MeshConfig())
    sharding.check_rows(devices, data.rows, data.length)
    sharding.check_model(devices, config)
    batches = evaluation_batches(dataset, split, rows=data.rows, length=data.length, steps_per_row=data.steps_per_row)
    shapes = reader.abstract(dataclasses.replace(config, tie_embeddings=True), reward=True)
    config, parameters = reader.load_reward_model(
        model, shardings=sharding.shardings(sharding.with_shardings(devices, shapes))
    )
    graph = reward_model_graph(config)
    settings = config_lib.RewardModelConfig(label="evaluated", discount=discount)
    forward_options = ForwardOptions(constrain=sharding.constraints(devices))
    step = make_evaluation_step(graph, settings, forward_options)
    evaluation_step = jax.jit(step, out_shardings=sharding.replicated(devices))
    return step_values(lambda batch: evaluation_step(parameters, sharding.put_batch(batch, devices, FIELDS)), batches)
