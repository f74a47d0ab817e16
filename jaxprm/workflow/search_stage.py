"""The search stage of a run: a pool of trajectories that all methods share, its scores, and every guided search."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import msgspec

from data_pipeline.errors import DataError, one_line
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation.best_of_n import VOTES
from jaxprm.policies.rollouts import collect
from jaxprm.progress import bar
from jaxprm.scoring.engine import bucket_of
from jaxprm.scoring.loading import all_devices, load_scorer
from jaxprm.scoring.log_ratio import check_tokenizers, load_log_ratio
from jaxprm.search.branches import check_can_fork
from jaxprm.search.methods import RandomScorer, guided_search, search_specs
from jaxprm.search.tree import Prices
from jaxprm.workflow.context import Run, flops_of_log_ratio, flops_of_tokens, log_ratio_inputs
from jaxprm.workflow.workdir import identity

# Label of the baseline in file names and in results.json.
PROGRESS_ADVANTAGE = "progress_advantage"
# Conversations in one call to the scorer: the progress bar moves after each call.
SCORED_AT_ONCE = 256


def stage_inputs(run: Run) -> dict[str, dict[str, Any]]:
    """Recorded inputs of each file of WORKDIR/search, by its name without ending."""
    settings, common = run.experiment.search, run.search_inputs
    pool = common | {"count": settings.pool}
    inputs = {"pool": pool, "greedy": common}

    def add_searches(label: str, seed: int, scorer: dict[str, Any]) -> None:
        for spec in search_specs(settings):
            inputs[spec.file_name(label, seed)] = common | spec.inputs(settings_for(settings, label)) | scorer

    for seed in run.experiment.reward_seeds:
        add_searches("random", seed, {"random_seed": seed})
    if settings.progress_advantage is not None:
        # Nothing is trained or drawn, so there is one seed.
        scorer, seed = log_ratio_inputs(run), run.experiment.reward_seeds[0]
        add_searches(PROGRESS_ADVANTAGE, seed, scorer)
        inputs[f"values-pool-{PROGRESS_ADVANTAGE}-{seed}"] = scorer | {"trajectories": identity(pool)}
    for model, seed in run.trained():
        trained = {"reward_model": identity(run.train_inputs(model, seed))}
        add_searches(model.label, seed, trained)
        for name, trajectories in (("pool", pool), ("validation", run.collect_inputs)):
            inputs[f"values-{name}-{model.label}-{seed}"] = trained | {"trajectories": identity(trajectories)}
    return inputs


def settings_for(settings: config_lib.SearchConfig, label: str) -> config_lib.SearchConfig:
    """The settings of a label's searches: without `stop_at`, a promise, where scores are sums of log-ratios."""
    return msgspec.structs.replace(settings, stop_at=None) if label == PROGRESS_ADVANTAGE else settings


def check(run: Run) -> None:
    """Raises UserError if the environment or the policy lacks something that the search settings need."""
    settings = run.experiment.search
    environment = run.make_environment()
    try:
        for spec in search_specs(settings):
            if spec.forks:
                check_can_fork(environment, f"search {spec.at}")
        if (votes := sorted(VOTES.keys() & set(settings.aggregations))) and not hasattr(environment, "answer"):
            raise UserError(
                f"search.aggregations: {', '.join(votes)} compare answers, and the environment has no answer() method; "
                "define it, or drop them"
            )
    finally:
        environment.close()
    # Called for their errors: a budget in FLOPs needs a policy of known size, and a log-ratio two models.
    token_prices(run, "")
    if (directories := run.progress_advantage) is not None:
        check_tokenizers(*directories)


def token_prices(run: Run, label: str) -> Prices:
    """Prices of tokens in the unit of `search.budget`. Random scores read nothing, so their price is 0.

    Raises UserError if the budget is in FLOPs and the size of the policy is unknown.
    """
    settings, free = run.experiment.search, label == "random"
    if settings.budget is None or settings.budget_unit == "tokens":
        return Prices(read=float(not free))
    policy, reward = flops_of_tokens(run)
    if not math.isfinite(policy):
        raise UserError(
            'search.budget_unit = "flops": the size of the policy is not known; set it to "tokens" and give the budget '
            "in tokens"
        )
    if label == PROGRESS_ADVANTAGE:
        reward = flops_of_log_ratio(run)
    return Prices(policy, 0.0 if free else reward)


def search(run: Run) -> None:
    """Fills WORKDIR/search. Every file is complete or absent; complete ones are skipped."""
    settings = run.experiment.search
    tasks = run.tasks(settings.split, settings.tasks)
    stages = _Stages(run)
    stages.sample(tasks, "pool", count=settings.pool, temperature=settings.temperature)
    stages.sample(tasks, "greedy", count=1, temperature=0.0)
    for seed in run.experiment.reward_seeds:
        stages.searches(tasks, "random", seed, functools.partial(RandomScorer, seed))
    if settings.progress_advantage is not None:
        seed, scorer = run.experiment.reward_seeds[0], functools.cache(functools.partial(_load_log_ratio, run))
        stages.values(f"values-pool-{PROGRESS_ADVANTAGE}-{seed}", run.work / "search/pool.jsonl", scorer)
        stages.searches(tasks, PROGRESS_ADVANTAGE, seed, scorer)
    for model, seed in run.trained():
        # Loaded when the first file needs it and dropped with this iteration: one reward model is in memory at a time.
        scorer = functools.cache(functools.partial(_load_scorer, run, model, seed))
        for name, source in (("pool", "search/pool.jsonl"), ("validation", "trajectories/validation.jsonl")):
            stages.values(f"values-{name}-{model.label}-{seed}", run.work / source, scorer)
        stages.searches(tasks, model.label, seed, scorer)


