"""Training objectives: one record each in one registry, and the check of an objective's settings.

An objective says what the promise of a step is trained towards, which steps are trained, and by which loss. Arrays are
[..., S], packed as in jaxprm/targets.py. To add one, register a record, or name it "module:attribute" in the config:

    from jaxprm.objectives import Objective, register
    from jaxprm.targets import outcomes

    def every_outcome(values, rewards, is_last, valid, settings, state_values):
        return outcomes(rewards, is_last, valid), valid & is_last

    register(Objective(name="mine", targets=every_outcome, card_text="the outcome, at the last step"))
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from jaxprm import plugins
from jaxprm.errors import UserError

# For annotations only: configs name objectives and are loaded without JAX.
if TYPE_CHECKING:
    import jax

Bootstrap = Literal["action", "next", "state"]
ProgressGradient = Literal["both", "previous"]
# What an objective trains on: outcomes or rewards, step labels, or pairs of a chosen and a rejected action.
Supervision = Literal["outcomes", "labels", "pairs"]
BOOTSTRAPS: tuple[str, ...] = get_args(Bootstrap)
PROGRESS_GRADIENTS: tuple[str, ...] = get_args(ProgressGradient)


class Settings(Protocol):
    """The fields of `jaxprm.config.RewardModelConfig` that objectives read; docs/method.md says what they mean."""

    # Read-only, because the fields of a config are frozen: a plain attribute of a protocol must be assignable.
    @property
    def objective(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def gae_lambda(self) -> float: ...
    @property
    def discount(self) -> float: ...
    @property
    def bootstrap(self) -> str: ...
    @property
    def progress_gradient(self) -> str: ...
    @property
    def target_update(self) -> str: ...


class LabelSettings(Protocol):
    """The fields of `jaxprm.config.LabelsConfig`."""

    @property
    def loss(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def range(self) -> tuple[float, float] | None: ...


class ModelSettings(Settings, Protocol):
    """`Settings`, and those of step labels."""

    @property
    def labels(self) -> LabelSettings: ...


class TargetFunction(Protocol):
    """Computes (targets, mask) of a batch, both [..., S]; the mask selects the steps that are trained.

    A pure function of the promises M_t and the rewards r_t. `state_values` holds V(s_t), or None where no state is
    read. No gradient flows through the targets.
    """

    def __call__(
        self,
        values: jax.Array,
        rewards: jax.Array,
        is_last: jax.Array,
        valid: jax.Array,
        settings: Settings,
        state_values: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]: ...


class LossFunction(Protocol):
    """Computes the `losses.LossSums` of the steps in `mask`, each with its weight w_t. All arrays are [..., S]."""

    def __call__(
        self,
        values: jax.Array,
        targets: jax.Array,
        is_first: jax.Array,
        mask: jax.Array,
        weights: jax.Array,
        settings: Settings,
    ) -> Any: ...


def squared_errors(
    values: jax.Array,
    targets: jax.Array,
    is_first: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    settings: Settings,
) -> Any:
    """AgentPRM's squared errors of promise and progress (eq. 4 and 9): `losses.agent_prm_sums`."""
    return _import("losses").agent_prm_sums(
        values, targets, is_first, mask, weights=weights, progress_gradient=settings.progress_gradient
    )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a reward model is trained towards.

    Attributes:
        name: what configs and reward_model.json call it.
        targets: the targets and the steps that are trained.
        card_text: one phrase for the model card. A user's own is recorded in reward_model.json.
        uses_progress: the loss has the progress term L_A, weighted by `beta`; without it beta counts as 0.
        bootstraps: targets depend on the promises. Only then are `bootstrap` and `target_update` used, so that a state
            value or a target network is computed.
        loss: the loss of promises, and of state values where they are trained.
        supervision: what it trains on. The targets of an objective on labels or pairs select no step: their losses are
            `losses.label_sums` and `losses.preference_sums`.
    """

    name: str
    targets: TargetFunction
    card_text: str
    uses_progress: bool = False
    bootstraps: bool = False
    loss: LossFunction = squared_errors
    supervision: Supervision = "outcomes"


def agentprm_targets(
    values: jax.Array,
    rewards: jax.Array,
    is_last: jax.Array,
    valid: jax.Array,
    settings: Settings,
    state_values: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`targets.td_lambda_targets` at every step (AgentPRM, eq. 12-14)."""
    targets = _import("targets").td_lambda_targets(
        values,
        rewards,
        is_last,
        valid,
        gae_lambda=settings.gae_lambda,
        discount=settings.discount,
        bootstrap=settings.bootstrap,
        state_values=state_values,
    )
    return targets, valid


