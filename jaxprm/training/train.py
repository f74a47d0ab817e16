"""The training run of a reward model, from top to bottom.

Inputs, mesh, data, model and shardings, frozen features, restore, description, metrics, loop (step, metrics one step
late, evaluate, save), output. The step and its loss are in step.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from flax import nnx

from data_pipeline.batches import EvaluationBatches, TrainingBatches, evaluation_batches, training_batches
from data_pipeline.encode import Encoder
from data_pipeline.shards import ShardSplit, open_dataset
from jaxprm import config as config_lib
from jaxprm.artifacts.checkpoints import Checkpoints
from jaxprm.artifacts.directory import DESCRIPTION
from jaxprm.errors import Interrupted, UserError
from jaxprm.evaluation.value_metrics import StepRecords
from jaxprm.hf import reader
from jaxprm.model import sharding
from jaxprm.objectives import check_settings
from jaxprm.progress import bar
from jaxprm.training import distributed, reward_model, trainable
from jaxprm.training.distributed import Preemption, Timer
from jaxprm.training.evaluate import step_values, summary
from jaxprm.training.features import Features, features_of_split
from jaxprm.training.flops import train_step_flops
from jaxprm.training.metrics import Metrics, Profile, Sink, WandbSink, first_not_finite, numbers, seconds_at_peak
from jaxprm.training.programs import Programs, batch_fields, make_programs
from jaxprm.training.step import FIELDS, NO_PARAMETERS

RENAMED = {"loss": "validation_loss"}  # metrics.jsonl has the training loss under "loss"
SHOWN_TRAJECTORIES = 8


def train_reward_model(
    experiment: config_lib.Experiment,
    settings: config_lib.RewardModelConfig,
    seed: int,
    *,
    shards: Path,
    base: Path,
    output: Path,
    profile: tuple[int, int] | None = None,
) -> Path:
    """Trains one reward model and returns its directory, OUTPUT/model. Returns at once if the model is complete.

    A killed run resumes from its last checkpoint when it is called again, and ends with the same bits. Writes
    OUTPUT/checkpoints, OUTPUT/metrics.jsonl (a line per step and per validation), timing.jsonl, tensorboard, and
    OUTPUT/model (Hugging Face format, reward_model.json). With several processes all call it; process 0 writes.

    Args:
        experiment: batch shape, mesh, chat template and logging.
        settings: the objective and its optimizer.
        seed: seed of the head, of adapters, and of the order of the data.
        shards: a dataset with the splits train and validation.
        base: a policy in Hugging Face format.
        profile: first and last step of a trace, written to OUTPUT/profile.

    Raises:
        UserError: settings that cannot be trained, a mesh or a batch that does not divide, a checkpoint or a model of
            another identity, or a loss that is not finite.
        DataError: shards of another tokenizer, broken, or with a trajectory that does not fit.
        Interrupted: the machine is preempted; the same call resumes.
    """
    name, data = f"{settings.label}, seed {seed}", experiment.data
    check_settings(settings)

    # Inputs, and the identity that a finished model or a checkpoint must have
    encoder = Encoder.load(base, **experiment.policy.encoding)
    dataset = open_dataset(shards, encoder_fingerprint=encoder.fingerprint, skip_bad=data.skip_bad)
    _print_once(f"left out: {error}" for error in dataset.broken.values())
    # Every process plans the batches by itself: with other shards, or others left out, the plans would differ.
    distributed.check_equal(dataset.fingerprint, "shards")
    identity = reward_model.identity(
        settings, data, seed, base=base, dataset=dataset.fingerprint, tokenizer=encoder.fingerprint
    )
    if distributed.broadcast_from_primary(reward_model.is_written(output / "model", identity)):
        return output / "model"

    # Mesh
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_rows(mesh, data.rows, data.length, settings.microbatches)

    # Data: the batches of all epochs in the order of the seed; their number is the length of the schedule
    shape = {"rows": data.rows, "length": data.length, "steps_per_row": data.steps_per_row}
    batches = training_batches(dataset, "train", **shape, epochs=settings.epochs, seed=seed)
    validation_batches = evaluation_batches(dataset, "validation", **shape)
    check_settings(settings, dense_rewards=_has_dense_rewards(batches.split))
    steps, facts = len(batches), reward_model.training_facts(dataset, batches)
    _print_once(reward_model.summary_lines(name, facts, data, steps))

    # Model and shardings: every array is read or initialized where it is placed, then split into trained and frozen
    config, parameters = reward_model.from_policy(base, seed, mesh)
    reader.check_vocabulary(base, config, encoder.vocabulary_size)
    programs = make_programs(settings, config, mesh, length=data.length, steps=steps, seed=seed)
    frozen = NO_PARAMETERS
    if settings.trainable != "full":
        parameters, frozen = programs.split(parameters)

    # Frozen features: with a frozen transformer its hidden states are computed once, and it is dropped
    fields, features = batch_fields(settings), None
    if settings.trainable == "head":
        features = _features(
            programs,
            nnx.State(dict(parameters.items()) | dict(frozen.items())),
            mesh,
            {"train": evaluation_batches(dataset, "train", **shape), "validation": validation_batches},
            shards.with_name("features") / reward_model.features_identity(settings, identity),
        )
        frozen = NO_PARAMETERS

    # Restore: train state and data position are one checkpoint
    checkpoints = Checkpoints(
        output / "checkpoints",
        identity,
        keep_latest=settings.keep_latest,
        keep_best=settings.keep_best,
        config=msgspec.to_builtins(settings, str_keys=True) | {"mesh": dict(mesh.shape)},
    )
    if checkpoints.latest_step() is None:
        start, state = 0, programs.init(parameters)
    else:
        del parameters  # the device may not hold them next to the restored state
        start, state, position = checkpoints.restore(programs.state)
        batches.restore_state(position)
    local_rows = sharding.local_rows(mesh, data.rows)
    batches.set_local_rows(local_rows)

    # Description: makes the checkpoints of a whole model scorable and exportable before the run ends
    recipe = reward_model.recipe(
        settings,
        seed,
        base=base,
        max_tokens=data.length,
        value_range=_value_range(batches.split),
        **facts,
        **encoder.choices,
        fingerprints=identity,
    )
    if settings.trainable == "full" and distributed.is_primary():
        reward_model.describe(output / DESCRIPTION, config, base=base, encoder=encoder, recipe=recipe)

    # Metrics: mfu counts the FLOPs of the model only, which are the same with every attention
    flops = train_step_flops(config, settings, data, "reference").model
    metrics_options = {
        "writes": distributed.is_primary(),
        "peak_seconds": seconds_at_peak(flops, mesh.devices.flat),
        "extra_sink": _wandb(experiment, settings, seed, output, identity),
    }

    validation, pending = None, None
    try:
        with (
            Metrics(output, start, **metrics_options) as metrics,
            Preemption() as preemption,
            Profile(profile, output / "profile") as profiler,
            bar(f"train {name}", steps, initial=start, unit="step") as progress,
        ):

            def put(batch: dict, split: str, **rows: Any) -> dict[str, jax.Array]:
                batch = batch if features is None else features[split].attach(batch)
                return sharding.put_batch(batch, mesh, fields, **rows)

            def log_pending() -> None:
                nonlocal pending
                if pending is not None:
                    line = {"step": pending[0]} | numbers(jax.device_get(pending[1]))
                    _check_finite(line, name, checkpoints, output, batches)
                    metrics.step(line)
                    progress.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
                pending = None

            def evaluate() -> StepRecords:
                trained = state["parameters"]
                return step_values(
                    lambda batch: programs.evaluation_step(trained, put(batch, "validation"), frozen),
                    validation_batches,
                )

            timer = Timer(settings.checkpoint_minutes)
            for step in range(start + 1, steps + 1):
                # Step: the state is donated, and nothing but the batch is transferred to the devices
                profiler.before(step)
                waited_since = time.monotonic()
                batch = put(next(batches), "train", held=local_rows, rows=data.rows)
                metrics.add_input_wait(time.monotonic() - waited_since)
                with jax.transfer_guard("disallow"):
                    state, step_metrics = programs.train_step(state, batch, frozen)

                # Metrics one step late: those of step t - 1 are fetched while step t runs
                log_pending()
                pending = (step, step_metrics)

                stops = preemption.should_stop(step)
                evaluates, saves = (
                    step == steps or step % every == 0 for every in (settings.evaluate_every, settings.checkpoint_every)
                )
                saves |= stops or timer.due(step)
                if evaluates or saves:
                    log_pending()  # no state is saved before its loss is known to be finite

                # Evaluate, unless the machine is about to be taken away
                loss = None
                if evaluates and not stops:
                    validation = summary(records := evaluate())
                    loss = validation["loss"]
                    renamed = {RENAMED.get(key, key): value for key, value in validation.items()}
                    metrics.validation(step, renamed, records)

                # Save
                if saves:
                    checkpoints.save(step, state, batches.save_state(), validation_loss=loss)
                    timer.restart()
                    metrics.pause()
                progress.update()
                if stops:
                    checkpoints.wait()
                    raise _interrupted(name, f"at step {step} of {steps}", output, step)
            if validation is None:  # the run was killed between its last checkpoint and its model
                validation = summary(evaluate())
    finally:
        checkpoints.close()
    if preemption.signalled:  # during the last evaluation, after the last poll; the model is not written yet
        raise _interrupted(name, f"after step {steps} of {steps}", output, steps)

    # Output: the merged model in Hugging Face format
    recipe |= {"steps": steps, "validation": validation}
    if settings.trainable == "head":  # its frozen transformer was dropped: read it again
        frozen = nnx.State({"transformer": reward_model.from_policy(base, seed, mesh)[1]["transformer"]})
    merged = distributed.fetch(trainable.merged(settings, state["parameters"], frozen))
    if distributed.is_primary():
        reward_model.write(output / "model", config, merged, base=base, encoder=encoder, recipe=recipe)
    distributed.broadcast_from_primary(True)  # a barrier: the other processes return once the model is written
    return output / "model"


def _print_once(lines: Iterable[str]) -> None:
    """Prints lines to stderr, in process 0 only."""
    if distributed.is_primary():
        print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)


def _has_dense_rewards(split: ShardSplit) -> bool:
    """Whether any step but the last of some trajectory has a reward."""
    before_end = np.ones(len(split.rewards), bool)
    before_end[split.step_starts[1:] - 1] = False
    return bool(np.any(split.rewards[before_end]))


def _value_range(split: ShardSplit) -> tuple[float, float]:
    """(lowest, highest) return, at least [0, 1]: outcomes are in [0, 1], a user's own rewards may exceed it."""
    returns = np.add.reduceat(split.rewards, split.step_starts[:-1])
    return min(0.0, float(returns.min())), max(1.0, float(returns.max()))


