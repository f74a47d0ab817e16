"""Training a reward model, from top to bottom: inputs, mesh, model, optimizer, data, restore, loop, output."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipeline.batches import evaluation_batches, training_batches
from data_pipeline.encode import Encoder
from data_pipeline.shards import Split, open_dataset
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.losses import check_objective
from jaxprm.model import huggingface
from jaxprm.model.orbax_reader import DESCRIPTION
from jaxprm.progress import bar
from jaxprm.training import reward_model, sharding
from jaxprm.training.checkpoint import Checkpoints
from jaxprm.training.evaluate import step_values, summary
from jaxprm.training.optimizer import adamw
from jaxprm.training.step import initial_state, make_evaluation_step, make_train_step, progress_beta

LOGGED = {"loss": "validation_loss"}  # in metrics.jsonl, beside the training's own loss


def train_reward_model(
    experiment: config_lib.Experiment,
    settings: config_lib.RewardModel,
    seed: int,
    *,
    shards: Path,
    base: Path,
    output: Path,
) -> Path:
    """Trains one reward model and returns its directory, OUTPUT/model; returns at once when it is there.

    Killed and called again it goes on from the last checkpoint and ends with the same bits. Leaves OUTPUT/checkpoints,
    OUTPUT/metrics.jsonl (one line a step, one a validation) and OUTPUT/model (Hugging Face format, reward_model.json).

    Args:
        settings: the objective and its optimizer; experiment: the batch shape and the mesh.
        seed: of the head and of the order of the data.
        shards: a dataset with the splits train and validation; base: a policy in Hugging Face format.

    Raises:
        UserError: settings that cannot be trained, a mesh or a batch that does not divide, a checkpoint or a model of
            another identity, or a loss that is not finite.
        DataError: shards of another tokenizer, broken, or with a trajectory that does not fit.
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
    dataset = open_dataset(shards, encoder_fingerprint=encoder.fingerprint)
    identity = reward_model.identity(
        settings, data, seed, base=base, dataset=dataset.metadata.fingerprint, tokenizer=encoder.fingerprint
    )
    if reward_model.is_written(output / "model", identity):
        return output / "model"

    # Mesh
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_rows(mesh, data.rows)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    # Data: the batches of all epochs in an order that the seed decides, and validation once through
    shape = {"rows": data.rows, "length": data.length, "steps_per_row": data.steps_per_row}
    batches = training_batches(dataset, "train", **shape, epochs=settings.epochs, seed=seed)
    validation_batches = evaluation_batches(dataset, "validation", **shape)
    _check_rewards(batches.split, settings)
    steps = len(batches)

    # Model, optimizer, and where their state lies
    config, parameters = reward_model.from_policy(base, seed)
    huggingface.check_vocabulary(base, config, encoder.vocabulary_size)
    graph = huggingface.reward_model_graph(config)
    optimizer = adamw(
        learning_rate=settings.learning_rate,
        steps=steps,
        warmup_steps=round(settings.warmup_fraction * steps),
        weight_decay=settings.weight_decay,
        clip=settings.gradient_clip,
        head_multiplier=settings.head_multiplier,
    )

    def init(parameters):
        return initial_state(parameters, optimizer, settings)

    abstract = sharding.place(mesh, jax.eval_shape(init, parameters))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # Pinned on both sides: left to the compiler, a parameter's sharding can drift, and the step compiles again.
    train_step = jax.jit(
        make_train_step(graph, optimizer, settings),
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, whole),
    )
    evaluation_step = jax.jit(
        make_evaluation_step(graph, settings.discount),
        in_shardings=(shardings["parameters"], rows),
        out_shardings=whole,
    )

    # Restore: state and data position together
    checkpoints = Checkpoints(output / "checkpoints", identity)
    if (restored := checkpoints.restore(abstract)) is not None:
        start, state, position = restored
        batches.restore_state(position)
    else:
        start, state = 0, jax.jit(init, out_shardings=shardings)(jax.device_put(parameters, shardings["parameters"]))
    _cut_metrics(output / "metrics.jsonl", start)

    # Description: with it, a checkpoint can be scored and exported before the training ends
    counts = dataset.metadata.splits["train"]
    about = reward_model.recipe(
        settings,
        seed,
        base=base,
        max_tokens=data.length,
        value_range=_value_range(batches.split),
        trained_on={"trajectories": counts.trajectories, "tokens": counts.tokens * settings.epochs},
        fingerprints=identity,
    )
    reward_model.describe(output / DESCRIPTION, config, base=base, encoder=encoder, recipe=about)

    # Loop: step t is under way before the metrics of step t - 1 are fetched
    validation = None
    try:
        with (
            files.appending(output / "metrics.jsonl") as append,
            bar(f"train {name}", steps, initial=start, unit="step") as progress,
        ):

            def settle(pending: tuple[int, dict[str, jax.Array]] | None) -> None:
                if pending is None:
                    return
                line = {"step": pending[0]} | _numbers(jax.device_get(pending[1]))
                _check_finite(line, name, checkpoints, output)
                append([line])
                progress.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)

            def validate() -> dict[str, float | None]:
                parameters = state["parameters"]
                records = step_values(
                    lambda batch: evaluation_step(parameters, sharding.put_batch(batch, mesh)), validation_batches
                )
                return summary(records)

            pending = None
            for step in range(start + 1, steps + 1):
                state, metrics = train_step(state, sharding.put_batch(next(batches), mesh))
                settle(pending)
                pending = (step, metrics)
                evaluates, saves = (
                    step == steps or step % every == 0
                    for every in (settings.evaluate_every, settings.checkpoint_every)
                )
                if evaluates or saves:
                    settle(pending)  # nothing is saved that was not seen to be finite
                    pending = None
                if evaluates:
                    validation = validate()
                    append([{"step": step} | {LOGGED.get(key, key): value for key, value in validation.items()}])
                if saves:
                    checkpoints.save(step, state, batches.save_state())
                progress.update()
            if validation is None:  # killed between the last checkpoint and the model
                validation = validate()
    finally:
        checkpoints.close()

    # Output
    final = about | {"steps": steps, "validation": validation}
    reward_model.write(output / "model", config, state["parameters"], base=base, encoder=encoder, recipe=final)
    return output / "model"


def _check_rewards(split: Split, settings: config_lib.RewardModel) -> None:
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


def _value_range(split: Split) -> tuple[float, float]:
    """Outcomes lie in [0, 1]; rewards of the user's own may take returns further."""
    returns = np.add.reduceat(split.rewards, split.step_starts[:-1])
    return min(0.0, float(returns.min())), max(1.0, float(returns.max()))


def _cut_metrics(path: Path, start: int) -> None:
    """Forgets what an earlier process logged past the checkpoint that this one goes on from."""
    lines = [line for line in files.whole_lines(path) if line["step"] <= start]
    files.write_atomic(path, "".join(map(files.line, lines)))


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalars to the seven digits that float32 has; its NaN and infinity stay what they are."""
    return {name: float(f"{float(value):.7g}") for name, value in metrics.items()}


def _check_finite(line: dict[str, float], name: str, checkpoints: Checkpoints, output: Path) -> None:
    for metric, value in line.items():
        if not math.isfinite(value):
            saved = checkpoints.latest_step()
            kept = "none was written" if saved is None else f"{output}/checkpoints/{saved}"
            raise UserError(
                f"training {name}: {metric} is {value} at step {line['step']}; last good checkpoint: {kept}; "
                "lower learning_rate or head_multiplier, or look at the rewards of the data"
            )

