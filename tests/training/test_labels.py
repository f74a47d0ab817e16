"""Training on step labels and on pairs: the losses by hand and against torch, branches of a row, mixtures, heads."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import AutoModelForTokenClassification

from data_pipeline.supervision import of_pairs, pair_layout
from jaxprm import config as config_lib
from jaxprm.hf import writer
from jaxprm.losses import label_sums, preference_sums
from jaxprm.model import sharding
from jaxprm.model.attention import packed_attention, splash_attention
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.transformer import RewardModel, reward_model_graph
from jaxprm.training.step import loss_and_gradients, readouts, reward_loss
from tests.training.supervised_records import batch_of, pair, split_of, walk

SIZES = {"vocab_size": 20, "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8}
PLAIN = TransformerConfig(**SIZES, intermediate_size=24)
TWO_LABELS = TransformerConfig(**SIZES, intermediate_size=24, head=Head(2, bias=True))
NAN = np.nan


def parameters(config: TransformerConfig, seed: int = 0) -> nnx.State:
    """A model whose values spread: a head and a bias of unit scale."""
    state = jax.jit(lambda: nnx.state(RewardModel(config, rngs=nnx.Rngs(seed))))()
    rng = np.random.default_rng(seed)
    shape = state["head"][...].shape
    state["head"] = nnx.Param(jnp.asarray(rng.normal(size=shape) * SIZES["hidden_size"] ** -0.5, jnp.float32))
    if config.head.bias:
        state["head_bias"] = nnx.Param(jnp.asarray([0.3, -0.2], jnp.float32))
    return state


def settings(objective: str = "step_labels", **changes) -> config_lib.RewardModelConfig:
    return config_lib.RewardModelConfig(label="labels", objective=objective, **changes)


# Losses by hand


def test_the_losses_of_a_label_are_those_of_the_equations():
    promises, targets = np.array([0.9, 0.2, 0.5, 0.3]), np.array([1.0, 0.0, 0.25, NAN])
    weights = np.array([2.0, 1.0, 1.0, 0.0])
    log_odds = np.log(promises / (1 - promises))
    cross_entropy = label_sums(promises, targets, weights, log_odds=log_odds)
    hand = -2 * np.log(0.9) - np.log(0.8) - 0.25 * np.log(0.5) - 0.75 * np.log(0.5)
    assert float(cross_entropy.value) == pytest.approx(hand, rel=1e-6) and float(cross_entropy.weight) == 4
    squared = label_sums(promises, targets, weights)
    assert float(squared.value) == pytest.approx((2 * 0.01 + 0.04 + 0.0625) / 2, rel=1e-6)
    # Far from the label the cross-entropy is linear: no overflow, and no gradient of 0.
    far = lambda z: label_sums(jax.nn.sigmoid(z), jnp.zeros(1), jnp.ones(1), log_odds=z).value
    assert float(far(jnp.full(1, 200.0))) == 200 and float(jax.grad(far)(jnp.full(1, 200.0))[0]) == 1


def test_the_loss_of_pairs_compares_each_rejected_action_with_the_chosen_one():
    values = np.array([[0.5, 0.2, 0.9, 7.0, 1.0, 1.0]])
    step_index = np.array([[0, 1, 2, 0, 0, 1]])
    valid = np.array([[True, True, True, False, True, True]])
    sums = preference_sums(values, step_index, valid, np.array([[2.0, 2.0, 2.0, 9.0, 1.0, 1.0]]))
    hand = 2 * np.log1p(np.exp(-0.3)) + 2 * np.log1p(np.exp(0.4)) + np.log(2)
    assert float(sums.loss.value) == pytest.approx(hand, rel=1e-6) and float(sums.loss.weight) == 5
    assert float(sums.ordered) == pytest.approx(2.5)  # one of two, and a tie counts half
    assert float(sums.margins) == pytest.approx(2 * (0.3 - 0.4), abs=1e-6)


# Against TRL's PRMTrainer: the token classification loss of transformers, computed by torch

LABELLED = [walk(1, [1, 0, NAN]), walk(2, [0, 1]), walk(3, [NAN, 1, 1, 0])]


def test_binary_labels_have_the_loss_and_the_gradients_of_a_token_classifier_in_torch(tmp_path):
    """As in TRL 0.2x: a label at the last token of every step, -100 elsewhere, cross-entropy of two classes."""
    state = parameters(TWO_LABELS)
    writer.write_model(tmp_path, TWO_LABELS, state, pad_id=0, end_id=1, max_length=64)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    length = max(len(record["tokens"]) for record in LABELLED)
    ids, mask, labels = (np.full((len(LABELLED), length), fill, np.int64) for fill in (0, 0, -100))
    for row, record in enumerate(LABELLED):
        count = len(record["tokens"])
        ids[row, :count], mask[row, :count] = record["tokens"], 1
        for read, label in zip(record["reads"], record["labels"], strict=True):
            labels[row, read] = -100 if np.isnan(label) else int(label)
    logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 2), torch.tensor(labels).reshape(-1), ignore_index=-100
    )
    expected.backward()

    batch = batch_of(LABELLED, rows=1)  # packed: three conversations in one row
    loss, metrics, gradients = jax.jit(
        lambda p: loss_and_gradients(reward_model_graph(TWO_LABELS), p, None, batch, settings())
    )(state)
    assert float(loss) == float(metrics["label_loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(metrics["weight"]) == 7 and float(metrics["target_mean"]) == pytest.approx(4 / 7)
    theirs = {
        name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    blocks = gradients["transformer"]["blocks"]
    ours = {
        "score.weight": gradients["head"][...].T,
        "score.bias": gradients["head_bias"][...],
        "model.embed_tokens.weight": gradients["transformer"]["embedding"][...],
        "model.norm.weight": gradients["transformer"]["norm"][...],
        "model.layers.0.self_attn.q_proj.weight": blocks["query"][...][0].T,
        "model.layers.0.mlp.down_proj.weight": blocks["down"][...][0].T,
    }
    for name, gradient in ours.items():
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(gradient, theirs[name], atol=2e-5 * scale, err_msg=name)


# Mixtures


def test_labels_are_mixed_with_outcomes_step_by_step():
    """Naive loops: PVM's targets, labels of weight .25, all four cases of having an outcome and a label."""
    records = [walk(1, [1, NAN, 0], outcome=1.0, weight=2), walk(2, [NAN, -1]), walk(3, [NAN, NAN], outcome=0.5)]
    batch, state = batch_of(records), parameters(PLAIN)
    chosen = settings("pvm", labels=config_lib.LabelsConfig(loss="mse", weight=0.25, range=(-1.0, 1.0)))

    @jax.jit
    def compute(state):
        values, _ = readouts(nnx.merge(reward_model_graph(PLAIN), state), batch, states=False)
        return values, *reward_loss(reward_model_graph(PLAIN), state, None, batch, chosen)

    values, loss, metrics = compute(state)
    total = label_total = weight = 0.0
    for row, slot in np.argwhere(batch["valid"]):
        label, w, value = batch["step_labels"][row, slot], batch["weights"][row, slot], float(values[row, slot])
        record = next(r for r in records if r["weight"] == w and len(r["reads"]) > 0 and _holds(r, batch, row, slot))
        outcome, has_label = np.sum(record["rewards"]), not np.isnan(label)
        if np.isnan(outcome) and not has_label:
            continue
        share = 0.0 if not has_label else 1.0 if np.isnan(outcome) else 0.25
        label_total += w * share * (value - (label + 1) / 2) ** 2 / 2 if has_label else 0
        total += w * (1 - share) * (value - outcome) ** 2 / 2 if not np.isnan(outcome) else 0
        weight += w
    assert weight == 2 * 3 + 1 + 2 == float(metrics["weight"])
    assert float(metrics["value_loss"]) == pytest.approx(total / weight, rel=1e-5)
    assert float(metrics["label_loss"]) == pytest.approx(label_total / weight, rel=1e-5)
    assert float(loss) == pytest.approx((total + label_total) / weight, rel=1e-5)


