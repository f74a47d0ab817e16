"""The train step and the evaluation step of a reward model: pure functions of state, batch and frozen parameters.

Shapes: B rows, T tokens, S steps of a row, D model. A batch is a dict of the arrays in `FIELDS`. A train state is a
dict {"step": int32, "parameters", "optimizer"}, and "target" if targets are computed from a target network.

For the steps t = 0, ..., T of every trajectory in the batch, with the promises M_t = M(s_t, a_t), the state values
V_t = V(s_t), the targets Q^_t (jaxprm/targets.py) and the weights w_t (how often the trajectory was sampled):

    L = L_Q + beta L_A + L_V                                                                    (10) and (F)

    L_Q = sum_{t >= 0} w_t 1/2 (M_t - Q^_t)^2 / sum_{t >= 0} w_t                                (4)
    L_A = sum_{t >= 1} w_t 1/2 ((M_t - M_{t-1}) - (Q^_t - Q^_{t-1}))^2 / sum_{t >= 0} w_t       (9)
    L_V = sum_{t >= 0} w_t 1/2 (V_t - Q^_t)^2 / sum_{t >= 0} w_t                                (F)

Numbers are those of Xi et al., arXiv 2511.08325; (F) is in docs/method.md, section 5. L_V is there with bootstrap
"state" only. Targets and loss are those of AgentPRM; an objective may have its own (jaxprm/objectives.py).

With step labels, a step that has a label has w_t (1 - m) in these sums, and w_t m in that of the label's loss L_Y, of
which all sums together are divided by the sum of w_t over all trained steps. m is `labels.weight`, or 1 for a step
without a target Q^_t. The objective `preference` has the loss of pairs instead (jaxprm/losses.py).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.losses import LossSums, label_sums, preference_sums
from jaxprm.model.transformer import ForwardOptions, RewardModel, head_outputs, head_values, values_of_outputs
from jaxprm.objectives import (
    find_objective,
    has_target_network,
    progress_beta,
    reads_states,
    trains_on_labels,
    trains_on_pairs,
)
from jaxprm.targets import returns_to_go
from jaxprm.training.trainable import join

Batch = dict[str, jax.Array]
TrainState = dict[str, Any]

PLAIN = ForwardOptions()
NO_ADAPTERS: Any = MappingProxyType({})
NO_PARAMETERS = nnx.State({})

# The arrays of a batch that the step functions read: tokens, segments, positions are [B, T], the others [B, S].
FIELDS = (
    "tokens",
    "segments",
    "positions",
    "read_positions",
    "state_positions",
    "rewards",
    "weights",
    "is_first",
    "is_last",
    "valid",
)
# Further ones: of step labels [B, S], and of pairs, [B, T] and [B, S].
LABEL_FIELDS = ("step_labels",)
PAIR_FIELDS = ("branches", "step_index")


def hidden_states(
    model: RewardModel,
    batch: Batch,
    *,
    states: bool,
    forward_options: ForwardOptions = PLAIN,
    adapters: Any = NO_ADAPTERS,
) -> tuple[jax.Array, jax.Array | None]:
    """Inputs of the head: hidden states [B, S, D] where actions end and, if `states`, before they begin."""
    tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
    options = {"forward_options": forward_options, "adapters": adapters, "branches": batch.get("branches")}
    hidden = model.transformer(tokens, positions, segments, **options).hidden

    def read(name: str) -> jax.Array:
        return jnp.take_along_axis(hidden, batch[name][..., None], axis=1)

    return read("read_positions"), read("state_positions") if states else None


def readouts(
    model: RewardModel,
    batch: Batch,
    *,
    states: bool,
    forward_options: ForwardOptions = PLAIN,
    adapters: Any = NO_ADAPTERS,
) -> tuple[jax.Array, jax.Array | None]:
    """Promises M_t and, if `states`, state values V_t, both [B, S] float32, from one forward pass."""
    actions, before = hidden_states(model, batch, states=states, forward_options=forward_options, adapters=adapters)
    return model.value(actions), model.value(before) if states else None


class Readouts(NamedTuple):
    """What the head computes from a batch, [B, S] float32 each; None where it is not needed.

    log_odds: of the promises of a head of two labels, z_t of `losses.label_sums`.
    """

    promises: jax.Array
    states: jax.Array | None
    log_odds: jax.Array | None


def trained_readouts(
    graph: nnx.GraphDef,
    trained: Any,
    frozen: Any,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions,
    *,
    states: bool,
    log_odds: bool = False,
) -> Readouts:
    """Promises, state values and log-odds of a model whose parameters are split into trained and frozen ones.

    A batch with `read_features` and `state_features`, hidden states [B, S, D], needs the head only (trainable.py).
    """
    if "read_features" in batch:
        actions, before = batch["read_features"], batch["state_features"] if states else None
    else:
        parameters, adapters = join(settings, trained, frozen)
        model = nnx.merge(graph, parameters)
        actions, before = hidden_states(model, batch, states=states, forward_options=forward_options, adapters=adapters)
    weights, bias = trained["head"][...], trained["head_bias"][...] if "head_bias" in trained else None
    outputs = head_outputs(actions, weights, bias)
    return Readouts(
        values_of_outputs(outputs, weights),
        head_values(before, weights, bias) if states else None,
        # Of two labels, log(M / (1 - M)).
        outputs[..., 1] - outputs[..., 0] if log_odds else None,
    )


class RewardSums(NamedTuple):
    """Sums of a loss over steps. Those of microbatches add up to those of the batch, and so do their gradients."""

    promises: LossSums
    states: LossSums | None  # None where no state value is trained
    supervised: dict[str, LossSums]  # the loss of labels or of pairs, by name; empty for outcomes alone
    numbers: dict[str, jax.Array]  # sums of w_t times a number of a step, by the name of their mean

    @property
    def weight(self) -> jax.Array:
        """The sum of the weights of all trained steps or pairs."""
        return sum((sums.weight for sums in self.supervised.values()), self.promises.weight)

    def total(self, beta: float) -> jax.Array:
        """The loss before the division by the weight."""
        total = self.promises.value + beta * self.promises.progress
        total = sum((sums.value for sums in self.supervised.values()), total)
        return total if self.states is None else total + self.states.value

    def means(self, beta: float) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, its parts and means over the trained steps or pairs), float32; see `reward_loss`."""
        loss, metrics = self.promises._replace(weight=self.weight).means(beta)
        weight = jnp.where(self.weight > 0, self.weight, 1)
        metrics |= {name: number / weight for name, number in self.numbers.items()}
        parts = {f"{name}_loss": sums.value / weight for name, sums in self.supervised.items()}
        if self.states is not None:
            parts["state_loss"] = self.states.value / weight
        for part in parts.values():
            loss = loss + part
        return loss, metrics | parts


