"""Learning rates of reward models on a pretrained base: by what is trained, with and without a centred head.

    python -m benchmarks.learning_rates --config configs/smollm2_head.py --workdir runs/smollm2-head \
        --trainable head --rates 1e-6 1e-5 1e-4 1e-3 --starts centred random --seeds 0 1 2 --output runs/rates

The work directory must have shards. Every cell (a rate, a start, a seed) is trained as `train` does and judged on the
validation split; no model is written. A finished cell is a file in OUTPUT and is not trained again. The table has the
AUROC over all steps and over pairs that share task and depth, and the loss, with 95 % intervals over tasks and seeds,
and the gradient norm of the first step. --steps, --rows and --held-out shorten a cell where the transformer is trained.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from flax import nnx

from data_pipeline.batches import EvaluationBatches, evaluation_batches, training_batches
from data_pipeline.encode import Encoder
from data_pipeline.shards import open_dataset
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.evaluation.statistics import bootstrap_statistic, task_pairs
from jaxprm.evaluation.value_metrics import StepRecords, validation
from jaxprm.host_memory import keep_freed
from jaxprm.model import sharding
from jaxprm.policies.loading import base_directory
from jaxprm.progress import bar
from jaxprm.training import reward_model
from jaxprm.training.evaluate import step_values
from jaxprm.training.features import features_of_split
from jaxprm.training.programs import batch_fields, make_programs
from jaxprm.training.step import FIELDS, NO_PARAMETERS

COLUMNS = ("values", "targets", "depths", "tasks", "weights", "success")


class Cell(NamedTuple):
    """One training run of the grid."""

    trainable: str
    rate: float
    start: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.trainable}-{self.rate:g}-{self.start}-{self.seed}"


def train(cell: Cell, options: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """Trains a cell. Returns its fields, "first_gradient_norm", "steps", and the columns of its StepRecords."""
    settings = msgspec.structs.replace(
        inputs.experiment.reward_models[0],
        trainable=cell.trainable,
        learning_rate=cell.rate,
        head_start=cell.start,
        **{"epochs": options.epochs} if options.epochs else {},
    )
    data = inputs.experiment.data
    shape = {"rows": options.rows or data.rows, "length": data.length, "steps_per_row": data.steps_per_row}
    batches = training_batches(inputs.dataset, "train", **shape, epochs=settings.epochs, seed=cell.seed)
    held_out = evaluation_batches(inputs.dataset, "validation", **shape)
    steps = min(options.steps or len(batches), len(batches))
    mesh = sharding.make_mesh(inputs.experiment.mesh)
    config, parameters = reward_model.from_policy(inputs.base, cell.seed, mesh)
    programs = make_programs(settings, config, mesh, length=data.length, steps=steps, seed=cell.seed)
    frozen, features = NO_PARAMETERS, None
    if cell.trainable != "full":
        parameters, frozen = programs.split(parameters)
    if cell.trainable == "head":
        features, frozen = _features(programs, inputs, settings, parameters, frozen, mesh, cell.seed), NO_PARAMETERS

    def put(batch: dict, split: str) -> dict:
        batch = batch if features is None else features[split].attach(batch)
        return sharding.put_batch(batch, mesh, batch_fields(settings))

    if settings.head_start == "centred":
        parameters = programs.centre_head(parameters, put(batches.peek(), "train"), frozen)
    state, norms = programs.init(parameters), []
    with bar(cell.name, steps, unit="step") as progress:
        for _ in range(steps):
            state, metrics = programs.train_step(state, put(next(batches), "train"), frozen)
            norms.append(float(metrics["gradient_norm"]))
            progress.update()
    records = step_values(
        lambda batch: programs.evaluation_step(state["parameters"], put(batch, "validation"), frozen),
        _First(held_out, options.held_out),
    )
    result = cell._asdict() | {"first_gradient_norm": norms[0], "steps": steps}
    return result | {name: getattr(records, name) for name in COLUMNS}


class _First:
    """The first batches of a split, all of them if `count` is None."""

    def __init__(self, batches: EvaluationBatches, count: int | None):
        self.split, self._batches, self._count = batches.split, batches, count

    def __iter__(self) -> Iterator[dict]:
        return itertools.islice(self._batches, self._count)


def _features(programs, inputs: Inputs, settings, trained, frozen, mesh, seed: int) -> dict:
    """The hidden states that `train` caches, from its cache or computed into it."""
    data = inputs.experiment.data
    identity = reward_model.identity(
        settings, data, seed, base=inputs.base, dataset=inputs.dataset.fingerprint, tokenizer=inputs.tokenizer
    )
    cache = inputs.shards.with_name("features") / reward_model.features_identity(settings, identity)
    parameters = nnx.State(dict(trained.items()) | dict(frozen.items()))
    features = {}
    for split in ("train", "validation"):
        batches = evaluation_batches(
            inputs.dataset, split, rows=data.rows, length=data.length, steps_per_row=data.steps_per_row
        )
        features[split], _ = features_of_split(
            lambda batch: programs.features_step(parameters, sharding.put_batch(batch, mesh, FIELDS)),
            batches,
            cache / split,
            width=parameters["head"][...].shape[0],
            label=f"hidden states {split}",
        )
    return features


class Inputs(NamedTuple):
    """What all cells share."""

    experiment: config_lib.Experiment
    base: Path
    shards: Path
    dataset: Any
    tokenizer: str


def load_inputs(options: argparse.Namespace) -> Inputs:
    experiment = config_lib.load(options.config, options.overrides)
    base, shards = base_directory(experiment), options.workdir / "shards"
    encoder = Encoder.load(base, experiment.policy.chat_template)
    dataset = open_dataset(shards, encoder_fingerprint=encoder.fingerprint)
    return Inputs(experiment, base, shards, dataset, encoder.fingerprint)


def table(folder: Path, samples: int = 2000) -> Iterator[str]:
    """The finished cells as lines of a Markdown table, seeds together."""
    groups: dict[tuple, list[tuple[dict, StepRecords]]] = {}
    for path in sorted(folder.glob("*.npz")):
        (trainable, rate), cell, records = _read(path)
        groups.setdefault((trainable, rate, str(cell["start"])), []).append((cell, records))
    yield "| trained | learning rate | start | seeds | steps | AUROC | within task | loss | first gradient norm |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (trainable, rate, start), cells in sorted(groups.items()):
        metrics = validation([records for _, records in cells], samples=samples)
        scores = " | ".join(_interval(metrics[name]) for name in ("auroc", "auroc_within_task"))
        loss = _interval(metrics["loss"], scale=1, digits=3)
        norm, steps = np.mean([cell["first_gradient_norm"] for cell, _ in cells]), int(cells[0][0]["steps"])
        yield f"| {trainable} | {rate:g} | {start} | {len(cells)} | {steps} | {scores} | {loss} | {norm:.2g} |"
    if groups:
        ((_, records), *_), *_ = groups.values()
        depth = StepRecords(**vars(records) | {"values": -records.depths.astype(np.float64)})
        yield f"| depth alone | | | | | {_interval(validation([depth], samples=samples)['auroc'])} | 50 | | |"


def gains(folder: Path, samples: int = 2000) -> Iterator[str]:
    """What centring changes at each rate, paired by task and seed, as lines of a Markdown table."""
    yield "| trained | learning rate | AUROC, centred minus random | loss, centred minus random |"
    yield "|---|---|---|---|"
    cells = {path.stem: path for path in folder.glob("*.npz")}
    pairs: dict[tuple, list[tuple[StepRecords, StepRecords]]] = {}
    for name, path in sorted(cells.items()):
        if (other := cells.get(name.replace("-random-", "-centred-"))) and other != path:
            (trainable, rate), _, records = _read(path)
            pairs.setdefault((trainable, rate), []).append((_read(other)[2], records))
    for (trainable, rate), both in sorted(pairs.items()):
        tasks, index = np.unique(both[0][0].tasks, return_inverse=True)
        options = {"tasks": len(tasks), "samples": samples}
        auroc = bootstrap_statistic([_difference(_auroc, *pair, index, len(tasks)) for pair in both], **options)
        loss = bootstrap_statistic([_difference(_loss, *pair, index, len(tasks)) for pair in both], **options)
        yield f"| {trainable} | {rate:g} | {_interval(auroc)} | {_interval(loss, scale=1, digits=3)} |"


def _difference(statistic, centred: StepRecords, random: StepRecords, index: np.ndarray, count: int):
    first, second = (statistic(records, index, count) for records in (centred, random))
    return lambda counts: first(counts) - second(counts)


def _auroc(records: StepRecords, index: np.ndarray, count: int):
    return task_pairs(records.values, records.success, index, count, records.weights).auroc


def _loss(records: StepRecords, index: np.ndarray, count: int):
    errors = records.weights * (records.values - records.targets) ** 2 / 2
    total, weight = (np.bincount(index, column, minlength=count) for column in (errors, records.weights))
    return lambda counts: (counts @ total) / (counts @ weight)


def _read(path: Path) -> tuple[tuple[str, float], dict, StepRecords]:
    """((what is trained, rate), the cell, its records)."""
    with np.load(path) as stored:
        cell = dict(stored)
    records = StepRecords(**{name: cell[name] for name in COLUMNS})
    return (str(cell["trainable"]), float(cell["rate"])), cell, records


def _interval(estimate: dict, *, scale: float = 100, digits: int = 1) -> str:
    mean, low, high = (f"{scale * estimate[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True, help="work directory with shards")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results of the cells")
    parser.add_argument("--trainable", default="head", choices=("head", "lora", "last_k", "full"))
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--starts", nargs="+", default=["centred"], choices=("centred", "random"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    parser.add_argument("--steps", type=int, help="end the training, and its schedule, after so many steps")
    parser.add_argument("--held-out", type=int, help="batches of the validation split to judge on; default: all")
    parser.add_argument("--rows", type=int, help="rows of a batch, instead of the config's")
    parser.add_argument("overrides", nargs="*", help="FIELD=VALUE of the config")
    options = parser.parse_args()
    keep_freed()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.rates:
        inputs = load_inputs(options)
    for rate in options.rates:
        for start in options.starts:
            for seed in options.seeds:
                cell = Cell(options.trainable, rate, start, seed)
                path = options.output / f"{cell.name}.npz"
                if not path.exists():
                    staging = path.with_suffix(".tmp")
                    with staging.open("wb") as stream:
                        np.savez_compressed(stream, **train(cell, options, inputs))
                    staging.rename(path)
                    jax.clear_caches()
    lines = [*table(options.output), "", *gains(options.output)]
    print("\n".join(lines))
    files.write_atomic(options.output / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