def _features(
    programs: Programs,
    parameters: nnx.State,
    mesh: jax.sharding.Mesh,
    batches: dict[str, EvaluationBatches],
    cache: Path,
) -> dict[str, Features]:
    """Hidden states of every split, from the cache or from one pass over its batches."""
    return {
        split: features_of_split(
            lambda batch: programs.features_step(parameters, sharding.put_batch(batch, mesh, FIELDS)),
            split_batches,
            split_batches.split.step_starts,
            cache / split,
            width=parameters["head"][...].shape[0],
            writes=distributed.is_primary(),
        )
        for split, split_batches in batches.items()
    }


def _wandb(
    experiment: config_lib.Experiment, settings: config_lib.RewardModelConfig, seed: int, output: Path, identity: dict
) -> Callable[[], Sink] | None:
    """Opens the Weights & Biases run; None if the config asks for none."""
    if experiment.logging.wandb == "off":
        return None
    name, group = f"{settings.label}, seed {seed}", experiment.name
    config = msgspec.to_builtins(settings, str_keys=True) | {
        "data": msgspec.to_builtins(experiment.data),
        "seed": seed,
        "fingerprints": identity,
    }
    return lambda: WandbSink(experiment.logging, output, name=name, group=group, config=config)


def _check_finite(
    line: dict[str, float], name: str, checkpoints: Checkpoints, output: Path, batches: TrainingBatches
) -> None:
    """Raises UserError naming the metric, the step, the trajectories of its batch and the last good checkpoint."""
    if (metric := first_not_finite(line)) is None:
        return
    saved = checkpoints.latest_step()
    checkpoint = "none was written" if saved is None else f"{output}/checkpoints/{saved}"
    ids = batches.trajectories(int(line["step"]) - 1)
    shown = ", ".join(ids[:SHOWN_TRAJECTORIES]) + (", ..." if len(ids) > SHOWN_TRAJECTORIES else "")
    raise UserError(
        f"training {name}: {metric} is {line[metric]} at step {line['step']}; last good checkpoint: {checkpoint}; "
        f"lower learning_rate or head_multiplier, or look at the rewards of its {len(ids)} trajectories: {shown}"
    )


def _interrupted(name: str, when: str, output: Path, step: int) -> Interrupted:
    return Interrupted(
        f"training {name}: told to stop {when}; saved in {output}/checkpoints/{step}, run the same command to resume"
    )