def _holds(record: dict, batch: dict, row: int, slot: int) -> bool:
    """Whether the step of a slot is of this record: its tokens end at the read position."""
    read = (
        record["reads"][batch["step_index"][row, slot]] if batch["step_index"][row, slot] < len(record["reads"]) else -1
    )
    end = batch["read_positions"][row, slot]
    return read >= 0 and np.array_equal(batch["tokens"][row, end - read : end + 1], record["tokens"][: read + 1])


@pytest.mark.parametrize("objective", ["preference", pytest.param("agentprm", marks=pytest.mark.slow)])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(objective):
    if objective == "preference":
        records = [pair(1, 6, (3, 4), weight=3), pair(2, 8, (2, 5)), pair(3, 30, (9, 8)), pair(4, 20, (20, 12))]
        chosen, config = settings(objective), PLAIN
    else:
        records = [walk(1, [1, 0, NAN], 1.0, 3), walk(2, [0] * 12), walk(3, [1, NAN] * 5, 0.0), walk(4, [1, 1], 0.5)]
        chosen, config = settings(objective, labels=config_lib.LabelsConfig(weight=0.4)), TWO_LABELS
    batch, graph, state = batch_of(records, rows=4, length=64), reward_model_graph(config), parameters(config)
    compute = lambda count: jax.jit(lambda p: loss_and_gradients(graph, p, None, batch, _in_parts(chosen, count)))(
        state
    )
    (loss, metrics, gradients), (summed_loss, summed, summed_gradients) = compute(1), compute(2)
    assert float(summed_loss) == pytest.approx(float(loss), rel=1e-6)
    for name in metrics:
        assert float(summed[name]) == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-7), name
    difference = jax.tree.map(lambda a, b: a - b, summed_gradients, gradients)
    assert float(optax.tree.norm(gradients)) > 0
    assert float(optax.tree.norm(difference)) < 2e-6 * float(optax.tree.norm(gradients))


