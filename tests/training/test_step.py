"""The train step against naive loops: weights, targets from a target network, state values, their losses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxprm import config as config_lib
from jaxprm import objectives
from jaxprm.errors import UserError
from jaxprm.losses import LossSums
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import ForwardOptions, RewardModel, reward_model_graph
from jaxprm.training.step import (
    checked_targets,
    initial_state,
    loss_and_gradients,
    make_train_step,
    readouts,
    reward_loss,
)

CONFIG = TransformerConfig(
    vocab_size=20, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate_size=24
)
GRAPH = reward_model_graph(CONFIG)
ROWS, LENGTH, SLOTS = 2, 48, 12
BETA, LAMBDA = 0.5, 0.8


def pack(rows: list[list[dict]]) -> dict[str, np.ndarray]:
    """Trajectories {"tokens", "reads", "states", "outcome", "weight"} in the rows they are given in."""
    batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "segments", "positions")}
    batch |= {name: np.zeros((ROWS, SLOTS), np.int32) for name in ("read_positions", "state_positions")}
    batch |= {name: np.zeros((ROWS, SLOTS), np.float32) for name in ("rewards", "weights")}
    batch |= {name: np.zeros((ROWS, SLOTS), bool) for name in ("is_first", "is_last", "valid")}
    for row, trajectories in enumerate(rows):
        token = slot = 0
        for number, walk in enumerate(trajectories, start=1):
            length, steps = len(walk["tokens"]), len(walk["reads"])
            span, slots = slice(token, token + length), slice(slot, slot + steps)
            batch["tokens"][row, span], batch["segments"][row, span] = walk["tokens"], number
            batch["positions"][row, span] = np.arange(length)
            batch["read_positions"][row, slots] = np.array(walk["reads"]) + token
            batch["state_positions"][row, slots] = np.array(walk["states"]) + token
            batch["weights"][row, slots], batch["valid"][row, slots] = walk["weight"], True
            batch["is_first"][row, slot], batch["is_last"][row, slot + steps - 1] = True, True
            batch["rewards"][row, slot + steps - 1] = walk["outcome"]
            token, slot = token + length, slot + steps
    return batch


def trajectory(seed: int, steps: int, outcome: float, weight: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    reads = [3 + 3 * step for step in range(steps)]
    tokens = rng.integers(1, CONFIG.vocab_size, reads[-1] + 1)
    return {
        "tokens": tokens,
        "reads": reads,
        "states": [read - 2 for read in reads],
        "outcome": outcome,
        "weight": weight,
    }


def parameters(seed: int):
    """A model whose values spread: a head of unit scale."""
    state = jax.jit(lambda: nnx.state(RewardModel(CONFIG, rngs=nnx.Rngs(seed))))()
    head = np.random.default_rng(seed).normal(size=CONFIG.hidden_size) * CONFIG.hidden_size**-0.5
    return nnx.State({"transformer": state["transformer"], "head": nnx.Param(jax.numpy.asarray(head, np.float32))})


def settings(**changes) -> config_lib.RewardModelConfig:
    return config_lib.RewardModelConfig(label="step", beta=BETA, gae_lambda=LAMBDA, **changes)


@pytest.fixture(scope="module")
def copy_step():
    """An online-like step: its target network is a copy every second step. Plain gradient descent."""
    chosen = settings(target_update="copy", target_every=2)
    step = jax.jit(make_train_step(GRAPH, optax.sgd(0.1), chosen))
    return step, initial_state(parameters(0), optax.sgd(0.1), chosen)


def naive_loss(values, state_values, target_values, target_states, batch, chosen, objective) -> dict[str, float]:
    """Loops over the steps of every trajectory; sums divided by the weight of the steps trained."""
    sums = {"value": 0.0, "progress": 0.0, "state": 0.0, "weight": 0.0}
    for row in range(ROWS):
        slots = np.flatnonzero(batch["valid"][row])
        for begin in slots[batch["is_first"][row, slots]]:
            end = begin + int(np.flatnonzero(batch["is_last"][row, begin:])[0])
            outcome, weight = batch["rewards"][row, end], batch["weights"][row, begin]
            targets = {end: outcome}
            for t in range(end - 1, begin - 1, -1):
                if objective != "agentprm":
                    targets[t] = outcome
                elif chosen.bootstrap == "action":
                    targets[t] = (1 - LAMBDA) * target_values[row, t] + LAMBDA * targets[t + 1]
                else:
                    targets[t] = (1 - LAMBDA) * target_states[row, t + 1] + LAMBDA * targets[t + 1]
            for t in [end] if objective == "orm" else range(begin, end + 1):
                sums["weight"] += weight
                sums["value"] += weight * (values[row, t] - targets[t]) ** 2 / 2
                if state_values is not None:
                    sums["state"] += weight * (state_values[row, t] - targets[t]) ** 2 / 2
                if t > begin and objective == "agentprm":
                    change = values[row, t] - values[row, t - 1] - (targets[t] - targets[t - 1])
                    sums["progress"] += weight * change**2 / 2
    return {f"{name}_loss": sums[name] / sums["weight"] for name in ("value", "progress", "state")}


ROWS_OF_TWO = [
    [trajectory(1, 3, 1.0, weight=3.0), trajectory(2, 2, 0.0)],
    [trajectory(3, 4, 0.25, weight=2.0), trajectory(4, 1, 1.0)],
]


def test_a_weight_is_a_repetition_through_the_whole_step(copy_step):
    step, state = copy_step
    thrice, once = trajectory(1, 3, 1.0, weight=3.0), trajectory(2, 4, 0.0)
    weighted = pack([[once], [thrice]])
    repeated = pack([[thrice | {"weight": 1.0}, once], [thrice | {"weight": 1.0}] * 2])
    weighted_state, metrics = step(state, weighted)
    repeated_state, expected = step(state, repeated)
    assert float(metrics["weight"]) == float(expected["weight"]) == 13
    for name in ("loss", "value_loss", "progress_loss", "gradient_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    moved = jax.tree.map(lambda after, before: after - before, weighted_state["parameters"], state["parameters"])
    difference = jax.tree.map(lambda a, b: a - b, weighted_state["parameters"], repeated_state["parameters"])
    assert float(optax.tree.norm(difference)) < 1e-5 * float(optax.tree.norm(moved))
    # The test can fail: without the weight the loss differs.
    _, unweighted = step(state, pack([[once], [thrice | {"weight": 1.0}]]))
    assert abs(float(unweighted["loss"]) - float(metrics["loss"])) > 1e-2 * float(metrics["loss"])


def test_a_copied_target_network_stands_still_between_copies(copy_step):
    step, state = copy_step
    batch, states = pack(ROWS_OF_TWO), [state]
    for _ in range(3):
        states.append(step(states[-1], batch)[0])
    heads = [np.asarray(state["parameters"]["head"][...]) for state in states]
    targets = [np.asarray(state["target"]["head"][...]) for state in states]
    assert [int(state["step"]) for state in states] == [0, 1, 2, 3]
    assert not np.array_equal(heads[0], heads[1])
    for target, source in zip(targets, (0, 0, 2, 2), strict=True):
        np.testing.assert_array_equal(target, heads[source])


def test_targets_come_from_the_moving_average_and_state_values_are_trained():
    chosen = settings(bootstrap="state", target_update="ema", target_decay=0.75)
    optimizer, batch = optax.sgd(0.1), pack(ROWS_OF_TWO)
    state = initial_state(parameters(0), optimizer, chosen) | {"target": parameters(5)}
    read = jax.jit(lambda parameters: readouts(nnx.merge(GRAPH, parameters), batch, states=True))
    values, state_values = map(np.asarray, read(state["parameters"]))
    target_values, target_states = map(np.asarray, read(state["target"]))
    assert np.std(values[batch["valid"]]) > 0.3 and np.std((target_states - state_values)[batch["valid"]]) > 0.3

    new, metrics = jax.jit(make_train_step(GRAPH, optimizer, chosen))(state, batch)
    expected = naive_loss(values, state_values, target_values, target_states, batch, chosen, "agentprm")
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    total = expected["value_loss"] + BETA * expected["progress_loss"] + expected["state_loss"]
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-5)
    assert int(metrics["tokens"]) == np.count_nonzero(batch["segments"])
    mixed = jax.tree.map(lambda old, now: 0.75 * old + 0.25 * now, state["target"], new["parameters"])
    for actual, expected in zip(jax.tree.leaves(new["target"]), jax.tree.leaves(mixed), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", ["agentprm", "pvm", "orm"])
def test_every_objective_is_its_naive_loss(objective):
    chosen, batch, state = settings(objective=objective), pack(ROWS_OF_TWO), parameters(0)

    @jax.jit
    def compute(state):
        values, _ = readouts(nnx.merge(GRAPH, state), batch, states=False)
        return values, *reward_loss(GRAPH, state, None, batch, chosen)

    values, loss, metrics = compute(state)
    expected = naive_loss(np.asarray(values), None, np.asarray(values), None, batch, chosen, objective)
    assert float(metrics["value_loss"]) == pytest.approx(expected["value_loss"], rel=1e-5)
    if objective == "agentprm":
        assert float(metrics["progress_loss"]) == pytest.approx(expected["progress_loss"], rel=1e-5)
    trained = batch["valid"] & (batch["is_last"] | (objective != "orm"))
    mean = np.average(np.asarray(values)[trained], weights=batch["weights"][trained])
    assert float(metrics["value_mean"]) == pytest.approx(mean, rel=1e-4, abs=1e-5)
    if objective != "agentprm":
        outcomes = [walk["outcome"] for row in ROWS_OF_TWO for walk in row]
        steps = [
            walk["weight"] * (1 if objective == "orm" else len(walk["reads"])) for row in ROWS_OF_TWO for walk in row
        ]
        assert float(metrics["target_mean"]) == pytest.approx(np.average(outcomes, weights=steps), rel=1e-5)
    beta = BETA if objective == "agentprm" else 0.0  # the baselines have no progress loss
    assert float(loss) == pytest.approx(expected["value_loss"] + beta * expected["progress_loss"], rel=1e-5)


def test_an_objective_with_its_own_loss_is_trained_by_it(monkeypatch):
    """Absolute errors of the outcome at last steps, by hand: no squared error and no progress loss."""

    def targets(values, rewards, is_last, valid, settings, state_values):
        return rewards, valid & is_last

    def absolute_errors(values, targets, is_first, mask, weights, settings):
        errors = jnp.where(mask, weights * jnp.abs(values - targets), 0)
        return LossSums(errors.sum(), jnp.zeros(()), jnp.where(mask, weights, 0).sum())

    own = objectives.Objective(name="own", targets=targets, card_text="own", loss=absolute_errors)
    monkeypatch.setattr(objectives, "OBJECTIVES", objectives.OBJECTIVES | {"own": own})
    batch, state = pack(ROWS_OF_TWO), parameters(0)
    values = np.asarray(jax.jit(lambda p: readouts(nnx.merge(GRAPH, p), batch, states=False)[0])(state))
    loss, metrics = reward_loss(GRAPH, state, None, batch, settings(objective="own"))
    ends = batch["is_last"]
    errors = np.abs(values[ends] - batch["rewards"][ends])
    assert float(loss) == pytest.approx(np.average(errors, weights=batch["weights"][ends]), rel=1e-5)
    assert float(metrics["progress_loss"]) == 0 and float(metrics["weight"]) == batch["weights"][ends].sum()


def uneven_batch() -> dict[str, np.ndarray]:
    """Four rows whose halves differ in steps and weights, and one empty row: a mean of means would differ."""
    first = pack(ROWS_OF_TWO)
    second = pack([[trajectory(5, 1, 1.0, weight=5.0)], []])
    return {name: np.concatenate([first[name], second[name]]) for name in first}


STATES = {"bootstrap": "state", "target_update": "ema"}


@functools.cache
def lowered(objective: str = "agentprm", microbatches: int = 1, **computing) -> jax.stages.Lowered:
    """`loss_and_gradients` of the uneven batch, AgentPRM's with state values and a target network."""
    changes = STATES if objective == "agentprm" else {}
    chosen, batch = settings(objective=objective, microbatches=microbatches, **changes), uneven_batch()
    target = parameters(5) if changes else None
    return jax.jit(lambda p: loss_and_gradients(GRAPH, p, target, batch, chosen, ForwardOptions(**computing))).lower(
        parameters(0)
    )


