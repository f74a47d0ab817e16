"""Read `results.json` and `search/trees.json`. A missing part is accepted, a part of the wrong form is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from data_pipeline.terminal import escape
from jaxprm.errors import UserError
from jaxprm.search.methods import SEARCHES

T = TypeVar("T")
AGGREGATED = tuple(f"best_of_n_{rule}" for rule in ("mean", "min", "max", "product", "sum", "vote", "weighted_vote"))
# Searches with figures of their own; all others share a table.
_SHOWN_ALONE = ("best_of_n", "prefix_best_of_n", "stepwise", "beam")
TREE_SEARCHES = tuple(kind for kind in SEARCHES if kind not in _SHOWN_ALONE)


class ReportedEstimate(msgspec.Struct, frozen=True):
    """A measured mean with its 95 % interval over n units; each part may be missing."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None

    def negated(self) -> ReportedEstimate:
        # The negative of the upper bound is the lower one.
        return ReportedEstimate(
            *(None if value is None else -value for value in (self.mean, self.high, self.low)), self.n
        )


Curve = dict[str, ReportedEstimate | None]


class Paired(msgspec.Struct, frozen=True):
    """Mean over tasks of (a minus b), both measured at the same search."""

    a: str
    b: str
    at: str = ""
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: float | None = None

    @property
    def estimate(self) -> ReportedEstimate:
        return ReportedEstimate(self.mean, self.low, self.high, self.n)


class EqualBudget(msgspec.Struct, frozen=True):
    """A search, and best-of-n at the same cost; `capped` where the pool has fewer than n trajectories."""

    label: str
    at: str
    unit: str
    n: float
    capped: bool = False
    searched: ReportedEstimate | None = None
    best_of_n: ReportedEstimate | None = None
    difference: ReportedEstimate | None = None


class NeededBudget(msgspec.Struct, frozen=True):
    """How many times less budget best-of-N by a needs to reach best-of-`at` by b; 0 where it does not reach it."""

    a: str
    b: str
    at: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    reached: float | None = None


class Budget(msgspec.Struct, frozen=True):
    equal: list[EqualBudget] = []
    needed: list[NeededBudget] = []


class DepthRow(msgspec.Struct, frozen=True):
    depth: float
    success: ReportedEstimate | None = None
    failure: ReportedEstimate | None = None
    auroc: ReportedEstimate | None = None
    auroc_within_task: ReportedEstimate | None = None


class CalibrationRow(msgspec.Struct, frozen=True):
    predicted: float
    observed: ReportedEstimate | None = None


class CustomSearch(msgspec.Struct, frozen=True):
    """A search from outside the package, in words for the report and for model cards, with "{}" for its size."""

    label: str
    card: str | None = None


class RunResults(msgspec.Struct, frozen=True):
    """The measurements of one run. Every part is optional: the page shows the parts that exist.

    `methods[label][search][size]`, with a known search or one of `searches`; other keys of a method are left out.
    `searches` are those from outside the package, by kind.
    """

    name: str | None = None
    policy: Curve = {}
    oracle: Curve = {}
    # Other keys of a method may have any form; load_results checks the searches.
    methods: dict[str, dict[str, Any]] = {}
    paired: list[Paired] = []
    value_by_depth: dict[str, list[DepthRow]] = {}
    calibration: dict[str, list[CalibrationRow]] = {}
    validation: dict[str, Any] = {}
    training: dict[str, dict[str, list[dict[str, float | None]]]] = {}
    compute: Any = None
    budget: Budget = Budget()
    seconds: dict[str, Any] = {}
    data: Any = None
    provenance: Any = None
    searches: dict[str, CustomSearch] = {}

    @property
    def custom_labels(self) -> dict[str, str]:
        """Words for searches from outside the package, by kind, with "{}" for the size."""
        return {kind: search.label for kind, search in self.searches.items()}

    def curve(self, label: str, search: str) -> dict[str, ReportedEstimate]:
        """The measured points of one method under one search, by ascending size; empty if it was not run."""
        return _measured(self.methods.get(label, {}).get(search) or {})

    def at(self, label: str, search: str, size: str) -> ReportedEstimate | None:
        return self.curve(label, search).get(size)

    def with_search(self, search: str) -> list[str]:
        """The labels of the methods that were measured under this search, in the file's order."""
        return [label for label in self.methods if self.curve(label, search)]

    def oracle_curve(self) -> dict[str, ReportedEstimate]:
        return _measured(self.oracle)

    def baseline(self, name: str) -> ReportedEstimate | None:
        """The success of the policy alone, "sampled" or "greedy"; None if it was not measured."""
        return _measured(self.policy).get(name)


