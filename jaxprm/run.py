"""The whole loop in one work directory: collect, build, train, search, report. Each stage resumes by itself."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import listed
from jaxprm import config as config_lib
from jaxprm import environments, files, trajectory_files
from jaxprm.environments.worker import Workers
from jaxprm.errors import UserError
from jaxprm.policies import loading
from jaxprm.progress import absolute
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
        return loading.load(self.experiment)

    @functools.cached_property
    def base_directory(self) -> Path:
        """What reward models start from, and whose tokenizer they read with."""
        return loading.base_directory(self.experiment)

    @functools.cached_property
    def policy_identity(self) -> str:
        """Of a directory its files; a policy that is none is what it is called."""
        settings = self.experiment.policy
        if loading.is_directory(settings):
            return _model_identity(loading.policy_directory(settings), settings.chat_template)
        return identity(self._policy_inputs)

    def close(self) -> None:
        """Lets go of what the policy holds, and says what could not be had from it, or from environments."""
        if "policy" in vars(self) and hasattr(self.policy, "close"):
            self.policy.close()
            usage = getattr(self.policy, "usage", {})
            if usage.get("retries") or usage.get("failures"):
                counted = ", ".join(f"{value} {name}" for name, value in usage.items())
                print(f"policy: {counted}", file=sys.stderr)
        if ended := getattr(vars(self).get("make_environment"), "ended", None):
            counted = ", ".join(f"{count} {reason}" for reason, count in sorted(ended.items()))
            print(f"environment: processes replaced: {counted}", file=sys.stderr)

    @functools.cached_property
    def make_environment(self) -> Callable[[], environments.Environment]:
        settings = self.experiment.environment
        if not settings.workers:
            return functools.partial(environments.create, settings.name, settings.arguments)
        memory = None if settings.memory_mb is None else settings.memory_mb << 20
        return Workers(
            settings.name, settings.arguments, at_once=settings.workers, timeout=settings.timeout, memory=memory
        )

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

    @functools.cached_property
    def _policy_inputs(self) -> dict[str, Any]:
        """What its draws depend on. How many are in flight, and where a server stands, change the speed alone."""
        given, settings = config_lib.to_dict(self.experiment)["policy"], self.experiment.policy
        found = {name: given[name] for name in ("max_action_tokens", "max_tokens")}
        if loading.is_directory(settings):
            return found | {"path": self.policy_identity}
        if settings.endpoint is not None:
            return found | {"endpoint": {name: given["endpoint"][name] for name in ("model", "extra_body")}}
        return found | {"path": settings.path, "arguments": given["arguments"]}

    @property
    def _environment_inputs(self) -> dict[str, Any]:
        """Where and how many at a time they run changes the speed alone."""
        given = config_lib.to_dict(self.experiment)["environment"]
        return {name: given[name] for name in ("name", "arguments")}

    @property
    def collect_inputs(self) -> dict[str, Any]:
        plain = config_lib.to_dict(self.experiment)
        collection = plain["collection"]
        share = collection.pop("validation_share")
        del collection["files"], collection["skip_bad"]  # what is skipped, nobody could have finished with
        if self.experiment.collection.files:
            return {"files": self._files_identity, "validation_share": share, "seed": plain["seed"]}
        return {
            "environment": self._environment_inputs,
            "policy": self._policy_inputs,
            "collection": collection,
            "seed": plain["seed"],
        }

    @functools.cached_property
    def _files_identity(self) -> list[dict[str, str | None]]:
        return trajectory_files.identity(self.experiment.collection.files)

    @property
    def build_inputs(self) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        return {
            "trajectories": identity(self.collect_inputs),
            "data": {name: data[name] for name in ("shards", "length", "too_long")},
        } | self._base_inputs

    @functools.cached_property
    def _base_inputs(self) -> dict[str, Any]:
        """Sampled trajectories depend on the policy, whose tokenizer may encode them; a user's own do not."""
        directory, template = self.base_directory, self.experiment.policy.chat_template  # or no work is begun
        if self.experiment.base_model is None and not self.experiment.collection.files:
            return {}
        return {"base_model": _model_identity(directory, template)}

    def train_inputs(self, model: config_lib.RewardModel, seed: int) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        del data["skip_bad"]  # what is skipped is part of a training's own identity
        return {
            "shards": identity(self.build_inputs),
            "data": data,
            "reward_model": config_lib.recorded(model),
            "seed": seed,
        }

    @property
    def search_inputs(self) -> dict[str, Any]:
        """What every search depends on; each adds its own."""
        plain = config_lib.to_dict(self.experiment)
        return {
            "environment": self._environment_inputs,
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
    from jaxprm.training import distributed, wandb_sink

    state = Run(experiment, WorkDirectory(workdir, redo=redo), profile)
    if not distributed.is_primary():
        if STAGES.index(until) >= STAGES.index("train"):
            follow(state)
        return None
    with state.work.lock():
        # Before any work is spent: what is there must have been made with this config, and the last stage be possible.
        state.work.check(stage_inputs(state, until))
        if STAGES.index(until) >= STAGES.index("train"):
            wandb_sink.check(experiment.logging)
        if STAGES.index(until) >= STAGES.index("search"):
            from jaxprm.search import stage

            stage.check(state)
        files.write_json(workdir / "config.json", config_lib.to_dict(experiment))
        steps: dict[str, Callable[[Run], Any]] = {
            "collect": collect,
            "build": build,
            "train": train,
            "search": search,
            "report": report,
        }
        result = None
        with closing(state):
            for name in STAGES[: STAGES.index(until) + 1]:
                result = steps[name](state)
        return result if until == "report" else None


def _model_identity(directory: Path, template: str) -> str:
    """Of a model's files, and of a chat template that is not its own."""
    from data_pipeline.template_choice import read_template
    from jaxprm.model.tensor_files import model_files

    text = read_template(template)
    found = [files.sha256(directory / name) for name in model_files(directory)]
    return identity(found if text is None else [*found, text])


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
        if settings.files:
            take_files(state, outputs)
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


def take_files(state: Run, outputs: dict[str, Path]) -> None:
    """The user's own trajectories, in the place of sampled ones."""
    settings = state.experiment.collection
    taken = trajectory_files.take(
        settings.files,
        outputs,
        validation_share=settings.validation_share,
        seed=state.experiment.seed,
        skip_bad=settings.skip_bad,
    )
    print("trajectories: " + ", ".join(f"{count} {split}" for split, count in sorted(taken.splits.items())))
    if unused := sorted(taken.splits.keys() - outputs.keys()):
        print(f"not used: trajectories of {', '.join(unused)}")
    print("".join(f"{line}\n" for line in listed(taken.bad)), end="", file=sys.stderr)


def build(state: Run) -> None:
    """Shards of the collected trajectories, encoded with the base model's tokenizer."""
    from data_pipeline import build as builder
    from data_pipeline.encode import Encoder

    settings, output, bad = state.experiment.data, state.work / "shards", []
    with state.work.stage("build", state.build_inputs, [output]) as needed:
        if not needed or (output / "metadata.json").exists():
            return
        inputs = {split: [state.work / f"trajectories/{split}.jsonl"] for split in ("train", "validation")}
        with absolute("build shards", unit="trajectory") as show:
            builder.build(
                inputs,
                Encoder.load(state.base_directory, state.experiment.policy.chat_template),
                output,
                max_length=settings.length,
                too_long=settings.too_long,
                shards=settings.shards,
                progress=show,
                skip_bad=bad.append if state.experiment.collection.skip_bad else None,
            )
        print("".join(f"{line}\n" for line in listed(bad)), end="", file=sys.stderr)


def train(state: Run) -> None:
    """Every reward model with every seed, on the same shards, from the base model's weights."""
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

    paths = {"shards": state.work / "shards", "base": state.base_directory, "output": output}
    train_reward_model(state.experiment, model, seed, **paths, profile=state.profile)


def validation_lines(experiment: config_lib.Experiment, workdir: Path) -> list[str]:
    """What the trained reward models are worth on the validation trajectories, one line each."""
    lines = []
    state = Run(experiment, WorkDirectory(workdir))
    for model, seed in state.trained():
        recipe = files.read_json(state.model_directory(model.label, seed) / "model/reward_model.json")
        found = ", ".join(f"{name} {value:.4g}" for name, value in recipe["validation"].items() if value is not None)
        lines.append(f"{model.label}, seed {seed}: {found}")
    return lines


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