@functools.cache
def computed(*choice, **computing):
    return lowered(*choice, **computing).compile()(parameters(0))


def relative(actual, expected) -> float:
    difference = jax.tree.map(lambda a, b: a - b, actual, expected)
    return float(optax.tree.norm(difference) / optax.tree.norm(expected))


@pytest.mark.parametrize("objective, count", [("agentprm", 2), ("orm", 4)])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(objective, count):
    loss, metrics, gradients = computed(objective)
    summed_loss, summed_metrics, summed = computed(objective, count)
    assert float(summed_loss) == pytest.approx(float(loss), rel=1e-6)
    assert summed_metrics.keys() == metrics.keys()
    for name in metrics:
        assert float(summed_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-6), name
    assert relative(summed, gradients) < 1e-6


def test_rematerialisation_changes_no_gradient():
    assert relative(computed("agentprm", remat="full")[2], computed("agentprm")[2]) < 1e-6
    # Each policy recomputes more products than the one before: they are in the program.
    products = [lowered("agentprm", remat=r).as_text().count("dot_general") for r in ("none", "minimal", "full")]
    assert products[0] < products[1] < products[2]


def test_bfloat16_computes_close_to_float32_and_returns_float32():
    loss, _, gradients = computed("agentprm")
    low_loss, _, low = computed("agentprm", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves((low_loss, low))} == {jnp.dtype("float32")}
    assert 1e-4 < relative(low, gradients) < 0.05
    assert float(low_loss) == pytest.approx(float(loss), rel=0.05)


