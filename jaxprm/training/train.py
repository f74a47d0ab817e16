"""Training a reward model, from top to bottom: inputs, mesh, model, optimizer, data, restore, loop, output."""

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
from jaxprm.losses import check_objective
from jaxprm.model import sharding
from jaxprm.progress import bar
from jaxprm.training import distributed, reward_model, trainable
from jaxprm.training.distributed import Preemption, Timer
from jaxprm.training.evaluate import step_values, summary
from jaxprm.training.features import Features, features_of_split
from jaxprm.training.flops import train_step_flops
from jaxprm.training.metrics import Metrics, Profile, Sink, WandbSink, not_finite, numbers, seconds_at_peak
from jaxprm.training.programs import Programs, batch_fields, make_programs
from jaxprm.training.reward_model import to_lines, training_facts
from jaxprm.training.step import FIELDS, progress_beta

LOGGED = {"loss": "validation_loss"}  # in metrics.jsonl, beside the training's own loss
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
    """Trains one reward model and returns its directory, OUTPUT/model; returns at once when it is there.

    Killed and called again it goes on from the last checkpoint and ends with the same bits. Leaves OUTPUT/checkpoints,
    OUTPUT/metrics.jsonl (one line a step, one a validation), timing.jsonl, tensorboard, and OUTPUT/model (Hugging Face
    format, reward_model.json). Several processes call it alike; process 0 writes.

    Args:
        settings: the objective and its optimizer; experiment: the batch shape and the mesh.
        seed: of the head, of adapters, and of the order of the data.
        shards: a dataset with the splits train and validation; base: a policy in Hugging Face format.
        profile: the first and the last step of a trace that is written to OUTPUT/profile.

    Raises:
        UserError: settings that cannot be trained, a mesh or a batch that does not divide, a checkpoint or a model of
            another identity, or a loss that is not finite.
        DataError: shards of another tokenizer, broken, or with a trajectory that does not fit.
        Interrupted: the machine is taken away; the same call goes on.
    """
    name, data = f"{settings.label}, seed {seed}", experiment.data
    check_objective(
        settings.objective,
        beta=progress_beta(settings),
        gae_lambda=settings.gae_lambda,
        discount=settings.discount,
        bootstrap=settings.bootstrap,
        progress_gradient=settings.progress_gradient,
    )

    # Inputs
    encoder = Encoder.load(base, experiment.policy.chat_template)
    dataset = open_dataset(shards, encoder_fingerprint=encoder.fingerprint, skip_bad=data.skip_bad)
    _say(f"left out: {error}" for error in dataset.broken.values())
    distributed.check_equal(dataset.fingerprint, "shards")  # nor leaves out others: each plans the batches by itself
    identity = reward_model.identity(
        settings, data, seed, base=base, dataset=dataset.fingerprint, tokenizer=encoder.fingerprint
    )
    if distributed.broadcast_from_primary(reward_model.is_written(output / "model", identity)):
        return output / "model"

    # Mesh
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_rows(mesh, data.rows, data.length, settings.microbatches)

    # Data: the batches of all epochs in an order that the seed decides, and validation once through
    shape = {"rows": data.rows, "length": data.length, "steps_per_row": data.steps_per_row}
    batches = training_batches(dataset, "train", **shape, epochs=settings.epochs, seed=seed)
    validation_batches = evaluation_batches(dataset, "validation", **shape)
    _check_rewards(batches.split, settings)
    steps, facts = len(batches), training_facts(dataset, batches)
    _say(to_lines(name, facts, data, steps))

    # Model: read and drawn where it will lie, then taken apart into what is trained and what is not
    config, parameters = reward_model.from_policy(base, seed, mesh)
    reader.check_vocabulary(base, config, encoder.vocabulary_size)
    programs = make_programs(settings, config, mesh, length=data.length, steps=steps, seed=seed)
    frozen = nnx.State({})
    if settings.trainable != "full":
        parameters, frozen = programs.split(parameters)

    # A frozen transformer runs once over the data; from there on batches bring what it said
    fields, features = batch_fields(settings), None
    if settings.trainable == "head":
        features = _features(
            programs,
            nnx.State(dict(parameters.items()) | dict(frozen.items())),
            mesh,
            {"train": evaluation_batches(dataset, "train", **shape), "validation": validation_batches},
            shards.with_name("features") / reward_model.features_identity(settings, identity),
        )
        frozen = nnx.State({})

    # Restore: state and data position together
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
        del parameters  # there is no room for both
        start, state, position = checkpoints.restore(programs.state)
        batches.restore_state(position)
    held = sharding.local_rows(mesh, data.rows)
    batches.set_local_rows(held)

    # Description: with it, a checkpoint of the whole model can be scored and exported before the training ends
    about = reward_model.recipe(
        settings,
        seed,
        base=base,
        max_tokens=data.length,
        value_range=_value_range(batches.split),
        **facts,
        fingerprints=identity,
    )
    if settings.trainable == "full" and distributed.is_primary():
        reward_model.describe(output / DESCRIPTION, config, base=base, encoder=encoder, recipe=about)

    # Metrics: of a step's FLOPs that of the model alone, by what all devices could do in its time
    flops = train_step_flops(config, settings, data, "reference").model  # the same with every attention
    logged = {
        "writes": distributed.is_primary(),
        "peak_seconds": seconds_at_peak(flops, mesh.devices.flat),
        "also": _wandb(experiment, settings, seed, output, identity),
    }

    # Loop: step t is under way before the metrics of step t - 1 are fetched
    validation, pending = None, None
    try:
        with (
            Metrics(output, start, **logged) as metrics,
            Preemption() as preemption,
            Profile(profile, output / "profile") as profiler,
            bar(f"train {name}", steps, initial=start, unit="step") as progress,
        ):

            def put(batch: dict, split: str, **parts: Any) -> dict[str, jax.Array]:
                batch = batch if features is None else features[split].attach(batch)
                return sharding.put_batch(batch, mesh, fields, **parts)

            def settle() -> None:
                nonlocal pending
                if pending is not None:
                    line = {"step": pending[0]} | numbers(jax.device_get(pending[1]))
                    _check_finite(line, name, checkpoints, output, batches)
                    metrics.step(line)
                    progress.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
                pending = None

            def validate() -> StepRecords:
                trained = state["parameters"]
                return step_values(
                    lambda batch: programs.evaluation_step(trained, put(batch, "validation"), frozen),
                    validation_batches,
                )

            timer = Timer(settings.checkpoint_minutes)
            for step in range(start + 1, steps + 1):
                profiler.before(step)
                began = time.monotonic()
                batch = put(next(batches), "train", held=held, rows=data.rows)
                metrics.add_input_wait(time.monotonic() - began)
                with jax.transfer_guard("disallow"):  # nothing but the batch goes to the devices
                    state, found = programs.train_step(state, batch, frozen)
                settle()
                pending = (step, found)
                stops = preemption.should_stop(step)
                evaluates, saves = (
                    step == steps or step % every == 0 for every in (settings.evaluate_every, settings.checkpoint_every)
                )
                saves |= stops or timer.due(step)
                if evaluates or saves:
                    settle()  # nothing is saved that was not seen to be finite
                loss = None
                if evaluates and not stops:
                    validation = summary(records := validate())
                    loss = validation["loss"]
                    metrics.validation(step, {LOGGED.get(key, key): v for key, v in validation.items()}, records)
                if saves:
                    checkpoints.save(step, state, batches.save_state(), validation_loss=loss)
                    timer.restart()
                    metrics.pause()
                progress.update()
                if stops:
                    checkpoints.wait()
                    raise Interrupted(
                        f"training {name}: told to stop at step {step} of {steps}; saved in "
                        f"{output}/checkpoints/{step}, the same command goes on from there"
                    )
            if validation is None:  # killed between the last checkpoint and the model
                validation = summary(validate())
    finally:
        checkpoints.close()
    if preemption.signalled:  # during the last validation: too late for the loop, and the model is not there yet
        raise Interrupted(
            f"training {name}: told to stop after step {steps} of {steps}; saved in {output}/checkpoints/{steps}, "
            "the same command goes on from there"
        )

    # Output
    final = about | {"steps": steps, "validation": validation}
    if settings.trainable == "head":  # it was let go of when the features were there
        frozen = nnx.State({"transformer": reward_model.from_policy(base, seed, mesh)[1]["transformer"]})
    merged = distributed.fetch(trainable.merged(settings, state["parameters"], frozen))
    if distributed.is_primary():
        reward_model.write(output / "model", config, merged, base=base, encoder=encoder, recipe=final)
    distributed.broadcast_from_primary(True)  # the others return when it is there
    return output / "model"


