"""The search stage of a run: one pool a task shared by all methods, its scores, and every guided search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation.best_of_n import VOTES
from jaxprm.policies.rollouts import collect
from jaxprm.progress import bar
from jaxprm.scoring.loading import all_devices, load_scorer
from jaxprm.search.branches import check_can_fork
from jaxprm.search.methods import RandomScorer, guided_search, search_specs
from jaxprm.search.tree import Prices
from jaxprm.workflow.context import flops_of_tokens
from jaxprm.workflow.workdir import identity

SCORED_AT_ONCE = 256


def stage_inputs(state) -> dict[str, dict[str, Any]]:
    """What goes into each file of WORKDIR/search, by its name without ending."""
    settings, common = state.experiment.search, state.search_inputs
    pool = common | {"count": settings.pool}
    found = {"pool": pool, "greedy": common}

    def guided(label: str, seed: int, judge: dict[str, Any]) -> None:
        for spec in search_specs(settings):
            found[spec.file_name(label, seed)] = common | spec.inputs(settings) | judge

    for seed in state.experiment.reward_seeds:
        guided("random", seed, {"random_seed": seed})
    for model, seed in state.trained():
        trained = {"reward_model": identity(state.train_inputs(model, seed))}
        guided(model.label, seed, trained)
        for name, upstream in (("pool", pool), ("validation", state.collect_inputs)):
            found[f"values-{name}-{model.label}-{seed}"] = trained | {"trajectories": identity(upstream)}
    return found


def check(state) -> None:
    """Raises UserError for what the settings ask of the environment or the policy and they have not."""
    settings = state.experiment.search
    environment = state.make_environment()
    try:
        if any(spec.forks for spec in search_specs(settings)):
            check_can_fork(environment, "search.beams, diverse, lookahead and mcts")
        if (votes := sorted(VOTES.keys() & set(settings.aggregations))) and not hasattr(environment, "answer"):
            raise UserError(
                f"search.aggregations: {', '.join(votes)} compare answers, and the environment has no answer() method"
            )
    finally:
        environment.close()
    prices(state, "")


def prices(state, label: str) -> Prices:
    """What a token costs in the unit of the budget. Random scores read none."""
    settings, free = state.experiment.search, label == "random"
    if settings.budget is None or settings.budget_unit == "tokens":
        return Prices(read=float(not free))
    policy, reward = flops_of_tokens(state)
    if not math.isfinite(policy):
        raise UserError('search.budget_unit = "flops": the size of the policy is not known; give the budget in tokens')
    return Prices(policy, 0.0 if free else reward)


def search(state) -> None:
    """Fills WORKDIR/search. Every file is whole or absent, and skipped when it is there."""
    settings = state.experiment.search
    tasks = state.tasks(settings.split, settings.tasks)
    stages = _Stages(state)
    stages.sample(tasks, "pool", count=settings.pool, temperature=settings.temperature)
    stages.sample(tasks, "greedy", count=1, temperature=0.0)
    for seed in state.experiment.reward_seeds:
        stages.guided(tasks, "random", seed, lambda seed=seed: RandomScorer(seed))
    for model, seed in state.trained():
        loaded: list = []

        def scorer(model=model, seed=seed, loaded=loaded):
            if not loaded:
                loaded.append(_scorer(state, model, seed))
            return loaded[0]

        for name, source in (("pool", "search/pool.jsonl"), ("validation", "trajectories/validation.jsonl")):
            stages.values(f"values-{name}-{model.label}-{seed}", state.work / source, scorer)
        stages.guided(tasks, model.label, seed, scorer)


class _Stages:
    """The kinds of file in WORKDIR/search, each made once."""

    def __init__(self, state):
        self._state = state
        self._inputs = stage_inputs(state)

    def _stage(self, name: str) -> tuple[Path, Any]:
        output = self._state.work / f"search/{name}.jsonl"
        return output, self._state.work.stage(f"search-{name}", self._inputs[name], [output])

    def sample(self, tasks: list[str], name: str, *, count: int, temperature: float) -> None:
        """Whole trajectories of the plain policy."""
        state = self._state
        output, stage = self._stage(name)
        with stage as needed:
            if needed:
                collect(
                    state.make_environment,
                    state.policy,
                    tasks,
                    output,
                    count=count,
                    temperature=temperature,
                    in_flight=state.experiment.policy.in_flight,
                    split=state.experiment.search.split,
                    environment=state.experiment.environment.name,
                    seed=state.experiment.seed,
                    label=f"sample {name}",
                )

    def values(self, name: str, source: Path, scorer) -> None:
        """Promise of every step of a trajectory file."""
        output, stage = self._stage(name)
        with stage as needed:
            if needed:
                _score_file(scorer(), source, output, name.replace("-", " "))

    def guided(self, tasks: list[str], label: str, seed: int, scorer) -> None:
        """Every search of the run."""
        state = self._state
        for spec in search_specs(state.experiment.search):
            name = spec.file_name(label, seed)
            output, stage = self._stage(name)
            with stage as needed:
                if needed:
                    judge = scorer()
                    judge.forget()  # so that a search costs and finds the same, whatever was searched before
                    guided_search(
                        state.make_environment,
                        state.policy,
                        judge,
                        tasks,
                        output,
                        settings=state.experiment.search,
                        spec=spec,
                        label=f"{name.rsplit('-', 2)[0]} {label}/{seed}",
                        about={"method": label, "beam": spec.cost_key, "seed": seed},
                        prices=prices(state, label),
                    )


def _scorer(state, model, seed: int):
    settings = state.experiment.policy
    # Searching is process 0's alone: a mesh of the whole run is more than it has.
    mesh = all_devices() if jax.process_count() > 1 else state.experiment.mesh if jax.device_count() > 1 else None
    directory = state.model_directory(model.label, seed) / "model"
    longest = settings.max_tokens + settings.max_action_tokens
    return load_scorer(directory, rows=max(1, settings.in_flight // 2), max_tokens=longest, mesh=mesh)


def _score_file(scorer, source: Path, output: Path, label: str) -> None:
    """{"id", "values", "tokens", "prompt_tokens"} a line; equal conversations are scored once."""
    lines = [line for line in files.read_lines(source) if line.get("ended") != "error"]
    keys = [files.line(line["messages"]) for line in lines]
    # The last of equal conversations stands for all: only its id is ever shown, and only in an error.
    distinct = dict(zip(keys, lines, strict=True))
    unique = list(distinct)
    known: dict[str, dict[str, Any]] = {}
    with bar(label, len(unique), unit="trajectory") as progress:
        for start in range(0, len(unique), SCORED_AT_ONCE):
            chunk = unique[start : start + SCORED_AT_ONCE]
            names = [distinct[key]["id"] for key in chunk]
            encoded = [
                scorer.encoder.trajectory(distinct[key]["messages"], row=name)
                for key, name in zip(chunk, names, strict=True)
            ]
            for key, one, values in zip(chunk, encoded, scorer.score_encoded(encoded, names), strict=True):
                tokens = {"tokens": len(one.tokens), "prompt_tokens": int(one.state_positions[0]) + 1}
                known[key] = {"values": values.tolist()} | tokens
            progress.update(len(chunk))
    rows = [{"id": line["id"]} | known[key] for line, key in zip(lines, keys, strict=True)]
    files.write_atomic(output, "".join(map(files.line, rows)))
