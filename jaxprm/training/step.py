"""One training step of a reward model, and one evaluation step, as pure functions of state and batch.

A state is {"step": int32, "parameters", "optimizer"} and, where targets come from a target network, "target".
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
from jaxprm.losses import LossSums, agent_prm_sums
from jaxprm.model.transformer import ForwardOptions, RewardModel, head_values
from jaxprm.targets import objective_targets, returns_to_go
from jaxprm.training.trainable import join

Batch = dict[str, jax.Array]
TrainState = dict[str, Any]

PLAIN = ForwardOptions()
NO_ADAPTERS: Any = MappingProxyType({})
NOTHING = nnx.State({})

# What the step functions read of a batch; tokens, segments, positions are [B, T], the others [B, S].
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


def reads_states(settings: config_lib.RewardModelConfig) -> bool:
    """Whether V(s_t) is read, and therefore trained."""
    return settings.objective == "agentprm" and settings.bootstrap == "state"


def has_target_network(settings: config_lib.RewardModelConfig) -> bool:
    """Whether the bootstrap comes from older parameters. Only AgentPRM bootstraps."""
    return settings.objective == "agentprm" and settings.target_update != "online"


def progress_beta(settings: config_lib.RewardModelConfig) -> float:
    """beta of eq. 10; the baselines have no progress loss."""
    return settings.beta if settings.objective == "agentprm" else 0.0


def hidden_states(
    model: RewardModel,
    batch: Batch,
    *,
    states: bool,
    forward_options: ForwardOptions = PLAIN,
    adapters: Any = NO_ADAPTERS,
) -> tuple[jax.Array, jax.Array | None]:
    """What the head reads: hidden states [B, S, D] where actions end and, if asked for, before they begin."""
    tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
    hidden = model.transformer(tokens, positions, segments, forward_options=forward_options, adapters=adapters).hidden

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
    """Promises M_t and, if asked for, state values V(s_t), [B, S] in float32, from one forward pass."""
    actions, before = hidden_states(model, batch, states=states, forward_options=forward_options, adapters=adapters)
    return model.value(actions), model.value(before) if states else None


def trained_readouts(
    graph: nnx.GraphDef,
    trained: Any,
    frozen: Any,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions,
    *,
    states: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`readouts` of a model in its trained and its frozen part.

    A batch that brings its hidden states, `read_features` and `state_features` [B, S, D], needs the head alone.
    """
    if "read_features" in batch:
        head = trained["head"][...]
        values = head_values(batch["read_features"], head)
        return values, head_values(batch["state_features"], head) if states else None
    whole, adapters = join(settings, trained, frozen)
    return readouts(nnx.merge(graph, whole), batch, states=states, forward_options=forward_options, adapters=adapters)


class Sums(NamedTuple):
    """What a loss is made of: of microbatches they add up, and so do their gradients."""

    steps: LossSums
    states: LossSums | None  # of the state values, where they are trained
    values: jax.Array  # sum of w_t M_t over the steps that are trained
    targets: jax.Array  # sum of w_t Q^_t over them

    def total(self, beta: float) -> jax.Array:
        """The loss before it is divided by the weight."""
        total = self.steps.value + beta * self.steps.progress
        return total if self.states is None else total + self.states.value

    def means(self, beta: float) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, {"value_loss", "progress_loss", "state_loss"?, "weight", "value_mean", "target_mean"}), float32."""
        loss, metrics = self.steps.means(beta)
        total = jnp.where(self.steps.weight > 0, self.steps.weight, 1)
        metrics |= {"value_mean": self.values / total, "target_mean": self.targets / total}
        if self.states is not None:
            state_loss, _ = self.states.means(0.0)
            loss, metrics = loss + state_loss, metrics | {"state_loss": state_loss}
        return loss, metrics


def reward_sums(
    graph: nnx.GraphDef,
    parameters: Any,
    target: Any | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
    frozen: Any = NOTHING,
) -> Sums:
    """The sums behind `reward_loss`, of the same arguments."""
    states = reads_states(settings)

    def read(trained: Any) -> tuple[jax.Array, jax.Array | None]:
        return trained_readouts(graph, trained, frozen, batch, settings, forward_options, states=states)

    values, state_values = read(parameters)
    bootstrap_values, bootstrap_states = (values, state_values) if target is None else read(target)
    targets, mask = objective_targets(
        settings.objective,
        bootstrap_values,
        batch["rewards"],
        batch["is_last"],
        batch["valid"],
        gae_lambda=settings.gae_lambda,
        discount=settings.discount,
        bootstrap=settings.bootstrap,
        state_values=bootstrap_states,
    )

    def sums(values: jax.Array) -> LossSums:
        return agent_prm_sums(
            values,
            targets,
            batch["is_first"],
            mask,
            weights=batch["weights"],
            progress_gradient=settings.progress_gradient,
        )

    weights = jnp.where(mask, batch["weights"], 0)
    return Sums(
        sums(values),
        sums(state_values) if states else None,
        values=jax.lax.stop_gradient(jnp.sum(weights * jnp.where(mask, values, 0))),
        targets=jnp.sum(weights * jnp.where(mask, targets, 0)),
    )


def reward_loss(
    graph: nnx.GraphDef,
    parameters: Any,
    target: Any | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
    frozen: Any = NOTHING,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one batch, L = L_Q + beta L_A (eq. 10), + L_V where state values are read (METHOD.md, section 3).

    Args:
        parameters: those that are trained; with `frozen` they are the whole model's, see trainable.py.
        target: parameters of the target network; None takes the targets from the pass that is trained.

    Returns:
        (loss, {"value_loss", "progress_loss", "state_loss"?, "weight", "value_mean", "target_mean"}), float32 scalars.
    """
    return reward_sums(graph, parameters, target, batch, settings, forward_options, frozen).means(
        progress_beta(settings)
    )


