"""A toy dataset with known values: a random walk on 0..6 that succeeds at 6, and fails at 0 or after six moves.

Every action names the position it goes to, so the promise of a step is a function of the text before its read position.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
from flax import nnx

from data_pipeline.build import build
from data_pipeline.encode import Encoder
from data_pipeline.trajectory import Message, Trajectory, to_line
from jaxprm import config as config_lib
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import Transformer
from jaxprm.training.imitate import train_tokenizer

GOAL, LIMIT = 6, 6
SIZES = TransformerConfig(
    vocab_size=300, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=64
)


class Toy(NamedTuple):
    """The inputs of a training run: an experiment, a dataset directory and a policy directory."""

    experiment: config_lib.Experiment
    shards: Path
    base: Path

    def settings(self, **changes) -> config_lib.RewardModelConfig:
        return msgspec.structs.replace(self.experiment.reward_models[0], **changes)


def walk(rng: random.Random, task: str, number: int, start: int) -> Trajectory:
    position, messages = start, [Message(role="user", content=f"start at {start}, reach {GOAL}")]
    for move in range(LIMIT):
        position += 1 if rng.random() < 0.6 else -1
        messages.append(Message(role="assistant", content=f"go to {position}"))
        if position in (0, GOAL) or move == LIMIT - 1:
            break
        messages.append(Message(role="user", content=f"at {position}"))
    return Trajectory(
        id=f"{task}#{number}", task=task, messages=messages, outcome=float(position == GOAL), ended="done"
    )


def walks(seed: int, split: str, tasks: int, count: int) -> list[Trajectory]:
    """`count` walks of each task. A task has a start and a number, so equal texts may belong to different tasks."""
    rng = random.Random(seed)
    return [
        walk(rng, f"{split}/{task}", number, start=2 + task % 4) for task in range(tasks) for number in range(count)
    ]


def write_base(directory: Path, texts: list[str], *, seed: int = 0) -> Path:
    """Writes a random policy with a tokenizer trained on `texts`, and returns its directory."""
    train_tokenizer(texts, SIZES.vocab_size, directory)
    encoder = Encoder.load(directory)
    parameters = jax.jit(lambda: nnx.state(Transformer(SIZES, rngs=nnx.Rngs(seed))))()
    # An embedding of unit scale, as in a trained policy: from 0.02 the first hundred steps would only scale it up.
    parameters["embedding"] = nnx.Param(parameters["embedding"][...] * 50)
    writer.write_model(directory, SIZES, parameters, pad_id=encoder.pad_id, end_id=encoder.end_id, max_length=256)
    return directory


def make_toy(folder: Path) -> Toy:
    """Writes the dataset and the policy to an empty folder."""
    splits = {"train": walks(0, "train", 24, 24), "validation": walks(1, "validation", 12, 16)}
    base = write_base(folder / "policy", [m.content for t in splits["train"] for m in t.messages])
    inputs = {}
    for split, trajectories in splits.items():
        inputs[split] = [folder / f"{split}.jsonl"]
        inputs[split][0].write_text("".join(to_line(trajectory) + "\n" for trajectory in trajectories))
    build(inputs, Encoder.load(base), folder / "shards", max_length=128, shards=2)
    experiment = config_lib.Experiment(
        name="toy",
        data=config_lib.DataConfig(rows=8, length=128, steps_per_row=32),
        reward_models=(
            config_lib.RewardModelConfig(
                label="toy", epochs=4, learning_rate=3e-3, head_multiplier=3.0, evaluate_every=20, checkpoint_every=20
            ),
        ),
    )
    return Toy(experiment, folder / "shards", base)
