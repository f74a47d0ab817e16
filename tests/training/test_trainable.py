"""Parameters are split into trained and frozen ones and joined again, and adapters merge into plain matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import ForwardOptions, RewardModel, reward_model_graph
from jaxprm.training import trainable
from jaxprm.training.head import make_centre_head
from jaxprm.training.optimizer import make_optimizer
from jaxprm.training.step import hidden_states, loss_and_gradients, trained_readouts

CONFIG = TransformerConfig(
    vocab_size=20, hidden_size=16, layers=3, heads=2, kv_heads=1, head_dim=8, intermediate_size=24
)
GRAPH = reward_model_graph(CONFIG)
LORA = config_lib.LoraConfig(rank=2, alpha=6.0, targets=("query", "down"))
STEPS = {"is_first": [1, 0, 0, 1], "is_last": [0, 0, 1, 1], "valid": [1, 1, 1, 1]}
KINDS = ("full", "lora", "head", "last_k")


def settings(kind: str, **changes) -> config_lib.RewardModelConfig:
    return config_lib.RewardModelConfig(label="some", trainable=kind, last_k=2, lora=LORA, **changes)


@functools.cache
def parameters() -> nnx.State:
    """A random model whose values spread."""
    state = jax.jit(lambda: nnx.state(RewardModel(CONFIG, rngs=nnx.Rngs(3))))()
    state["transformer"]["embedding"] = nnx.Param(state["transformer"]["embedding"][...] * 50)
    state["head"] = nnx.Param(jax.random.normal(jax.random.key(1), (16,)) / 4)
    return state


@functools.cache
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(1, 20, (1, 24)).astype(np.int32),
        "positions": np.concatenate([np.arange(14), np.arange(10)])[None].astype(np.int32),
        "segments": np.repeat([1, 2], [14, 10])[None].astype(np.int32),
        "read_positions": np.array([[4, 8, 13, 20]], np.int32),
        "state_positions": np.array([[2, 6, 10, 17]], np.int32),
        "rewards": np.array([[0, 0, 1, 0.25]], np.float32),
        "weights": np.ones((1, 4), np.float32),
        **{name: np.array([flags], bool) for name, flags in STEPS.items()},
    }


def split(kind: str, key: int = 0):
    return trainable.split(settings(kind), parameters(), jax.random.key(key))


def names(state: nnx.State) -> set[str]:
    return {".".join(path) for path, _ in nnx.to_flat_state(state)}


@functools.cache
def forward(kind: str):
    step = functools.partial(trained_readouts, settings=settings(kind), forward_options=ForwardOptions(), states=True)
    return jax.jit(lambda trained, frozen, batch: jnp.stack(step(GRAPH, trained, frozen, batch)[:2]))


@pytest.mark.parametrize("kind", ["full", "head", "last_k"])
def test_split_and_joined_parameters_are_the_same(kind):
    merged = trainable.merged(settings(kind), *split(kind))
    assert names(merged) == names(parameters())
    for (path, actual), (_, expected) in zip(nnx.to_flat_state(merged), nnx.to_flat_state(parameters()), strict=True):
        np.testing.assert_array_equal(actual[...], expected[...], err_msg=str(path))


def test_only_what_is_trained_is_in_the_state():
    assert names(split("head")[0]) == {"head"}
    adapters = {f"adapters.blocks.{name}.{factor}" for name in LORA.targets for factor in "ab"}
    assert names(split("lora")[0]) == {"head"} | adapters
    trained, frozen = split("last_k")
    assert {"transformer.norm", "transformer.blocks.up", "head"} <= names(trained)
    assert "transformer.embedding" in names(frozen) and "transformer.embedding" not in names(trained)
    assert trained["transformer"]["blocks"]["up"].shape == (2, 16, 24)
    assert frozen["transformer"]["blocks"]["up"].shape == (1, 16, 24)
    # The optimizer has moments of trained parameters only: two for each number, and counters.
    optimizer = make_optimizer(learning_rate=1e-3, steps=9, warmup_steps=1, weight_decay=0.1, clip=1.0)
    for kind in KINDS:
        trained, _ = split(kind)
        moments = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(trained)) if leaf.ndim)
        assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained)), kind


def test_adapters_begin_as_nothing_and_merge_into_plain_matrices():
    trained, frozen = split("lora")
    plain = forward("full")(parameters(), nnx.State({}), batch())
    np.testing.assert_array_equal(forward("lora")(trained, frozen, batch()), plain)
    for index, pair in enumerate(trained["adapters"]["blocks"].values()):
        pair["b"] = nnx.Param(jax.random.normal(jax.random.key(index), pair["b"].shape) * 0.3)
    adapted = forward("lora")(trained, frozen, batch())
    merged = trainable.merged(settings("lora"), trained, frozen)
    assert np.abs(adapted - plain).max() > 0.05
    np.testing.assert_allclose(forward("full")(merged, nnx.State({}), batch()), adapted, rtol=1e-5, atol=1e-5)
    # By hand, of one layer: W + alpha / rank * A B.
    a, b = (trained["adapters"]["blocks"]["down"][factor][...][1] for factor in "ab")
    expected = parameters()["transformer"]["blocks"]["down"][...][1] + 3.0 * np.asarray(a) @ np.asarray(b)
    np.testing.assert_allclose(merged["transformer"]["blocks"]["down"][...][1], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        merged["transformer"]["blocks"]["up"][...], parameters()["transformer"]["blocks"]["up"][...]
    )


def test_another_seed_draws_other_adapters():
    first, other = (split("lora", key)[0]["adapters"]["blocks"]["query"]["a"][...] for key in (0, 1))
    assert np.abs(first - other).max() > 0.1


def gradients(kind: str, forward_options: ForwardOptions, batch: dict):
    trained, frozen = split(kind)
    chosen = settings(kind, bootstrap="state")
    step = jax.jit(lambda t, f, b: loss_and_gradients(GRAPH, t, None, b, chosen, forward_options, f)[2])
    return step(trained, frozen, batch)


@functools.cache
def full_gradients():
    return gradients("full", ForwardOptions(), batch())


def test_the_last_layers_have_the_gradient_that_they_have_in_the_full_model():
    last = gradients("last_k", ForwardOptions(frozen_layers=1), batch())
    for name, leaf in full_gradients()["transformer"]["blocks"].items():
        ours = last["transformer"]["blocks"][name][...]
        assert float(optax.tree.norm(ours - leaf[...][1:])) < 1e-5 * float(optax.tree.norm(leaf[...])), name
    np.testing.assert_allclose(last["head"][...], full_gradients()["head"][...], rtol=1e-5)


def test_nothing_of_frozen_layers_is_kept_for_the_backward_pass():
    """The residuals of tokens [L, 1, 24, ...] are those of two layers; without the split they are those of three."""

    def residuals(frozen_layers: int) -> int:
        trained, frozen = split("last_k")
        chosen, forward_options = settings("last_k"), ForwardOptions(frozen_layers=frozen_layers)

        def values(trained):
            return trained_readouts(GRAPH, trained, frozen, batch(), chosen, forward_options, states=False)[0]

        _, backward = jax.vjp(values, trained)
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(backward)]
        return sum(shape[0] for shape in shapes if shape[1:3] == (1, 24))

    assert 0 < residuals(1) < 0.7 * residuals(0)


def test_the_head_alone_learns_from_features_what_it_learns_from_tokens():
    """The gradient on cached hidden states is the head's in the full model."""
    model = nnx.merge(GRAPH, parameters())
    actions, before = jax.jit(lambda batch: hidden_states(model, batch, states=True))(batch())
    with_features = {name: array for name, array in batch().items() if name not in ("tokens", "positions")}
    trained, _ = split("head")
    chosen = settings("head", bootstrap="state")
    with_features |= {"read_features": actions, "state_features": before}
    _, _, head_gradients = loss_and_gradients(GRAPH, trained, None, with_features, chosen)
    np.testing.assert_allclose(head_gradients["head"][...], full_gradients()["head"][...], rtol=1e-5)