def microbatches_of(batch: Batch, count: int) -> Batch:
    """A batch [B, ...] as [count, B / count, ...]; every microbatch takes of every device's rows its share."""
    return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def loss_and_gradients(
    graph: nnx.GraphDef,
    parameters: Any,
    target: Any | None,
    batch: Batch,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
    frozen: Any = NOTHING,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, metrics, gradients) of a batch, in `settings.microbatches` passes.

    Gradients of sums are added and divided once by the weight of the whole batch: it is the large batch's gradient,
    however the valid steps fall to the microbatches.
    """
    beta = progress_beta(settings)
    if settings.microbatches == 1:

        def loss_of(parameters):
            return reward_loss(graph, parameters, target, batch, settings, forward_options, frozen)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        return loss, metrics, gradients

    def total_of(parameters, part):
        sums = reward_sums(graph, parameters, target, part, settings, forward_options, frozen)
        return sums.total(beta), sums

    def add(carry, part):
        (_, sums), gradients = jax.value_and_grad(total_of, has_aux=True)(parameters, part)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    parts = microbatches_of(batch, settings.microbatches)
    shapes = jax.eval_shape(lambda: total_of(parameters, jax.tree.map(lambda x: x[0], parts))[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, parameters))
    (sums, gradients), _ = jax.lax.scan(add, zeros, parts)
    weight = jnp.where(sums.steps.weight > 0, sums.steps.weight, 1)
    return *sums.means(beta), jax.tree.map(lambda leaf: leaf / weight, gradients)


def initial_state(
    parameters: Any, optimizer: optax.GradientTransformation, settings: config_lib.RewardModelConfig
) -> TrainState:
    """The state before the first step; the target network starts as a copy."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "parameters": parameters,
        "optimizer": optimizer.init(parameters),
    }
    if has_target_network(settings):
        state["target"] = jax.tree.map(jnp.copy, parameters)
    return state


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: config_lib.RewardModelConfig,
    forward_options: ForwardOptions = PLAIN,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch, frozen) -> (state, metrics): the metrics are of the parameters before the update."""

    def train_step(state: TrainState, batch: Batch, frozen: Any = NOTHING) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, metrics, gradients = loss_and_gradients(
            graph, state["parameters"], state.get("target"), batch, settings, forward_options, frozen
        )
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
        new = {
            "step": state["step"] + 1,
            "parameters": optax.apply_updates(state["parameters"], updates),
            "optimizer": optimizer_state,
        }
        if "target" in state:
            new["target"] = _follow(state["target"], new["parameters"], new["step"], settings)
        tokens = jnp.sum(batch["segments"] > 0)
        return new, {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradients), "tokens": tokens}

    return train_step


def make_evaluation_step(
    graph: nnx.GraphDef, settings: config_lib.RewardModelConfig, forward_options: ForwardOptions = PLAIN
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(parameters, batch, frozen) -> (promises, returns-to-go), both [B, S]."""

    def evaluation_step(parameters: Any, batch: Batch, frozen: Any = NOTHING) -> tuple[jax.Array, jax.Array]:
        values, _ = trained_readouts(graph, parameters, frozen, batch, settings, forward_options, states=False)
        returns = returns_to_go(batch["rewards"], batch["is_last"], batch["valid"], discount=settings.discount)
        return values, returns

    return evaluation_step


def _follow(target: Any, parameters: Any, step: jax.Array, settings: config_lib.RewardModelConfig) -> Any:
    """The target network after an update: a moving average, or a copy every `target_every` steps."""
    if settings.target_update == "ema":
        decay = settings.target_decay
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, target, parameters)
    copy = step % settings.target_every == 0
    return jax.tree.map(lambda old, new: jnp.where(copy, new, old), target, parameters)