class _Stages:
    """Writes the files of WORKDIR/search, each as a stage of its own."""

    def __init__(self, run: Run):
        self._run = run
        self._inputs = stage_inputs(run)

    def _stage(self, name: str) -> tuple[Path, Any]:
        output = self._run.work / f"search/{name}.jsonl"
        return output, self._run.work.stage(f"search-{name}", self._inputs[name], [output])

    def sample(self, tasks: list[str], name: str, *, count: int, temperature: float) -> None:
        """Complete trajectories of the plain policy, `count` for each task."""
        run = self._run
        output, stage = self._stage(name)
        with stage as needed:
            if needed:
                collect(
                    run.make_environment,
                    run.policy,
                    tasks,
                    output,
                    count=count,
                    temperature=temperature,
                    in_flight=run.experiment.policy.in_flight,
                    split=run.experiment.search.split,
                    environment=run.experiment.environment.name,
                    seed=run.experiment.seed,
                    label=f"sample {name}",
                )

    def values(self, name: str, source: Path, make_scorer: Callable[[], Any]) -> None:
        """The promise of every step in a trajectory file."""
        output, stage = self._stage(name)
        with stage as needed:
            if needed:
                _score_file(make_scorer(), source, output, name.replace("-", " "))

    def searches(self, tasks: list[str], label: str, seed: int, make_scorer: Callable[[], Any]) -> None:
        """Every guided search of the run, with one scorer."""
        run = self._run
        for spec in search_specs(run.experiment.search):
            name = spec.file_name(label, seed)
            output, stage = self._stage(name)
            with stage as needed:
                if not needed:
                    continue
                scorer = make_scorer()
                # With an empty cache, results and costs do not depend on which searches ran before.
                scorer.forget()
                guided_search(
                    run.make_environment,
                    run.policy,
                    scorer,
                    tasks,
                    output,
                    settings=settings_for(run.experiment.search, label),
                    spec=spec,
                    label=f"{name.rsplit('-', 2)[0]} {label}/{seed}",
                    about={"method": label, "beam": spec.cost_key, "seed": seed},
                    prices=token_prices(run, label),
                )


def _load_scorer(run: Run, model: config_lib.RewardModelConfig, seed: int):
    settings = run.experiment.policy
    directory = run.model_directory(model.label, seed) / "model"
    longest = settings.max_tokens + settings.max_action_tokens
    return load_scorer(directory, rows=max(1, settings.in_flight // 2), max_tokens=longest, mesh=_mesh(run))


def _load_log_ratio(run: Run):
    return load_log_ratio(*run.progress_advantage, **run.experiment.policy.encoding, mesh=_mesh(run))


def _mesh(run: Run) -> config_lib.MeshConfig | None:
    # Process 0 searches alone, so in a run of several processes it can use only its own devices.
    return all_devices() if jax.process_count() > 1 else run.experiment.mesh if jax.device_count() > 1 else None


def _score_file(scorer, source: Path, output: Path, label: str) -> None:
    """Writes {"id", "values", "tokens", "prompt_tokens"} for each trajectory that did not end in an error.

    One that cannot be scored has {"id", "error"}, and their number is printed.
    """
    lines = [line for line in files.read_lines(source) if line.get("ended") != "error"]
    # Equal conversations are scored once. The last of them lends its id, which only appears in error messages.
    keys = [files.line([line["messages"], line.get("tools")]) for line in lines]
    distinct = dict(zip(keys, lines, strict=True))
    unscored = list(distinct)
    scores: dict[str, dict[str, Any]] = {}
    with bar(label, len(unscored), unit="trajectory") as progress:
        for start in range(0, len(unscored), SCORED_AT_ONCE):
            chunk = unscored[start : start + SCORED_AT_ONCE]
            encoded, names = {}, []
            for key in chunk:
                line, name = distinct[key], distinct[key]["id"]
                try:
                    trajectory = scorer.encoder.trajectory(line["messages"], row=name, tools=line.get("tools"))
                    bucket_of(len(trajectory.tokens), name)
                except (DataError, UserError) as error:
                    scores[key] = {"error": one_line(error)}
                    continue
                encoded[key] = trajectory
                names.append(name)
            promises = scorer.score_encoded([*encoded.values()], names)
            for (key, trajectory), values in zip(encoded.items(), promises, strict=True):
                scores[key] = {
                    "values": values.tolist(),
                    "tokens": len(trajectory.tokens),
                    "prompt_tokens": int(trajectory.state_positions[0]) + 1,
                }
            progress.update(len(chunk))
    rows = [{"id": line["id"]} | scores[key] for line, key in zip(lines, keys, strict=True)]
    files.write_atomic(output, "".join(map(files.line, rows)))
    if errors := [row["error"] for row in rows if "error" in row]:
        print(f"{output}: {len(errors)} of {len(rows)} trajectories cannot be scored: {errors[0]}", file=sys.stderr)
