"""Behaviour cloning: a small language model and its tokenizer, trained from scratch on an environment's expert.

Shapes: B rows, T tokens, D model.
"""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from data_pipeline.encode import Encoder
from data_pipeline.output import staged_directory
from jaxprm import config as config_lib
from jaxprm import environments, files
from jaxprm.artifacts.checkpoints import Checkpoints, abstract
from jaxprm.errors import UserError
from jaxprm.evaluation.statistics import bootstrap
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import Transformer, transformer_graph
from jaxprm.policies import language_model
from jaxprm.policies.rollouts import rollouts
from jaxprm.progress import bar
from jaxprm.training.optimizer import make_optimizer

LOOKAHEAD = 3  # episodes that may fit in no row before a batch is full
LOG_EVERY = 20  # steps
FINGERPRINT_STEPS = 16
MEASURED_TASKS = 100  # per split, at most

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"

# One token opens a message and one ends it: at 30-token turns ChatML's five would be a sixth of all tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% elif message['role'] in ['user', 'tool', 'system'] %}{{ '<|user|>' }}"
    "{% else %}{{ raise_exception('role ' + message['role'] + ' is not supported') }}{% endif %}"
    "{{ message['content'] }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def imitate(experiment: config_lib.Experiment, workdir: Path) -> Path:
    """Trains a policy by imitation, measures it, and returns its directory. A killed run resumes when called again.

    Raises UserError if the environment has no expert, or the work directory holds checkpoints of another recipe.
    """
    settings, seed = experiment.imitation, experiment.seed
    environment = environments.create(experiment.environment.name, experiment.environment.arguments)
    if not hasattr(environment, "demonstration"):
        raise UserError(
            f"environment {experiment.environment.name}: has no demonstration(rng), so there is nothing to imitate; "
            "set policy.path to a policy instead"
        )

    # Tokenizer and model
    tokenizer = _tokenizer(experiment, environment, workdir / "tokenizer")
    encoder = Encoder.load(tokenizer)
    plain = config_lib.to_dict(experiment)
    model_config = TransformerConfig(**plain["model"])
    optimizer = make_optimizer(
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip=1.0,
    )
    init, train_step = _programs(model_config, optimizer, seed)

    # Restore
    state, start = init(), 0
    recipe = {name: plain[name] for name in ("environment", "model", "imitation", "seed")}
    recipe["environment"] = {name: plain["environment"][name] for name in ("name", "arguments")}
    identity = {"recipe": config_lib.fingerprint(recipe), "tokenizer": encoder.fingerprint}
    checkpoints = Checkpoints(workdir / "checkpoints", identity)
    if (restored := checkpoints.restore(abstract(state))) is not None:
        start, state, _ = restored

    # Loop: a thread packs the next batch while the device computes this step
    metrics_path = workdir / "metrics.jsonl"
    earlier = [line for line in files.complete_lines(metrics_path) if line["step"] <= start]
    files.write_atomic(metrics_path, "".join(map(files.line, earlier)))
    with (
        ThreadPoolExecutor(1) as pool,
        files.appending(metrics_path) as append,
        bar("imitate", settings.steps, initial=start, unit="step") as progress,
    ):

        def batch_of(step: int) -> dict:
            return episode_rows(environment, encoder, settings, seed, step)

        next_batch = pool.submit(batch_of, start)
        for step in range(start, settings.steps):
            batch, next_batch = next_batch.result(), pool.submit(batch_of, step + 1)
            state, metrics = train_step(state, batch)
            is_last = step + 1 == settings.steps
            if is_last or (step + 1) % LOG_EVERY == 0:
                line = {"step": step + 1} | {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(line["loss"]):
                    raise UserError(
                        f"imitation: loss is {line['loss']} at step {step + 1}; the last good checkpoint is step "
                        f"{checkpoints.latest_step()}; lower imitation.learning_rate"
                    )
                append([line])
                progress.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{line['accuracy']:.3f}", refresh=False)
            progress.update()
            if is_last or (step + 1) % settings.checkpoint_every == 0:
                checkpoints.save(step + 1, state, {})
    checkpoints.close()

    # Output
    output = workdir / "policy"
    # Replaced as a whole: a policy is complete, with its numbers, or it is the earlier one.
    with staged_directory(output, overwrite=True) as staging:
        write_policy(staging, model_config, state["parameters"], encoder, tokenizer, experiment)
        description = {
            "recipe": recipe,
            "tokenizer": encoder.fingerprint,
            "data": _fingerprint(environment, encoder, experiment),
            "numbers": measure(experiment, staging),
        }
        files.write_json(staging / "recipe.json", description)
        _keep_others(output, staging)
    return output


def _keep_others(earlier: Path, staging: Path) -> None:
    """Copies what a user has put into the directory that is replaced."""
    for path in earlier.iterdir() if earlier.is_dir() else ():
        if not (staging / path.name).exists():
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, staging / path.name)