def _wandb(
    experiment: config_lib.Experiment, settings: config_lib.RewardModelConfig, seed: int, output: Path, identity: dict
) -> Callable[[], Sink] | None:
    """Opens the run in Weights & Biases, where the config wants one."""
    if experiment.logging.wandb == "off":
        return None
    name, group = f"{settings.label}, seed {seed}", experiment.name
    config = msgspec.to_builtins(settings, str_keys=True) | {
        "data": msgspec.to_builtins(experiment.data),
        "seed": seed,
        "fingerprints": identity,
    }
    return lambda: WandbSink(experiment.logging, output, name=name, group=group, config=config)


def _say(lines: Iterable[str]) -> None:
    """On the terminal, once for all processes."""
    if distributed.is_primary():
        print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)


def _features(
    programs: Programs,
    parameters: nnx.State,
    mesh: jax.sharding.Mesh,
    batches: dict[str, EvaluationBatches],
    folder: Path,
) -> dict[str, Features]:
    """Hidden states of every split, from the folder's files or from one pass."""
    return {
        split: features_of_split(
            lambda batch: programs.features_step(parameters, sharding.put_batch(batch, mesh, FIELDS)),
            one,
            one.split.step_starts,
            folder / split,
            width=parameters["head"][...].shape[0],
            writes=distributed.is_primary(),
        )
        for split, one in batches.items()
    }