@pytest.mark.parametrize("remat, count", [("none", 1), ("full", 2)])
def test_the_head_and_the_loss_never_touch_the_vocabulary(remat, count):
    """No array of the step, inner programs included, has an entry for every token and every word."""
    batch, chosen = uneven_batch(), settings(microbatches=count)
    step = make_train_step(GRAPH, optax.adam(1e-3), chosen, ForwardOptions(remat=remat))
    state = initial_state(parameters(0), optax.adam(1e-3), chosen)
    rows = len(batch["tokens"]) // count
    shapes = {tuple(v.aval.shape) for v in variables(jax.make_jaxpr(step)(state, batch).jaxpr)}
    assert (rows, LENGTH, CONFIG.hidden_size) in shapes and (CONFIG.vocab_size, CONFIG.hidden_size) in shapes
    with_vocabulary = [shape for shape in shapes if CONFIG.vocab_size in shape]
    assert all(np.prod(shape) < rows * LENGTH * CONFIG.vocab_size for shape in with_vocabulary), with_vocabulary


def variables(jaxpr):
    """Every variable that an equation writes, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from variables(getattr(inner, "jaxpr", inner))


def is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda values, valid: (values[:, :3], valid), r"its array of targets has shape \(2, 3\) and dtype float32; "),
        (lambda values, valid: (values.sum(), valid), r"its array of targets has shape \(\) and dtype float32; "),
        (lambda values, valid: (valid, valid), r"dtype bool; return a floating-point array of shape \(2, 4\)"),
        (lambda values, valid: (0.5, valid), "its array of targets has type float; "),
        (lambda values, valid: (values, valid[:1]), r"its mask has shape \(1, 4\) and dtype bool; "),
        (
            lambda values, valid: (values, values),
            r"its mask has shape .* float32; return a bool array of shape ",
        ),
        (lambda values, valid: values, r"its target function returned an array of shape \(2, 4\); return a pair"),
        (lambda values, valid: None, "returned a NoneType; return a pair"),
        (lambda values, valid: (values, valid, valid), "returned a tuple of 3 items; return a pair"),
    ],
)
def test_targets_of_another_form_are_refused_while_a_step_is_traced(returned, message):
    @jax.jit
    def traced(values, valid):
        return checked_targets("own", returned(values, valid), values.shape)

    with pytest.raises(UserError, match=f"^objective own: .*{message}"):
        traced(jnp.zeros((2, 4)), jnp.ones((2, 4), bool))


def test_the_loss_names_the_objective_whose_targets_have_another_shape(monkeypatch):
    def targets(values, rewards, is_last, valid, settings, state_values):
        return values.sum(-1), valid

    own = objectives.Objective(name="own", targets=targets, card_text="own")
    monkeypatch.setattr(objectives, "OBJECTIVES", objectives.OBJECTIVES | {"own": own})
    with pytest.raises(UserError, match="^objective own: its array of targets has shape"):
        reward_loss(GRAPH, parameters(0), None, pack(ROWS_OF_TWO), settings(objective="own"))
