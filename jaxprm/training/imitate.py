"""Behaviour cloning: a small language model from nothing, taught by an environment's expert.

The expert's episodes are free, so the data are a function of (seed, step): no epoch, no file, exact resume.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from data_pipeline.encode import Encoder
from jaxprm import config as config_lib
from jaxprm import environments
from jaxprm.errors import UserError
from jaxprm.model import huggingface
from jaxprm.model.transformer import Transformer, TransformerConfig
from jaxprm.policies.tokenizer import train_tokenizer
from jaxprm.progress import bar
from jaxprm.training.checkpoint import Checkpoints, abstract
from jaxprm.training.optimizer import adamw

LOOKAHEAD = 3


def episode_rows(environment, encoder: Encoder, settings: config_lib.Imitation, seed: int, step: int) -> dict:
    """The batch of one step: expert episodes packed into rows [B, T] until three in a row fit nowhere.

    tokens, positions, segments int32 and weights float32, all [B, T]; weights are 1 where the next token is the
    expert's own. An episode longer than a row is cut at its end.
    """
    rng = random.Random(f"imitation/{seed}/{step}")
    shape = (settings.rows, settings.length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segments")}
    batch["weights"] = np.zeros(shape, np.float32)
    used, count, misses = [0] * settings.rows, [0] * settings.rows, 0
    while misses < LOOKAHEAD:
        messages = environment.demonstration(rng, **settings.demonstrations)
        encoded = encoder.trajectory(messages, row=f"demonstration of step {step}")
        length = min(len(encoded.tokens), settings.length)
        row = next((r for r in range(settings.rows) if used[r] + length <= settings.length), None)
        if row is None:
            misses += 1
            continue
        start, count[row] = used[row], count[row] + 1
        used[row] += length
        batch["tokens"][row, start : used[row]] = encoded.tokens[:length]
        batch["positions"][row, start : used[row]] = np.arange(length)
        batch["segments"][row, start : used[row]] = count[row]
        for state, read in zip(encoded.state_positions, encoded.read_positions, strict=True):
            batch["weights"][row, start + state : start + min(read, length - 1)] = 1
    return batch


def imitation_loss(model: Transformer, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the expert's tokens, and the share predicted right. Logits exist for one row at a time."""
    hidden = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
    following = jnp.roll(batch["tokens"], -1, axis=-1)

    @jax.checkpoint
    def row_sums(row):
        hidden, targets, weights = row
        logits = model.logits(hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()

    losses, right = jax.lax.map(row_sums, (hidden, following, batch["weights"]))
    total = batch["weights"].sum()
    return losses.sum() / total, right.sum() / total


def imitate(experiment: config_lib.Experiment, workdir: Path) -> Path:
    """Trains a policy by imitation and returns its directory; resumes by itself after a kill."""
    settings, seed = experiment.imitation, experiment.seed
    environment = environments.create(experiment.environment.name, experiment.environment.arguments)
    if not hasattr(environment, "demonstration"):
        raise UserError(
            f"environment {experiment.environment.name}: has no demonstration(rng), so there is nothing to imitate; "
            "bring a policy instead (policy.path)"
        )
    tokenizer = workdir / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        rng = random.Random(f"tokenizer/{seed}")
        episodes = (environment.demonstration(rng, **settings.demonstrations) for _ in range(settings.tokenizer_episodes))
        train_tokenizer((m["content"] for episode in episodes for m in episode), experiment.model.vocab_size, tokenizer)
    encoder = Encoder.load(tokenizer)
    sizes = config_lib.to_dict(experiment)["model"]
    model_config = TransformerConfig(**sizes)

    graph = huggingface.transformer_graph(model_config)
    optimizer = adamw(
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip=1.0,
    )

    @jax.jit
    def init():
        parameters = nnx.state(Transformer(model_config, rngs=nnx.Rngs(seed)))
        return {"parameters": parameters, "optimizer": optimizer.init(parameters)}

    @jax.jit(donate_argnums=0)
    def train_step(state, batch):
        def loss_of(parameters):
            return imitation_loss(nnx.merge(graph, parameters), batch)

        (loss, accuracy), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["parameters"])
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
        parameters = optax.apply_updates(state["parameters"], updates)
        return {"parameters": parameters, "optimizer": optimizer_state}, {"loss": loss, "accuracy": accuracy}

    state, start = init(), 0
    identity = {"config": config_lib.fingerprint({"model": sizes, "imitation": config_lib.to_dict(experiment)["imitation"]})}
    checkpoints = Checkpoints(workdir / "checkpoints", identity)
    if (restored := checkpoints.restore(abstract(state))) is not None:
        start, state, _ = restored
    log = (workdir / "metrics.jsonl").open("a")
    with ThreadPoolExecutor(1) as pool, bar("imitate", settings.steps, initial=start, unit="step") as progress:

        def batch_of(step):
            return episode_rows(environment, encoder, settings, seed, step)

        ahead = pool.submit(batch_of, start)
        for step in range(start, settings.steps):
            batch, ahead = ahead.result(), pool.submit(batch_of, step + 1)
            state, metrics = train_step(state, batch)
            if (step + 1) % 20 == 0:
                line = {"step": step + 1, "seconds": round(time.time(), 1), "fill": float((batch["segments"] > 0).mean())}
                line |= {name: float(value) for name, value in metrics.items()}
                log.write(json.dumps(line) + "\n")
                log.flush()
                progress.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{line['accuracy']:.3f}")
            progress.update()
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                checkpoints.save(step + 1, state, {})
    checkpoints.close()
    log.close()
    return write_policy(workdir / "policy", model_config, state["parameters"], encoder, tokenizer, experiment)


def write_policy(output: Path, model_config, parameters, encoder: Encoder, tokenizer: Path, experiment) -> Path:
    """The policy as a Hugging Face directory with its recipe beside it."""
    output.mkdir(parents=True, exist_ok=True)
    for source in tokenizer.iterdir():
        (output / source.name).write_bytes(source.read_bytes())
    huggingface.write_model(
        output,
        model_config,
        parameters,
        pad_id=encoder.pad_id,
        end_id=encoder.end_id,
        max_length=experiment.policy.max_tokens,
    )
    recipe = {"recipe": config_lib.to_dict(experiment), "tokenizer_fingerprint": encoder.fingerprint}
    (output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return output
