"""The whole loop in one work directory: collect, build, train, search, report. Each stage resumes by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from data_pipeline.errors import listed
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.progress import absolute
from jaxprm.workflow import user_files
from jaxprm.workflow.context import Run
from jaxprm.workflow.workdir import WorkDirectory

STAGES = ("collect", "build", "train", "search", "report")


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
    from jaxprm.training import distributed, metrics

    state = Run(experiment, WorkDirectory(workdir, redo=redo), profile)
    if not distributed.is_primary():
        if STAGES.index(until) >= STAGES.index("train"):
            run_secondary_process(state)
        return None
    with state.work.lock():
        # Before any work is spent: what is there must have been made with this config, and the last stage be possible.
        state.work.check(stage_inputs(state, until))
        if STAGES.index(until) >= STAGES.index("train"):
            metrics.check_wandb(experiment.logging)
        if STAGES.index(until) >= STAGES.index("search"):
            from jaxprm.workflow import search_stage

            search_stage.check(state)
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


def stage_inputs(state: Run, until: str) -> dict[str, dict[str, Any]]:
    """What goes into every stage up to `until`, by the stage's name."""
    found = {"collect": state.collect_inputs}
    reached = STAGES.index(until)
    if reached >= STAGES.index("build"):
        found["build"] = state.build_inputs
    if reached >= STAGES.index("train"):
        found |= {f"train-{m.label}-{seed}": state.train_inputs(m, seed) for m, seed in state.trained()}
    if reached >= STAGES.index("search"):
        from jaxprm.workflow import search_stage

        found |= {f"search-{name}": inputs for name, inputs in search_stage.stage_inputs(state).items()}
    return found


def collect(state: Run) -> None:
    """Trajectories of the training and validation tasks, at the collection's temperature."""
    from jaxprm.policies.rollouts import collect as sample

    settings = state.experiment.collection
    outputs = {split: state.work / f"trajectories/{split}.jsonl" for split in ("train", "validation")}
    limits = {"train": settings.train_tasks, "validation": settings.validation_tasks}
    with state.work.stage("collect", state.collect_inputs, list(outputs.values())) as needed:
        if not needed:
            return
        if settings.files:
            import_user_files(state, outputs)
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


def import_user_files(state: Run, outputs: dict[str, Path]) -> None:
    """The user's own trajectories, in the place of sampled ones."""
    settings = state.experiment.collection
    taken = user_files.import_files(
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
            if distributed.broadcast_from_primary(needed):
                _train(state, model, seed, output)


def run_secondary_process(state: Run) -> None:
    """What a process that is not the first does: it waits for the shards and trains what the first one trains."""
    from jaxprm.training import distributed

    for model, seed in state.trained():
        if distributed.broadcast_from_primary(False):
            _train(state, model, seed, state.model_directory(model.label, seed))


def _train(state: Run, model: config_lib.RewardModelConfig, seed: int, output: Path) -> None:
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
    from jaxprm.workflow import search_stage

    search_stage.search(state)


def report(state: Run) -> Path:
    """results.json from the files of all stages, and the page that shows it."""
    from jaxprm.report import build_report
    from jaxprm.workflow.results import write_results

    write_results(state)
    return build_report(state.work.path)