def pvm_targets(
    values: jax.Array,
    rewards: jax.Array,
    is_last: jax.Array,
    valid: jax.Array,
    settings: Settings,
    state_values: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The return-to-go at every step."""
    return _import("targets").returns_to_go(rewards, is_last, valid, discount=settings.discount), valid


def orm_targets(
    values: jax.Array,
    rewards: jax.Array,
    is_last: jax.Array,
    valid: jax.Array,
    settings: Settings,
    state_values: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The outcome of the whole trajectory, at its last step only."""
    return _import("targets").outcomes(rewards, is_last, valid), valid & is_last


def no_targets(
    values: jax.Array,
    rewards: jax.Array,
    is_last: jax.Array,
    valid: jax.Array,
    settings: Settings,
    state_values: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """No step is trained towards its outcome."""
    return 0 * rewards, valid & ~valid


def _import(module: str) -> Any:
    # Configs name objectives and are loaded without JAX. So the modules of targets and losses, which need it, are
    # imported when a target or a loss is first computed.
    return importlib.import_module(f"jaxprm.{module}")


_BUILT_IN = (
    Objective(
        name="agentprm",
        targets=agentprm_targets,
        card_text=(
            "AgentPRM (arXiv 2511.08325): TD(lambda) estimates of the outcome, and a loss on the progress of steps"
        ),
        uses_progress=True,
        bootstraps=True,
    ),
    Objective(
        name="pvm",
        targets=pvm_targets,
        card_text="a process value model: at every step the outcome of its trajectory",
    ),
    Objective(
        name="orm",
        targets=orm_targets,
        card_text="an outcome reward model: the outcome, at the last step of a trajectory only",
    ),
    Objective(
        name="step_labels",
        targets=no_targets,
        card_text="labels of single steps, where a step has one",
        supervision="labels",
    ),
    Objective(
        name="preference",
        targets=no_targets,
        card_text="pairs of a chosen and a rejected action in one state: the chosen one gets the higher value",
        supervision="pairs",
    ),
)
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _BUILT_IN}


def register(objective: Objective) -> Objective:
    """Adds an objective to the registry, so that configs of this process can name it. Returns it.

    A later process must register it again before it names it: do so in the config file, which every command reads. A
    registered objective may be replaced, because a config file may be read twice; a built-in one may not.

    Raises UserError if the name is a built-in one, or is not made of a-z, 0-9 and _.
    """
    if not re.fullmatch(r"[a-z0-9_]+", objective.name):
        raise UserError(f"objective name {objective.name!r}: must be made of a-z, 0-9 and _; rename the objective")
    if is_built_in(objective.name):
        raise UserError(f"objective name {objective.name!r}: is a built-in objective; choose another name")
    OBJECTIVES[objective.name] = objective
    return objective


def find_objective(name: str) -> Objective:
    """The registered objective of that name, or the one that "module:attribute" names, whose module is imported.

    Raises UserError if there is none.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if not plugins.is_attribute(name):
        raise UserError(f"objective is {name!r}: use one of {', '.join(OBJECTIVES)}, or your own as 'module:attribute'")
    objective = plugins.locate("objective", name, name, choices=f"one of {', '.join(OBJECTIVES)}")
    if not isinstance(objective, Objective):
        raise UserError(f"objective is {name!r}: is a {type(objective).__name__}; name a jaxprm.objectives.Objective")
    return objective


def is_built_in(name: str) -> bool:
    """Whether every process knows the objective without a registration or an import."""
    return any(objective.name == name for objective in _BUILT_IN)


def reads_states(settings: Settings) -> bool:
    """Whether state values V(s_t) are computed and trained."""
    return settings.bootstrap == "state" and find_objective(settings.objective).bootstraps


def has_target_network(settings: Settings) -> bool:
    """Whether targets are computed from older parameters than those that are trained."""
    return settings.target_update != "online" and find_objective(settings.objective).bootstraps


def progress_beta(settings: Settings) -> float:
    """beta of eq. 10; 0 for an objective without a progress loss."""
    return settings.beta if find_objective(settings.objective).uses_progress else 0.0


def trains_on_labels(settings: ModelSettings) -> bool:
    """Whether step labels are in the loss: alone, or next to the targets of another objective."""
    return settings.labels.weight > 0 or find_objective(settings.objective).supervision == "labels"


def trains_on_pairs(settings: Settings) -> bool:
    """Whether the loss compares the chosen and the rejected action of a state."""
    return find_objective(settings.objective).supervision == "pairs"


def check_settings(settings: ModelSettings, *, dense_rewards: bool = False) -> None:
    """`check_objective` of a reward model's settings, and the check of those of its labels."""
    labels, supervision = settings.labels, find_objective(settings.objective).supervision
    if labels.weight and supervision != "outcomes":
        alone = "step labels alone" if supervision == "labels" else "pairs, which have no step labels"
        raise UserError(
            f"labels.weight is {labels.weight} with objective {settings.objective}, which trains on {alone}: set it to "
            "0, or mix labels into agentprm, pvm or orm"
        )
    if labels.range is not None and not float("-inf") < labels.range[0] < labels.range[1] < float("inf"):
        raise UserError(f"labels.range is {labels.range}: give the lowest and the highest label, as [-1, 1]")
    check_objective(
        settings.objective,
        beta=progress_beta(settings),
        gae_lambda=settings.gae_lambda,
        discount=settings.discount,
        bootstrap=settings.bootstrap,
        progress_gradient=settings.progress_gradient,
        dense_rewards=dense_rewards,
    )


def check_objective(
    name: str,
    *,
    beta: float,
    gae_lambda: float,
    discount: float,
    bootstrap: str = "action",
    progress_gradient: str = "both",
    dense_rewards: bool = False,
) -> None:
    """Refuses settings that cannot be trained, or that would train something other than what they say.

    Args:
        name: a registered objective, or "module:attribute".
        beta, gae_lambda, discount: the weight of L_A, lambda and gamma.
        bootstrap, progress_gradient: see `targets.td_lambda_targets` and `losses.agent_prm_loss`.
        dense_rewards: whether any step but the last of some trajectory has a reward.

    Raises:
        UserError: one line with the field, its value, the bound and the fix.
    """
    objective = find_objective(name)
    _check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    _check_choice("progress_gradient", progress_gradient, PROGRESS_GRADIENTS)
    for field, value in (("gae_lambda", gae_lambda), ("discount", discount)):
        if not 0 <= value <= 1:
            raise UserError(f"{field} is {value}: it must be in [0, 1]")
    if not 0 <= beta < float("inf"):
        raise UserError(f"beta is {beta}: it must be finite and not negative; 0 leaves the progress loss out")
    if beta and not objective.uses_progress:
        raise UserError(
            f"beta is {beta} with objective {name}, which has no progress loss: set beta to 0 or use agentprm"
        )
    if beta and (discount != 1 or dense_rewards):
        # M_t - M_{t-1} is progress only for a single reward at the end, undiscounted (docs/method.md, section 2).
        cause = f"discount {discount}" if discount != 1 else "rewards before the last step"
        raise UserError(
            f"beta is {beta} with {cause}: progress needs discount 1 and a single final reward; set beta to 0"
        )
    if objective.bootstraps and bootstrap == "action" and gae_lambda == 0:
        # Q^_t = M_t before the last step: every error there is 0.
        raise UserError(
            "gae_lambda is 0 with bootstrap action: only last steps would learn; use gae_lambda > 0 or bootstrap next"
        )


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} is {value!r}: use one of {', '.join(choices)}")
