"""The registry of search algorithms, and guided search: one file for each search, one line for each task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from jaxprm import config as config_lib
from jaxprm import files, plugins
from jaxprm.environments import Environment
from jaxprm.errors import UserError
from jaxprm.evaluation.statistics import bootstrap
from jaxprm.policies.protocol import Policy, prefix_hash
from jaxprm.progress import bar
from jaxprm.search.beam import BEAM, DIVERSE, LOOKAHEAD, STEPWISE
from jaxprm.search.branches import BranchRunner, check_can_fork
from jaxprm.search.mcts import MCTS
from jaxprm.search.spec import SearchMethod, SearchRequest, SearchSpec
from jaxprm.search.tree import ActionScorer, Prices, SearchLimits, Tree, tokens_read, tree_to_dict

# Every search algorithm by its kind. The order is that of results.json and of the files' creation.
SEARCHES: dict[str, SearchMethod] = {method.kind: method for method in (BEAM, STEPWISE, DIVERSE, LOOKAHEAD, MCTS)}
# Names that the search stage and results.json use for something else.
_RESERVED = {"pool", "greedy", "values", "best_of_n", "prefix_best_of_n"}


def register(method: SearchMethod) -> SearchMethod:
    """Adds a search algorithm, so that SearchConfig.custom can name it by its kind. Returns it.

    Raises UserError if the kind belongs to another algorithm.
    """
    _check_kind(method)
    return SEARCHES.setdefault(method.kind, method)


def find_method(name: str) -> SearchMethod:
    """The search algorithm of a registered kind, or the SearchMethod that "module:attribute" names.

    Raises UserError if there is none, or if its kind belongs to another algorithm.
    """
    if name in SEARCHES:
        return SEARCHES[name]
    method = plugins.locate("search", name, name, choices=f"one of {', '.join(SEARCHES)}")
    if not isinstance(method, SearchMethod):
        raise UserError(f"search {name!r}: is a {type(method).__name__}; name a jaxprm.search.spec.SearchMethod")
    _check_kind(method)
    return method


def _check_kind(method: SearchMethod) -> None:
    if method.kind in _RESERVED or SEARCHES.get(method.kind, method) != method:
        raise UserError(f"search {method.kind!r}: this kind already has a meaning; choose another one")


def search_specs(settings: config_lib.SearchConfig) -> list[SearchSpec]:
    """All searches of a run: those of the shipped algorithms' config fields, then those of `custom`.

    Raises UserError if `custom` names no search algorithm, two algorithms of one kind, or sizes that do not fit.
    """
    entries = [
        (method, entry, f"search.{method.config_field}")
        for method in SEARCHES.values()
        if method.config_field is not None
        for entry in getattr(settings, method.config_field)
    ]
    methods = dict(SEARCHES)
    for name, sizes in settings.custom.items():
        method = find_method(name)
        if methods.setdefault(method.kind, method) != method:
            raise UserError(f"search.custom: {name!r} is a second search of kind {method.kind!r}; rename one of them")
        entries += [(method, entry, f'search.custom["{name}"]') for entry in sizes]
    # An entry of `stepwise` is a single number.
    return [
        method.spec(*([entry] if isinstance(entry, int) else entry), field=field) for method, entry, field in entries
    ]


class RandomScorer:
    """Uniform random scores, the control of a guided search. They depend only on seed, conversation and action."""

    def __init__(self, seed: int):
        self._seed = seed
        self.usage = {"encoded": 0}

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Scores in [0, 1), one array [N] for each state."""
        return [
            np.asarray([self._uniform(name, text) for text in texts], np.float32)
            for name, texts in zip(map(prefix_hash, states), candidates, strict=True)
        ]

    def forget(self) -> None:
        """Does nothing: there is no cache."""

    def _uniform(self, name: str, text: str) -> float:
        digest = hashlib.sha256(f"{self._seed}\x1f{name}\x1f{text}".encode()).digest()
        # 24 bits, the precision of float32: with more, a score could be rounded up to 1.
        return int.from_bytes(digest[:3], "big") / 2**24


# Paths searched together: enough to fill a batch, and half of what the scorer's cache holds with 64 episodes in flight.
PATHS_AT_ONCE = 96
# Tasks searched together: a killed process loses at most this many.
TASKS_AT_ONCE = 48


