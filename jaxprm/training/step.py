"""One training step of a reward model, and one evaluation step, as pure functions of state and batch.

A state is {"step": int32, "parameters", "optimizer"} and, where targets come from a target network, "target".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxprm import config as config_lib
from jaxprm.losses import agent_prm_loss
from jaxprm.model.transformer import RewardModel
from jaxprm.targets import objective_targets, returns_to_go

Batch = dict[str, jax.Array]
State = dict[str, Any]

# What the step functions read of a batch; tokens, segments, positions are [B, T], the others [B, S].
FIELDS = (
    "tokens", "segments", "positions", "read_positions", "state_positions",
    "rewards", "weights", "is_first", "is_last", "valid",
)  # fmt: skip


def reads_states(settings: config_lib.RewardModel) -> bool:
    """Whether V(s_t) is read, and therefore trained."""
    return settings.objective == "agentprm" and settings.bootstrap == "state"


def has_target_network(settings: config_lib.RewardModel) -> bool:
    """Whether the bootstrap comes from older parameters. Only AgentPRM bootstraps."""
    return settings.objective == "agentprm" and settings.target_update != "online"


def progress_beta(settings: config_lib.RewardModel) -> float:
    """beta of eq. 10; the baselines have no progress loss."""
    return settings.beta if settings.objective == "agentprm" else 0.0


def readouts(model: RewardModel, batch: Batch, *, states: bool) -> tuple[jax.Array, jax.Array | None]:
    """Promises M_t and, if asked for, state values V(s_t), [B, S] in float32, from one forward pass."""
    hidden = model.transformer(batch["tokens"], batch["positions"], batch["segments"]).hidden

    def read(name: str) -> jax.Array:
        return model.value(jnp.take_along_axis(hidden, batch[name][..., None], axis=1))

    return read("read_positions"), read("state_positions") if states else None


def reward_loss(
    graph: nnx.GraphDef, parameters: Any, target: Any | None, batch: Batch, settings: config_lib.RewardModel
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one batch, L = L_Q + beta L_A (eq. 10), + L_V where state values are read (METHOD.md, section 3).

    Args:
        target: parameters of the target network; None takes the targets from the pass that is trained.

    Returns:
        (loss, {"value_loss", "progress_loss", "state_loss"?, "weight"}), float32 scalars.
    """
    states = reads_states(settings)
    values, state_values = readouts(nnx.merge(graph, parameters), batch, states=states)
    if target is None:
        bootstrap_values, bootstrap_states = values, state_values
    else:
        bootstrap_values, bootstrap_states = readouts(nnx.merge(graph, target), batch, states=states)
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
    loss, metrics = agent_prm_loss(
        values,
        targets,
        batch["is_first"],
        mask,
        beta=progress_beta(settings),
        weights=batch["weights"],
        progress_gradient=settings.progress_gradient,
    )
    if states:
        state_loss, _ = agent_prm_loss(
            state_values, targets, batch["is_first"], mask, beta=0.0, weights=batch["weights"]
        )
        loss, metrics = loss + state_loss, metrics | {"state_loss": state_loss}
    return loss, metrics


def initial_state(parameters: Any, optimizer: optax.GradientTransformation, settings: config_lib.RewardModel) -> State:
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
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, settings: config_lib.RewardModel
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """(state, batch) -> (state, metrics): the metrics are of the parameters before the update."""

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        def loss_of(parameters):
            return reward_loss(graph, parameters, state.get("target"), batch, settings)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["parameters"])
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
    graph: nnx.GraphDef, discount: float
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """(parameters, batch) -> (promises, returns-to-go), both [B, S]."""

    def evaluation_step(parameters: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        values, _ = readouts(nnx.merge(graph, parameters), batch, states=False)
        return values, returns_to_go(batch["rewards"], batch["is_last"], batch["valid"], discount=discount)

    return evaluation_step


def _follow(target: Any, parameters: Any, step: jax.Array, settings: config_lib.RewardModel) -> Any:
    """The target network after an update: a moving average, or a copy every `target_every` steps."""
    if settings.target_update == "ema":
        decay = settings.target_decay
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, target, parameters)
    copy = step % settings.target_every == 0
    return jax.tree.map(lambda old, new: jnp.where(copy, new, old), target, parameters)
