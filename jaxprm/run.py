"""The whole loop in one work directory: collect, build, train, search, report. Each stage resumes by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxprm import config as config_lib
from jaxprm import environments, files
from jaxprm.errors import UserError
from jaxprm.progress import bar
from jaxprm.stages import WorkDirectory, identity

STAGES = ("collect", "build", "train", "search", "report")


@dataclass(frozen=True)
class Run:
    """What every stage needs to know; models are loaded when first used."""

    experiment: config_lib.Experiment
    work: WorkDirectory
    profile: tuple[int, int] | None = None

    @functools.cached_property
    def policy(self):
        from jaxprm.policies import language_model

        settings = self.experiment.policy
        return language_model.load(settings.path, seed=self.experiment.seed, settings=settings)

    @functools.cached_property
    def policy_directory(self) -> Path:
        from jaxprm.policies import language_model

        path = self.experiment.policy.path
        directory = language_model.default_directory() if path == "default" else Path(path)
        if not (directory / "config.json").is_file():
            raise UserError(f"policy {directory}: no config.json; set policy.path to a model directory, or to default")
        return directory

    @functools.cached_property
    def policy_identity(self) -> str:
        names = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
        found = [self.policy_directory / name for name in names]
        return identity([files.sha256(path) for path in found if path.is_file()])

    def make_environment(self) -> environments.Environment:
        return environments.create(self.experiment.environment.name, self.experiment.environment.arguments)

    def tasks(self, split: str, limit: int | None) -> list[str]:
        """The first tasks of a split, spread evenly over it: a split may be ordered by difficulty."""
        environment = self.make_environment()
        try:
            tasks = list(environment.tasks(split))
        finally:
            environment.close()
        if not tasks:
            raise UserError(f"environment {self.experiment.environment.name}: split {split} has no task")
        if limit is None or limit >= len(tasks):
            return tasks
        return [tasks[index * len(tasks) // limit] for index in range(limit)]

    def check_can_fork(self) -> None:
        """Raises UserError where beams are asked for and the environment has a single branch."""
        from jaxprm.search.branches import check_can_fork

        environment = self.make_environment()
        try:
            check_can_fork(environment, "search.beams")
        finally:
            environment.close()

    @property
    def _policy_inputs(self) -> dict[str, Any]:
        """What its draws depend on; how many are in flight changes the speed alone."""
        settings = config_lib.to_dict(self.experiment)["policy"]
        return {name: value for name, value in settings.items() if name != "in_flight"} | {"path": self.policy_identity}

    @property
    def collect_inputs(self) -> dict[str, Any]:
        plain = config_lib.to_dict(self.experiment)
        return {
            "environment": plain["environment"],
            "policy": self._policy_inputs,
            "collection": plain["collection"],
            "seed": plain["seed"],
        }

    @property
    def build_inputs(self) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        return {
            "trajectories": identity(self.collect_inputs),
            "data": {name: data[name] for name in ("shards", "length", "too_long")},
        }

    def train_inputs(self, model: config_lib.RewardModel, seed: int) -> dict[str, Any]:
        return {
            "shards": identity(self.build_inputs),
            "data": config_lib.to_dict(self.experiment)["data"],
            "reward_model": config_lib.recorded(model),
            "seed": seed,
        }

    @property
    def search_inputs(self) -> dict[str, Any]:
        """What every search depends on; each adds its own."""
        plain = config_lib.to_dict(self.experiment)
        return {
            "environment": plain["environment"],
            "policy": self._policy_inputs,
            "seed": plain["seed"],
            "search": {name: plain["search"][name] for name in ("split", "tasks", "temperature")},
        }

    def model_directory(self, label: str, seed: int) -> Path:
        return self.work / f"reward_models/{label}/seed-{seed}"

    def trained(self) -> list[tuple[config_lib.RewardModel, int]]:
        return [(model, seed) for model in self.experiment.reward_models for seed in self.experiment.reward_seeds]


def run(
    experiment: config_lib.Experiment,
    workdir: Path,
    *,
    until: str = "report",
    redo: bool = False,
    profile: tuple[int, int] | None = None,
) -> Path | None:
    """Runs the stages up to `until`; returns the report's path if it was made.

    Of several processes, which share the work directory, all train; process 0 alone does everything else.
    """
    from jaxprm.training import distributed

    state = Run(experiment, WorkDirectory(workdir, redo=redo), profile)
    if not distributed.is_primary():
        if STAGES.index(until) >= STAGES.index("train"):
            follow(state)
        return None
    with state.work.lock():
        # Before any work is spent: what is there must have been made with this config, and the last stage be possible.
        state.work.check(stage_inputs(state, until))
        if STAGES.index(until) >= STAGES.index("search") and any(width > 1 for width, _ in experiment.search.beams):
            state.check_can_fork()
        files.write_json(workdir / "config.json", config_lib.to_dict(experiment))
        steps: dict[str, Callable[[Run], Any]] = {
            "collect": collect,
            "build": build,
            "train": train,
            "search": search,
            "report": report,
        }
        result = None
        for name in STAGES[: STAGES.index(until) + 1]:
            result = steps[name](state)
        return result if until == "report" else None


def stage_inputs(state: Run, until: str) -> dict[str, dict[str, Any]]:
    """What goes into every stage up to `until`, by the stage's name."""
    found = {"collect": state.collect_inputs}
    reached = STAGES.index(until)
    if reached >= STAGES.index("build"):
        found["build"] = state.build_inputs
    if reached >= STAGES.index("train"):
        found |= {f"train-{m.label}-{seed}": state.train_inputs(m, seed) for m, seed in state.trained()}
    if reached >= STAGES.index("search"):
        from jaxprm.search import stage

        found |= {f"search-{name}": inputs for name, inputs in stage.stage_inputs(state).items()}
    return found