def _in_parts(chosen: config_lib.RewardModelConfig, count: int) -> config_lib.RewardModelConfig:
    return msgspec.structs.replace(chosen, microbatches=count)


# Pairs: actions as branches of one state


PAIRS = [pair(1, 7, (4, 3)), pair(2, 12, (2, 6, 5)), walk(3, [NAN, NAN], 1.0), pair(4, 5, (5, 5))]


def test_actions_after_one_state_have_the_promises_of_separate_conversations():
    batch, state = batch_of(PAIRS), parameters(PLAIN)
    model = lambda p: nnx.merge(reward_model_graph(PLAIN), p)
    together = np.asarray(jax.jit(lambda p: readouts(model(p), batch, states=False)[0])(state))
    separate = []
    for record in PAIRS:
        starts = [record["states"][0], *record["reads"]]
        for begin, end in itertools.pairwise(starts):
            tokens = record["tokens"][: end + 1]
            if len(set(record["states"])) == 1:  # the state, then this action alone
                tokens = np.concatenate(
                    [record["tokens"][: record["states"][0] + 1], record["tokens"][begin + 1 : end + 1]]
                )
            separate.append(
                {"tokens": tokens, "reads": [len(tokens) - 1], "states": [0], "rewards": [0], "labels": [0]}
            )
    alone = batch_of(separate, rows=4)
    expected = np.asarray(jax.jit(lambda p: readouts(model(p), alone, states=False)[0])(state))

    def by_tokens(batch, values):
        return {
            (batch["tokens"][row, read - 1], batch["tokens"][row, read], float(np.round(values[row, slot], 4)))
            for row, slot in np.argwhere(batch["valid"])
            for read in [batch["read_positions"][row, slot]]
        }

    assert by_tokens(batch, together) == by_tokens(alone, expected)
    # The test can fail: without branches a rejected action reads the chosen one.
    mixed = np.asarray(
        jax.jit(
            lambda p: readouts(model(p), {name: batch[name] for name in batch if name != "branches"}, states=False)[0]
        )(state)
    )
    assert by_tokens(batch, mixed) != by_tokens(alone, expected)


def test_the_layout_of_pairs_restarts_positions_after_the_state():
    split = split_of([pair(1, 3, (2, 1, 2)), walk(2, [0, 0], 1.0)])
    layout = pair_layout(split)
    assert of_pairs(split).tolist() == [True, False]
    assert layout.branches.tolist() == [0, 0, 0, 1, 1, 2, 3, 3] + [0] * 7
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, *range(7)]
    assert pair_layout(split_of([walk(2, [0, 0], 1.0)])) is None


@pytest.mark.slow
def test_the_tpu_kernel_reads_branches_as_the_reference_does():
    mesh = sharding.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
    rules = {name: getattr(sharding.RULES, name) for name in ("batch", "heads", "kv_heads", "length")}
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, count, 128, 64)) for key, count in zip(keys, (2, 1, 1), strict=True)]
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [70, 48, 10], axis=1), jnp.int32)
    branches = jnp.asarray(np.repeat([[0, 1, 2, 3, 0, 1, 2, 0]], [40, 10, 12, 8, 20, 20, 8, 10], axis=1), jnp.int32)
    kernel = splash_attention(mesh, **rules, most_branches=3, interpret=True)

    def mixed(attend):
        return jax.jit(
            lambda *arrays: jax.value_and_grad(
                lambda *x: jnp.sum(jnp.sin(attend(*x, segments, branches))), argnums=(0, 1, 2)
            )(*arrays)
        )(*arrays)

    (total, gradients), (expected, expected_gradients) = mixed(kernel), mixed(packed_attention)
    assert float(total) == pytest.approx(float(expected), rel=1e-4)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=2e-5)