def reward_sums(
    graph: nnx.GraphDef,
    parameters: Any,
    target: Any | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
    frozen: Any = NO_PARAMETERS,
) -> RewardSums:
    """The sums of `reward_loss`, for a caller that divides later. Same arguments."""
    objective, states, labels = find_objective(settings.objective), reads_states(settings), trains_on_labels(settings)

    # Forward pass, and a second one where targets come from a target network.
    def read(trained: Any) -> Readouts:
        return trained_readouts(
            graph,
            trained,
            frozen,
            batch,
            settings,
            forward_options,
            states=states,
            log_odds=labels and settings.labels.loss == "bce",
        )

    values, state_values, log_odds = read(parameters)
    if trains_on_pairs(settings):
        return pair_sums(values, batch)
    target_values, target_states, _ = Readouts(values, state_values, None) if target is None else read(target)

    # Targets [B, S], and the steps that are trained towards them: a trajectory without an outcome has rewards of NaN.
    rewards, valid, weights = batch["rewards"], batch["valid"], batch["weights"]
    judged = valid & ~jnp.isnan(rewards) if labels else valid
    targets, mask = checked_targets(
        settings.objective,
        objective.targets(target_values, rewards, batch["is_last"], judged, settings, target_states),
        target_values.shape,
    )

    # Labels, and how a labelled step's weight is divided between its label and its target.
    supervised, label_targets, label_weights = {}, targets, jnp.zeros_like(weights)
    if labels:
        label_targets, labelled = targets_of_labels(batch["step_labels"], valid, settings.labels.range)
        shares = jnp.where(labelled, jnp.where(mask, settings.labels.weight, 1.0), 0.0)
        weights, label_weights = weights * (1 - shares), weights * shares
        supervised["label"] = label_sums(values, label_targets, label_weights, log_odds=log_odds)

    # Loss. State values have the targets of the promises: V(s_t) is the mean of Q(s_t, a) over the policy's actions.
    def sums(values: jax.Array) -> LossSums:
        return objective.loss(values, targets, batch["is_first"], mask, weights, settings)

    target_weights = jnp.where(mask, weights, 0)
    value_mean = jnp.sum(target_weights * jnp.where(mask, values, 0))
    target_mean = jnp.sum(target_weights * jnp.where(mask, targets, 0))
    if labels:
        value_mean += jnp.sum(label_weights * jnp.where(valid, values, 0))
        target_mean += jnp.sum(label_weights * label_targets)
    return RewardSums(
        sums(values),
        sums(state_values) if states else None,
        supervised,
        {"value_mean": jax.lax.stop_gradient(value_mean), "target_mean": target_mean},
    )