class TreeNode(msgspec.Struct, frozen=True):
    """One candidate action of a search tree; parent 0 is the prompt.

    looked: the promise that looking ahead from it found, absent in searches that do not look ahead.
    """

    id: int
    parent: int = 0
    round: int | None = None
    action: str = ""
    observation: str | None = None
    promise: float | None = None
    progress: float | None = None
    kept: bool = True
    count: int = 1
    done: bool = False
    outcome: float | None = None
    looked: float | msgspec.UnsetType = msgspec.UNSET


class SearchTree(msgspec.Struct, frozen=True):
    """The search of one task: every scored candidate, and the id of the returned one."""

    task: str
    nodes: list[TreeNode] = []
    method: str = ""
    beam: str = ""
    seed: int | str | None = None
    goal: str | None = None
    depth: float | None = None
    outcome: float | None = None
    prompt: str = ""
    best: int | None = None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def size_key(size: str) -> tuple:
    """Sort key of a search size: "4" before "16", "2x2" before "4x4", anything else last."""
    numbers = [int(part) for part in re.findall(r"\d+", size)]
    # The text decides last, so that the order does not depend on the order in the file.
    return (not numbers, numbers, size)


def load_results(path: Path) -> RunResults:
    """Read results.json. Raises UserError if it is missing or does not have the documented form."""
    results = _decode(path, RunResults)
    kinds = (*_SHOWN_ALONE, *TREE_SEARCHES, *results.searches, *AGGREGATED)
    methods = {
        label: {kind: _convert(path, label, kind, curves[kind]) for kind in kinds if curves.get(kind)}
        for label, curves in results.methods.items()
    }
    return msgspec.structs.replace(results, methods=methods)


def load_trees(path: Path) -> list[SearchTree]:
    """Read trees.json; no file means no trees. Raises UserError for another form or a node without its parent."""
    if not path.exists():
        return []
    trees = _decode(path, list[SearchTree])
    # The viewer draws a tree in one pass over its nodes, so a parent has to come first.
    for index, tree in enumerate(trees):
        for node in _orphans(tree):
            raise UserError(
                f"{path}: tree {index} (task {tree.task}): node {node.id} has parent {node.parent}, "
                "expected 0 or the id of a node listed before it; search this task again"
            )
    return trees


def _decode(path: Path, form: type[T]) -> T:
    try:
        content = path.read_bytes()
        # An escape of JSON may be such a character.
        if b"\\u" in content or escape(content.decode()) != content.decode():
            return msgspec.convert(_visible(msgspec.json.decode(content)), form, str_keys=True)
        return msgspec.json.decode(content, type=form)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the evaluation and search stages of this work directory") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; write it again with the evaluation and search stages") from None


def _visible(value: Any) -> Any:
    """A JSON value in whose texts characters that hide or reorder text are written out.

    The texts come from models and files. In figures some of the characters are not even allowed.
    """
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {escape(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list) else value


def _convert(path: Path, label: str, search: str, curve: Any) -> Curve:
    try:
        return msgspec.convert(curve, Curve)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: methods.{label}.{search}: {error}; evaluate this method again") from None


def _measured(curve: Curve) -> dict[str, ReportedEstimate]:
    measured = {size: point for size, point in curve.items() if point is not None and point.mean is not None}
    return dict(sorted(measured.items(), key=lambda item: size_key(item[0])))


def _orphans(tree: SearchTree) -> Iterator[TreeNode]:
    """The nodes whose parent is not listed before them, or whose id is taken: the viewer could not draw them."""
    seen = {0}
    for node in tree.nodes:
        if node.parent not in seen or node.id in seen:
            yield node
        seen.add(node.id)
