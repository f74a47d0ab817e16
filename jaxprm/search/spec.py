"""What a search algorithm is to the rest of the package, and one search of a run: an algorithm with its sizes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.policies.protocol import Policy
from jaxprm.search.branches import BranchRunner
from jaxprm.search.tree import ActionScorer, SearchLimits, Tree


@dataclass(frozen=True)
class SearchRequest:
    """What to search and with what: the argument of every search algorithm.

    Attributes:
        tasks: searched in lockstep, so that one call to the policy and one to the scorer serve all of them.
        limits: to be checked after every round of a task.
    """

    tasks: Sequence[str]
    runner: BranchRunner
    policy: Policy
    scorer: ActionScorer
    spec: SearchSpec
    settings: config_lib.SearchConfig
    limits: SearchLimits

    @property
    def max_rounds(self) -> int:
        """Actions after which the environment cuts an episode."""
        return self.runner.environment.max_rounds


# Returns a tree for each task, in order. `expand`, `commit` and `execute` of jaxprm/search/tree.py keep the records in
# it; the tree's `best` path is the answer.
RunSearch = Callable[[SearchRequest], list[Tree]]


@dataclass(frozen=True)
class SearchMethod:
    """A search algorithm: how a config asks for it, how it runs, and what it is called.

    Attributes:
        kind: its name in file names and in results.json: letters a-z, digits and underscores.
        run: the algorithm.
        label: its name in the report, with "{}" for the size; default: the kind and the size.
        card: its name in a model card, with "{}" for the size; None leaves it out.
        config_field: the field of SearchConfig that lists its sizes; None: only SearchConfig.custom does.
        parse_sizes: from one entry of the config to (width, actions[, ahead]).
        size: the size in results.json and file names; default: NxM, or NxMxA with lookahead.
        file_stem: the first part of the names of its files; default: kind-size.
        cached_paths: paths of one task that the scorer's cache should hold; default: the width.
        forks: whether it needs several branches of a task; default: if width > 1 or ahead > 0.
        inputs: settings that only this algorithm depends on, recorded with its results.
        omit_kind: whether recorded inputs and costs leave out the kind.
    """

    kind: str
    run: RunSearch
    label: str = ""
    card: str | None = None
    config_field: str | None = None
    parse_sizes: Callable[..., tuple[int, ...]] = lambda *sizes: sizes
    size: Callable[[SearchSpec], str] | None = None
    file_stem: Callable[[SearchSpec], str] | None = None
    cached_paths: Callable[[SearchSpec], int] = lambda spec: spec.width
    forks: Callable[[SearchSpec], bool] = lambda spec: spec.width > 1 or spec.ahead > 0
    inputs: Callable[[config_lib.SearchConfig], dict[str, Any]] = lambda settings: {}
    omit_kind: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z0-9_]+", self.kind):
            raise UserError(f"search {self.kind!r}: a kind has only letters a-z, digits and underscores; rename it")
        # The dataclass is frozen, and this default depends on another field.
        object.__setattr__(self, "label", self.label or f"{self.kind.replace('_', ' ')} {{}}")

    def spec(self, *sizes: int, field: str | None = None) -> SearchSpec:
        """The search of one entry of the config, whose `field` is named in errors.

        Raises UserError if the entry has too many or too few numbers.
        """
        field = field or f"search.{self.config_field or f'custom.{self.kind}'}"
        signature = inspect.signature(self.parse_sizes)
        try:
            signature.bind(*sizes)
        # The text of this TypeError is about a Python function, which the reader of a config has not seen.
        except TypeError:
            raise UserError(_wrong_count(field, self.kind, sizes, _counts(signature))) from None
        parsed = tuple(self.parse_sizes(*sizes))
        if len(parsed) not in (2, 3):
            if self.parse_sizes is SearchMethod.parse_sizes:
                raise UserError(_wrong_count(field, self.kind, sizes, "2 or 3 numbers"))
            raise UserError(
                f"{field}: parse_sizes of search {self.kind} returned {parsed}; return (width, actions) or "
                "(width, actions, ahead)"
            )
        return SearchSpec(self, *parsed)


def _wrong_count(field: str, kind: str, sizes: Sequence[int], expected: str) -> str:
    return f"{field}: {list(sizes)} does not fit search {kind}, which takes {expected}; change the list"


def _counts(signature: inspect.Signature) -> str:
    """How many numbers a function takes, in words."""
    parameters = signature.parameters.values()
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    least = sum(parameter.default is parameter.empty for parameter in named)
    if len(named) < len(parameters):
        return f"{least} or more numbers"
    counts = " or ".join(map(str, range(least, len(named) + 1)))
    return f"{counts} number{'' if counts == '1' else 's'}"


@dataclass(frozen=True)
class SearchSpec:
    """One search of a run.

    Attributes:
        width: paths kept, or simulations before a step of tree search.
        actions: candidates drawn in a state.
        ahead: steps that every candidate is followed before it is scored.
    """

    method: SearchMethod
    width: int
    actions: int
    ahead: int = 0

    @property
    def kind(self) -> str:
        return self.method.kind

    @property
    def size(self) -> str:
        """The size in results.json: K of step-wise best-of-K, NxMxA with lookahead, NxM of all other searches."""
        if self.method.size is not None:
            return self.method.size(self)
        return f"{self.width}x{self.actions}" + (f"x{self.ahead}" if self.ahead else "")

    @property
    def at(self) -> str:
        """Kind and size, as in `paired[].at` of results.json."""
        return f"{self.kind} {self.size}"

    @property
    def cost_key(self) -> str:
        """The search's key in `compute.methods[label]` of results.json."""
        # Beams and step-wise searches are older than kinds: their keys in results.json stay what they were.
        return f"{self.width}x{self.actions}" if self.method.omit_kind else self.at

    @property
    def cached_paths(self) -> int:
        """Paths of one task that the scorer's cache should hold."""
        return self.method.cached_paths(self)

    @property
    def forks(self) -> bool:
        """Whether it needs several branches of a task."""
        return self.method.forks(self)

    def file_name(self, label: str, seed: int) -> str:
        """Name of the search's file in WORKDIR/search, without its ending."""
        stem = f"{self.kind}-{self.size}" if self.method.file_stem is None else self.method.file_stem(self)
        return f"{stem}-{label}-{seed}"

    def inputs(self, settings: config_lib.SearchConfig) -> dict[str, Any]:
        """What the result depends on besides tasks, policy and scorer. It is recorded, so keys and their order stay."""
        recorded: dict[str, Any] = {
            "width": self.width,
            "actions": self.actions,
            "progress_weight": settings.progress_weight,
            "trees": settings.trees,
        }
        # Absent where they cannot matter, so that work directories from before these settings existed still resume.
        if not self.method.omit_kind:
            recorded["kind"] = self.kind
        if self.ahead:
            recorded["ahead"] = self.ahead
        if settings.stop_at is not None:
            recorded["stop_at"] = settings.stop_at
        if settings.budget is not None:
            recorded |= {"budget": settings.budget, "budget_unit": settings.budget_unit}
        return recorded | self.method.inputs(settings)