def test_a_centred_head_does_not_depend_on_what_is_trained_or_on_microbatches():
    """The two rows differ in tokens, outcomes and weights, so that rows cannot be mixed up."""
    rows = {name: np.concatenate([x, x]) for name, x in batch().items()}
    rows["rewards"][1] = [0, 0, 0.25, 1]
    rows["tokens"][1] = rows["tokens"][1, ::-1]
    rows["weights"][1] = 3
    heads = {}
    for kind, count in (("full", 1), ("full", 2), ("lora", 2), ("last_k", 1)):
        chosen = settings(kind, microbatches=count, bootstrap="state")
        centre = jax.jit(make_centre_head(GRAPH, chosen))
        trained, frozen = split(kind)
        heads[kind, count] = centre(trained, rows, frozen)["head"][...]
    model = nnx.merge(GRAPH, parameters())
    actions, before = jax.jit(lambda batch: hidden_states(model, batch, states=True))(rows)
    with_features = rows | {"read_features": actions, "state_features": before}
    heads["head", 1] = make_centre_head(GRAPH, chosen)(split("head")[0], with_features)["head"][...]
    for name, head in heads.items():
        np.testing.assert_allclose(head, heads["full", 1], rtol=1e-3, atol=1e-5, err_msg=str(name))
    assert np.abs(heads["full", 1] - parameters()["head"][...]).max() > 1e-3


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"last_k = 4, but the model has 3 layers; use at most 3"):
        trainable.check_trainable(config_lib.RewardModelConfig(label="x", trainable="last_k", last_k=4), CONFIG)
    trainable.check_trainable(config_lib.RewardModelConfig(label="x", last_k=4), CONFIG)
