"""Small random models with varied scores, and conversations to score, for many tests."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline.encode import Encoder
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import RewardModel, Transformer, reward_model_graph
from jaxprm.training.imitate import train_tokenizer

# All sizes differ, so that a confusion of two axes is an error.
CONFIG = TransformerConfig(
    vocab_size=304, hidden_size=40, layers=3, heads=4, kv_heads=2, head_dim=12, intermediate_size=56, rope_theta=500.0
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
ITEMS = ["oak log", "oak planks", "stick", "iron ingot", "lantern", "torch"]


def randomised(state, seed: int):
    """Random parameters of the same shapes, none at zero or one, large enough that every part matters."""
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 0.7 if leaf.ndim > 1 and leaf.shape[-2] == CONFIG.vocab_size else leaf.shape[-2] ** -0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

    # Vectors are norms (ones) and biases (zeros): moved a little from their initial value.
    def near(leaf):
        return leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)

    is_vector = [leaf.ndim == 1 or (leaf.ndim == 2 and leaf.shape[0] == CONFIG.layers) for leaf in leaves]
    return jax.tree.unflatten(treedef, [near(x) if v else draw(x) for x, v in zip(leaves, is_vector, strict=True)])


def transformer(config: TransformerConfig = CONFIG, seed: int = 0):
    """nnx.State of a random Transformer."""
    return randomised(nnx.state(Transformer(config, rngs=nnx.Rngs(seed))), seed)


def reward_model(config: TransformerConfig = CONFIG, seed: int = 0):
    """nnx.State of a random RewardModel, whose values vary (standard deviation about 0.6), also at ends of turns."""
    state = randomised(nnx.state(RewardModel(config, rngs=nnx.Rngs(seed))), seed)
    head = np.random.default_rng(seed + 1).normal(size=config.hidden_size) * 2 * config.hidden_size**-0.5
    state["head"] = nnx.Param(jnp.asarray(head, jnp.float32))
    return state


@cache
def tokenizer_directory() -> Path:
    """A byte-level tokenizer of 304 tokens with the default chat template, made once per process."""
    directory = Path(mkdtemp(prefix="tiny-tokenizer-"))
    texts = [message["content"] for seed in range(8) for message in conversation(seed, turns=4)]
    train_tokenizer(texts, CONFIG.vocab_size, directory)
    return directory


@cache
def encoder() -> Encoder:
    return Encoder.load(tokenizer_directory())


def conversation(seed: int, *, turns: int = 3) -> list[dict]:
    """A prompt and `turns` actions with observations between them; it ends with an action."""
    rng = random.Random(seed)
    commands = ", ".join(f"craft {rng.randint(1, 4)} {item} using {rng.randint(1, 9)} stick" for item in ITEMS)
    messages = [{"role": "user", "content": f"Task {seed}. Crafting commands: {commands}. Goal: {rng.choice(ITEMS)}."}]
    for turn in range(turns):
        if turn:
            messages.append({"role": "user", "content": f"Got {rng.randint(1, 9)} {rng.choice(ITEMS)}"})
        messages.append({"role": "assistant", "content": f"Action: get {rng.randint(1, 9)} {rng.choice(ITEMS)}"})
    return messages


def write_policy(directory: Path, config: TransformerConfig = CONFIG) -> Path:
    """The directory of a language model, to start a reward model from."""
    return _write(directory, config, transformer(config))


def _write(directory: Path, config: TransformerConfig, state) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for source in tokenizer_directory().iterdir():
        (directory / source.name).write_bytes(source.read_bytes())
    writer.write_model(directory, config, state, pad_id=encoder().pad_id, end_id=encoder().end_id, max_length=1024)
    return directory


def write_reward_model(directory: Path, state=None, config: TransformerConfig = CONFIG, **described) -> Path:
    """The directory of a trained reward model, as training writes it."""
    _write(directory, config, reward_model(config) if state is None else state)
    about = {
        "label": "agentprm",
        "objective": "agentprm",
        "read_position": "last token of the rendering that ends with the action",
        "value_range": [0.0, 1.0],
        "targets": {"discount": 1.0, "gae_lambda": 0.95, "beta": 1.0},
        "base": "policies/tiny",
    }
    (directory / "reward_model.json").write_text(json.dumps(about | described))
    return directory


def values(state, tokens, positions=None, segments=None, config: TransformerConfig = CONFIG) -> np.ndarray:
    """Values [B, T] of every token, uncached; by default with one sequence per row."""
    tokens = jnp.asarray(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    return np.asarray(_values(reward_model_graph(config), state, tokens, jnp.asarray(positions), segments))


@jax.jit(static_argnums=0)
def _hidden(graph, state, tokens, segments):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return nnx.merge(graph, state)(tokens, positions, segments).hidden


def hidden(graph, state, tokens, segments) -> np.ndarray:
    """Hidden states [B, T, D] of a Transformer, uncached."""
    return np.asarray(_hidden(graph, state, tokens, segments))


@jax.jit(static_argnums=0)
def _values(graph, state, tokens, positions, segments):
    model = nnx.merge(graph, state)
    return model.value(model.transformer(tokens, positions, segments).hidden)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """A list of the compilations of XLA inside the block, one event name each."""
    seen: list[str] = []

    def listen(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def assert_close(ours, reference) -> float:
    """Within 1e-5 * max(1, rms); returns the largest difference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    difference = np.abs(ours - reference).max()
    bound = 1e-5 * max(1.0, np.sqrt(np.mean(reference**2)))
    assert difference <= bound, f"largest difference {difference:.2e} > {bound:.2e}"
    return float(difference)