def targets_of_labels(
    labels: jax.Array, valid: jax.Array, label_range: tuple[float, float] | None
) -> tuple[jax.Array, jax.Array]:
    """(targets in [0, 1], mask of the steps with a label), [B, S]; labels of `label_range`, by default (0, 1)."""
    low, high = label_range or (0.0, 1.0)
    labelled = valid & ~jnp.isnan(labels)
    return jnp.where(labelled, (labels - low) / (high - low), 0.0), labelled


def pair_sums(values: jax.Array, batch: Batch) -> RewardSums:
    """The sums of the objective `preference`, from the promises [B, S] of a batch of pairs."""
    pairs = preference_sums(values, batch["step_index"], batch["valid"], batch["weights"])
    nothing = LossSums(*[jnp.zeros(())] * 3)
    return RewardSums(
        nothing, None, {"preference": pairs.loss}, {"pair_accuracy": pairs.ordered, "margin_mean": pairs.margins}
    )


def checked_targets(name: str, returned: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The (targets, mask) that the objective `name` returned for promises of `shape`, [B, S].

    Raises UserError unless both have that shape, and targets are floating-point numbers and the mask is boolean.
    """
    # An array of two rows can be unpacked into a pair too, so the type is checked.
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        what = f"a {type(returned).__name__}"
        if hasattr(returned, "shape"):
            what = f"an array of shape {tuple(returned.shape)}"
        elif isinstance(returned, tuple | list):
            what += f" of {len(returned)} items"
        raise UserError(f"objective {name}: its target function returned {what}; return a pair (targets, mask)")
    # Shapes and dtypes are known while a step is traced, so the check costs nothing in a compiled step.
    for part, array, kind, dtype in zip(
        ("array of targets", "mask"), returned, (jnp.floating, jnp.bool_), ("floating-point", "bool"), strict=True
    ):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise UserError(
                f"objective {name}: its {part} has type {type(array).__name__}; return a {dtype} array of shape {shape}"
            )
        if tuple(array.shape) != tuple(shape) or not jnp.issubdtype(array.dtype, kind):
            raise UserError(
                f"objective {name}: its {part} has shape {tuple(array.shape)} and dtype {array.dtype}; "
                f"return a {dtype} array of shape {tuple(shape)}, that of the promises"
            )
    return returned[0], returned[1]


def reward_loss(
    graph: nnx.GraphDef,
    parameters: Any,
    target: Any | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
    frozen: Any = NO_PARAMETERS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss L of one batch, as in the head of this file.

    Args:
        parameters: the trained ones; together with `frozen` they are those of the model (trainable.py).
        target: parameters of the target network, like `parameters`; None takes the targets from the trained pass.

    Returns:
        (loss, {"value_loss", "progress_loss", "state_loss"?, "label_loss"?, "weight", "value_mean", "target_mean"}),
        float32 scalars. Of pairs {"preference_loss", "pair_accuracy", "margin_mean"} are the numbers that count.
    """
    return reward_sums(graph, parameters, target, batch, settings, forward_options, frozen).means(
        progress_beta(settings)
    )


def microbatches_of(batch: Batch, count: int) -> Batch:
    """Splits a batch [B, ...] into [count, B / count, ...]."""
    # Strided: every microbatch has its share of each device's rows, so that no row moves to another device.
    return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def loss_and_gradients(
    graph: nnx.GraphDef,
    parameters: Any,
    target: Any | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
    frozen: Any = NO_PARAMETERS,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, metrics, gradients) of `reward_loss`, computed in `settings.microbatches` passes.

    The result is that of the large batch, however its valid steps are spread over the microbatches: gradients of sums
    are added, and divided once by the weight of the batch.
    """
    beta = progress_beta(settings)
    if settings.microbatches == 1:

        def loss_of(parameters):
            return reward_loss(graph, parameters, target, batch, settings, forward_options, frozen)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        return loss, metrics, gradients

    def total_of(parameters, microbatch):
        sums = reward_sums(graph, parameters, target, microbatch, settings, forward_options, frozen)
        return sums.total(beta), sums

    def add(carry, microbatch):
        (_, sums), gradients = jax.value_and_grad(total_of, has_aux=True)(parameters, microbatch)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    microbatches = microbatches_of(batch, settings.microbatches)
    shapes = jax.eval_shape(lambda: total_of(parameters, jax.tree.map(lambda x: x[0], microbatches))[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, parameters))
    # A scan, not a sum over a list: only one microbatch's activations are in memory at a time.
    (sums, gradients), _ = jax.lax.scan(add, zeros, microbatches)
    weight = jnp.where(sums.weight > 0, sums.weight, 1)
    return *sums.means(beta), jax.tree.map(lambda leaf: leaf / weight, gradients)


def initial_state(
    parameters: Any, optimizer: optax.GradientTransformation, settings: config_lib.RewardModelConfig
) -> TrainState:
    """The train state before the first step; the target network starts as a copy of the trained parameters."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "parameters": parameters,
        "optimizer": optimizer.init(parameters),
    }
    if has_target_network(settings):
        state["target"] = jax.tree.map(jnp.copy, parameters)  # copied, because the state is donated
    return state


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, batch, frozen) -> (state, metrics).

    Metrics are float32 scalars of the parameters before the update: "loss", those of `reward_loss`, "gradient_norm"
    (before clipping) and "tokens" (int32).
    """

    def train_step(
        state: TrainState, batch: Batch, frozen: Any = NO_PARAMETERS
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, metrics, gradients = loss_and_gradients(
            graph, state["parameters"], state.get("target"), batch, settings, forward_options, frozen
        )
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
        new_state = {
            "step": state["step"] + 1,
            "parameters": optax.apply_updates(state["parameters"], updates),
            "optimizer": optimizer_state,
        }
        if "target" in state:
            new_state["target"] = _updated_target(state["target"], new_state["parameters"], new_state["step"], settings)
        tokens = jnp.sum(batch["segments"] > 0)
        return new_state, {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradients), "tokens": tokens}

    return train_step


def make_evaluation_step(
    graph: nnx.GraphDef, settings: config_lib.RewardModelConfig, forward_options: ForwardOptions = PLAIN
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function (parameters, batch, frozen) -> (promises, returns-to-go), both [B, S]."""

    def evaluation_step(parameters: Any, batch: Batch, frozen: Any = NO_PARAMETERS) -> tuple[jax.Array, jax.Array]:
        values = trained_readouts(graph, parameters, frozen, batch, settings, forward_options, states=False).promises
        rewards, valid = batch["rewards"], batch["valid"]
        if trains_on_labels(settings) or trains_on_pairs(settings):
            # Trajectories without an outcome: the return of one would be that of those before it in the row.
            valid &= ~jnp.isnan(rewards)
        return values, returns_to_go(rewards, batch["is_last"], valid, discount=settings.discount)

    return evaluation_step


def make_features_step(
    graph: nnx.GraphDef, settings: config_lib.RewardModelConfig, forward_options: ForwardOptions = PLAIN
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array | None]]:
    """The function (parameters, batch) -> `hidden_states` in float32, for training the head only."""

    def features_step(parameters: Any, batch: Batch) -> Any:
        model = nnx.merge(graph, parameters)
        features = hidden_states(model, batch, states=reads_states(settings), forward_options=forward_options)
        return jax.tree.map(lambda x: x.astype(jnp.float32), features)

    return features_step


def _updated_target(target: Any, parameters: Any, step: jax.Array, settings: config_lib.RewardModelConfig) -> Any:
    """The target network after an update: a moving average, or a copy every `target_every` steps."""
    if settings.target_update == "ema":
        decay = settings.target_decay
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, target, parameters)
    copy = step % settings.target_every == 0
    return jax.tree.map(lambda old, new: jnp.where(copy, new, old), target, parameters)