def _check_rewards(split: ShardSplit, settings: config_lib.RewardModelConfig) -> None:
    """Refuses a progress loss on trajectories that are rewarded before their end."""
    before_end = np.ones(len(split.rewards), bool)
    before_end[split.step_starts[1:] - 1] = False
    check_objective(
        settings.objective,
        beta=progress_beta(settings),
        gae_lambda=settings.gae_lambda,
        discount=settings.discount,
        dense_rewards=bool(np.any(split.rewards[before_end])),
    )


def _value_range(split: ShardSplit) -> tuple[float, float]:
    """Outcomes lie in [0, 1]; rewards of the user's own may take returns further."""
    returns = np.add.reduceat(split.rewards, split.step_starts[:-1])
    return min(0.0, float(returns.min())), max(1.0, float(returns.max()))


def _check_finite(
    line: dict[str, float], name: str, checkpoints: Checkpoints, output: Path, batches: TrainingBatches
) -> None:
    """Raises UserError naming the metric, the step, the trajectories of its batch and the last good checkpoint."""
    if (metric := not_finite(line)) is None:
        return
    saved = checkpoints.latest_step()
    kept = "none was written" if saved is None else f"{output}/checkpoints/{saved}"
    found = batches.trajectories(int(line["step"]) - 1)
    named = ", ".join(found[:SHOWN_TRAJECTORIES]) + (", ..." if len(found) > SHOWN_TRAJECTORIES else "")
    raise UserError(
        f"training {name}: {metric} is {line[metric]} at step {line['step']}; last good checkpoint: {kept}; "
        f"lower learning_rate or head_multiplier, or look at the rewards of its {len(found)} trajectories: {named}"
    )