def _tokenizer(experiment: config_lib.Experiment, environment, directory: Path) -> Path:
    """Directory of the tokenizer, which is trained on demonstrations if it is missing."""
    if not (directory / "tokenizer.json").exists():
        settings, rng = experiment.imitation, random.Random(f"tokenizer/{experiment.seed}")
        episodes = (
            environment.demonstration(rng, **settings.demonstrations) for _ in range(settings.tokenizer_episodes)
        )
        texts = (message["content"] for episode in episodes for message in episode)
        # Staged: a kill must not leave the half of a tokenizer, which would be taken for one.
        with staged_directory(directory, overwrite=True) as staging:
            train_tokenizer(texts, experiment.model.vocab_size, staging)
    return directory


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Trains a byte-level BPE tokenizer and writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast  # slow to import

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # GPT-2's pre-tokenizer keeps the space before a number; with Qwen2's every count would be two tokens.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def episode_rows(environment, encoder: Encoder, settings: config_lib.ImitationConfig, seed: int, step: int) -> dict:
    """The batch of one step: expert episodes packed into rows until three of them in sequence fit into no row.

    A function of `seed` and `step` alone, so a resumed run needs no data position. An episode longer than a row is cut.

    Returns:
        {"tokens", "positions", "segments"} int32 and {"weights"} float32, all [B, T]. A weight is 1 where the next
        token is the expert's own.
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


def _programs(model_config: TransformerConfig, optimizer, seed: int):
    """The jitted functions init() -> state and train_step(state, batch) -> (state, metrics); the state is donated."""
    graph = transformer_graph(model_config)

    @jax.jit
    def init():
        parameters = nnx.state(Transformer(model_config, rngs=nnx.Rngs(seed)))
        return {"parameters": parameters, "optimizer": optimizer.init(parameters)}

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        def loss_of(parameters):
            return imitation_loss(nnx.merge(graph, parameters), batch)

        (loss, accuracy), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["parameters"])
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
        parameters = optax.apply_updates(state["parameters"], updates)
        return {"parameters": parameters, "optimizer": optimizer_state}, {"loss": loss, "accuracy": accuracy}

    return init, train_step


def imitation_loss(model: Transformer, batch: dict) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy of the expert's tokens, share of them predicted right), scalars."""
    hidden = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
    next_tokens = jnp.roll(batch["tokens"], -1, axis=-1)

    # Row by row and recomputed in the backward pass: the logits of all rows [B, T, V] are never in memory together.
    @jax.checkpoint
    def row_sums(row):
        hidden, targets, weights = row
        logits = model.logits(hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()

    losses, correct = jax.lax.map(row_sums, (hidden, next_tokens, batch["weights"]))
    total = batch["weights"].sum()
    return losses.sum() / total, correct.sum() / total


def write_policy(output: Path, model_config, parameters, encoder: Encoder, tokenizer: Path, experiment) -> None:
    """Writes the policy in Hugging Face format, with its tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    for source in tokenizer.iterdir():
        (output / source.name).write_bytes(source.read_bytes())
    ids = {"pad_id": encoder.pad_id, "end_id": encoder.end_id}
    writer.write_model(output, model_config, parameters, **ids, max_length=experiment.policy.max_tokens)


def _fingerprint(environment, encoder: Encoder, experiment: config_lib.Experiment) -> str:
    """sha256 of the first batches, which identify the others: all are a function of seed and step."""
    digest = hashlib.sha256()
    for step in range(FINGERPRINT_STEPS):
        batch = episode_rows(environment, encoder, experiment.imitation, experiment.seed, step)
        digest.update(batch["tokens"].tobytes())
    return digest.hexdigest()


def measure(experiment: config_lib.Experiment, policy_directory: Path) -> dict:
    """Success of a policy on training and validation tasks: {split: {"greedy", "0.7", "1.0": estimate over tasks}}.

    0.7 and 1.0 are sampling temperatures. Test tasks are not used.
    """
    policy = language_model.load(str(policy_directory), seed=experiment.seed, settings=experiment.policy)
    make = functools.partial(environments.create, experiment.environment.name, experiment.environment.arguments)
    numbers: dict[str, dict] = {}
    for split in ("train", "validation"):
        tasks = list(make().tasks(split))
        tasks = tasks[:: max(1, len(tasks) // MEASURED_TASKS)]
        for name, temperature, count in (("greedy", 0.0, 1), ("0.7", 0.7, 4), ("1.0", 1.0, 4)):
            jobs = [(task, number) for task in tasks for number in range(count)]
            outcomes: dict[str, list[float]] = {}
            with bar(f"measure {split} {name}", len(jobs), unit="episode") as progress:
                options = {"temperature": temperature, "in_flight": experiment.policy.in_flight}
                for episode in rollouts(make, policy, jobs, **options):
                    outcomes.setdefault(episode.task, []).append(episode.outcome or 0.0)
                    progress.update()
            means = [float(np.mean(task_outcomes)) for task_outcomes in outcomes.values()]
            numbers.setdefault(split, {})[name] = bootstrap(means)
    return numbers