def guided_search(
    make_environment: Callable[[], Environment],
    policy: Policy,
    scorer: ActionScorer,
    tasks: Sequence[str],
    output: Path,
    *,
    settings: config_lib.SearchConfig,
    spec: SearchSpec,
    label: str,
    about: dict,
    prices: Prices = Prices(),
) -> Path:
    """Searches every task and writes one line for each to `output`, in the order of `tasks`; returns `output`.

    A line: {"task", "outcome", "score", "rounds", "ended"?, "proposed", "merged", "cut", "failed", "errors",
    "unscored"?, "policy_tokens", "reward_tokens", "reward_encoded", "environment_steps", "tree"?}. "unscored" counts
    candidates that the scorer could not score.

    "reward_tokens" are the tokens of the task's tree, the least that a scorer has to read. Tasks are scored together,
    so "reward_encoded", the tokens that the scorer read, is divided among the tasks of a call in proportion to them.
    "ended" is the limit that stopped the search early. `settings.trees` tasks, spread evenly, have a "tree".

    Args:
        label: of the progress bar.
        about: added to every tree.
        prices: of tokens, in the unit of `settings.budget`.

    Finished tasks are kept in `output`.partial, from which an interrupted search resumes. Raises UserError if the
    search needs branches and the environment cannot fork, or does not return one tree for each task.
    """
    resumable = files.ResumableLines(output)
    if resumable.is_finished():
        return output
    with closing(BranchRunner(make_environment)) as runner:
        if spec.forks:
            check_can_fork(runner.environment, spec.at)
        with resumable:
            before = resumable.read()
            done = {line["task"] for line in before}
            missing = [task for task in tasks if task not in done]
            # Spread evenly, as a split may be ordered by difficulty.
            spread = tasks[:: max(1, len(tasks) // settings.trees)][: settings.trees] if settings.trees else ()
            about_trees = {task: about | runner.describe(task) for task in missing if task in set(spread)}
            limits = SearchLimits(settings.stop_at, settings.budget, prices)
            successes = [line["outcome"] for line in before]
            tokens = sum(line["policy_tokens"] + line["reward_tokens"] for line in before)
            together = min(TASKS_AT_ONCE, max(1, PATHS_AT_ONCE // spec.cached_paths))
            with bar(label, len(tasks), initial=len(done), unit="task") as progress:
                for start in range(0, len(missing), together):
                    chunk = missing[start : start + together]
                    # The scorer counts over its lifetime; the difference to this is the chunk's.
                    encoded = scorer.usage["encoded"]
                    trees = spec.method.run(SearchRequest(chunk, runner, policy, scorer, spec, settings, limits))
                    _check_trees(spec.kind, trees, chunk)
                    lines = [_line(tree, policy, runner, about_trees.get(tree.task)) for tree in trees]
                    resumable.append(_with_encoded(lines, scorer.usage["encoded"] - encoded))
                    successes += [tree.best.branch.outcome or 0.0 for tree in trees]
                    tokens += sum(line["policy_tokens"] + line["reward_tokens"] for line in lines)
                    progress.set_postfix(success=_success_rate(successes), tokens=f"{tokens:,}", refresh=False)
                    progress.update(len(chunk))
            # Read back: earlier, interrupted calls have written some of the lines.
            ordered = {line["task"]: line for line in resumable.read()}
            resumable.finish(ordered[task] for task in tasks)
    return output


def _check_trees(kind: str, trees: object, tasks: Sequence[str]) -> None:
    if not isinstance(trees, list) or not all(isinstance(tree, Tree) for tree in trees):
        types = sorted({type(tree).__name__ for tree in trees}) if isinstance(trees, list) else []
        returned = type(trees).__name__ + (f" of {', '.join(types)}" if types else "")
        raise UserError(f"search {kind}: returned a {returned}; return a list with one Tree for each task, in order")
    if len(trees) != len(tasks):
        raise UserError(f"search {kind}: returned {len(trees)} trees for {len(tasks)} tasks; return one for each task")
    for tree, task in zip(trees, tasks, strict=True):
        if tree.task != task:
            raise UserError(
                f"search {kind}: returned the tree of {tree.task!r} in place of {task!r}; "
                "return one tree for each task, in the order of the tasks"
            )


def _success_rate(outcomes: Sequence[float]) -> str:
    # Few samples: this is for the progress bar only, and computed after every chunk.
    estimate = bootstrap(outcomes, samples=500)
    return f"{estimate['mean']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"


def _line(tree: Tree, policy: Policy, runner: BranchRunner, about: dict | None) -> dict:
    best = tree.best
    line = {
        "task": tree.task,
        # An open path has no outcome: the search stopped at a limit before the task was solved.
        "outcome": best.branch.outcome if best.branch.outcome is not None else 0.0,
        "score": best.promise,
        "rounds": tree.rounds,
        "proposed": tree.proposed,
        "merged": tree.merged,
        "cut": tree.cut,
        "failed": tree.failed,
        # The root is kept and never executed; it has an error if the task could not start.
        "errors": sum(node.branch.error is not None for node in (tree.root, *tree.nodes) if node.executed or node.kept),
        "policy_tokens": tree.generated,
        "reward_tokens": tokens_read(tree, policy.count_tokens),
        "environment_steps": sum(runner.cost(node.branch) for node in tree.nodes if node.executed),
    }
    if tree.unscored:
        line["unscored"] = tree.unscored
    if tree.ended is not None:
        line["ended"] = tree.ended
    if about is not None:
        line["tree"] = tree_to_dict(tree, **about)
    return line


def _with_encoded(lines: list[dict], encoded: int) -> list[dict]:
    """Divides the tokens that the scorer read in one call among its lines."""
    least = sum(line["reward_tokens"] for line in lines)
    return [line | {"reward_encoded": encoded * line["reward_tokens"] / max(1, least)} for line in lines]