def collect(state: Run) -> None:
    """Trajectories of the training and validation tasks, at the collection's temperature."""
    from jaxprm.collect import collect as sample

    settings = state.experiment.collection
    outputs = {split: state.work / f"trajectories/{split}.jsonl" for split in ("train", "validation")}
    limits = {"train": settings.train_tasks, "validation": settings.validation_tasks}
    with state.work.stage("collect", state.collect_inputs, list(outputs.values())) as needed:
        if not needed:
            return
        for split, output in outputs.items():
            sample(
                state.make_environment,
                state.policy,
                state.tasks(split, limits[split]),
                output,
                count=settings.trajectories_per_task,
                temperature=settings.temperature,
                in_flight=state.experiment.policy.in_flight,
                split=split,
                environment=state.experiment.environment.name,
                seed=state.experiment.seed,
                label=f"collect {split}",
            )


def build(state: Run) -> None:
    """Shards of the collected trajectories, encoded with the policy's tokenizer."""
    from data_pipeline import build as builder
    from data_pipeline.encode import Encoder

    settings, output = state.experiment.data, state.work / "shards"
    with state.work.stage("build", state.build_inputs, [output]) as needed:
        if not needed or (output / "metadata.json").exists():
            return
        inputs = {split: [state.work / f"trajectories/{split}.jsonl"] for split in ("train", "validation")}
        with bar("build shards", None, unit="trajectory") as progress:

            def show(done: int, total: int) -> None:
                progress.total = total
                progress.update(done - progress.n)

            builder.build(
                inputs,
                Encoder.load(state.policy_directory),
                output,
                max_length=settings.length,
                too_long=settings.too_long,
                shards=settings.shards,
                progress=show,
            )


def train(state: Run) -> None:
    """Every reward model with every seed, on the same shards, from the policy's weights."""
    from jaxprm.training import distributed

    for model, seed in state.trained():
        output = state.model_directory(model.label, seed)
        with state.work.stage(f"train-{model.label}-{seed}", state.train_inputs(model, seed), [output]) as needed:
            if distributed.agreed(needed):
                _train(state, model, seed, output)


def follow(state: Run) -> None:
    """What a process that is not the first does: it waits for the shards and trains what the first one trains."""
    from jaxprm.training import distributed

    for model, seed in state.trained():
        if distributed.agreed(False):
            _train(state, model, seed, state.model_directory(model.label, seed))


def _train(state: Run, model: config_lib.RewardModel, seed: int, output: Path) -> None:
    from jaxprm.training.train import train_reward_model

    paths = {"shards": state.work / "shards", "base": state.policy_directory, "output": output}
    train_reward_model(state.experiment, model, seed, **paths, profile=state.profile)


def search(state: Run) -> None:
    """Pools, their scores, and guided searches on the held-out tasks."""
    from jaxprm.search import stage

    stage.search(state)


def report(state: Run) -> Path:
    """results.json from the files of all stages, and the page that shows it."""
    from jaxprm.evaluation.results import write_results
    from jaxprm.report import build_report

    write_results(state)
    return build_report(state.work.path)
