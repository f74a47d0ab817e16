"""A whole run in one work directory: collect, build, train, search, report. Each stage resumes by itself.

Stages import their libraries when they start, so a run that stops after an early stage loads none of the later ones'.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from data_pipeline.errors import listed
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.objectives import check_settings
from jaxprm.progress import absolute
from jaxprm.workflow import user_files
from jaxprm.workflow.context import Run
from jaxprm.workflow.outcomes import check_outcomes
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
    """Runs the stages up to `until`, and returns the path of the report if that was written.

    Several processes that share the work directory train together; process 0 alone runs the other stages.

    Args:
        redo: removes the outputs of stages whose inputs have changed, which are refused otherwise.
        profile: first and last step of each training run to trace.

    Raises UserError before any work is spent if the work directory was made with other inputs, if an objective does not
    exist, or if the environment or the policy lacks what a later stage needs.
    """
    from jaxprm.training import distributed

    context = Run(experiment, WorkDirectory(workdir, redo=redo), profile)
    if not distributed.is_primary():
        if _includes(until, "train"):
            run_secondary_process(context)
        return None
    # The lock comes first: another run could be changing the records that `check` reads. Process 0 holds it for all
    # processes of this run.
    with context.work.lock():
        check(context, until)
        # After the check: a refused config must not replace that of the existing run.
        files.write_json(workdir / "config.json", config_lib.to_dict(experiment))
        with closing(context):
            return _run_stages(context, until)


def _run_stages(run: Run, until: str) -> Path | None:
    collect(run)
    if _includes(until, "build"):
        build(run)
    if _includes(until, "train"):
        train(run)
    if _includes(until, "search"):
        search(run)
    return report(run) if _includes(until, "report") else None


def _includes(until: str, stage: str) -> bool:
    return STAGES.index(until) >= STAGES.index(stage)


def check(run: Run, until: str) -> None:
    """Raises UserError for what would stop a stage up to `until`, before any work is spent."""
    run.work.check(stage_inputs(run, until))
    if _includes(until, "train"):
        from jaxprm.training import metrics

        metrics.check_wandb(run.experiment.logging)
        check_objectives(run.experiment)
    if _includes(until, "search"):
        from jaxprm.workflow import search_stage

        search_stage.check(run)


def check_objectives(experiment: config_lib.Experiment) -> None:
    """Raises UserError for an objective that does not exist or cannot be trained. Imports those of the user."""
    for index, model in enumerate(experiment.reward_models):
        try:
            check_settings(model)
        except UserError as error:
            raise UserError(f"reward_models[{index}].{error}") from error


def stage_inputs(run: Run, until: str) -> dict[str, dict[str, Any]]:
    """Recorded inputs of every stage up to `until`, by the stage's name."""
    inputs = {"collect": run.collect_inputs}
    if _includes(until, "build"):
        inputs["build"] = run.build_inputs
    if _includes(until, "train"):
        inputs |= {f"train-{m.label}-{seed}": run.train_inputs(m, seed) for m, seed in run.trained()}
    if _includes(until, "search"):
        from jaxprm.workflow import search_stage

        inputs |= {f"search-{name}": fields for name, fields in search_stage.stage_inputs(run).items()}
    return inputs


def collect(run: Run) -> None:
    """Samples trajectories of the training and validation tasks, or imports the user's own."""
    from jaxprm.policies.rollouts import collect as sample

    settings = run.experiment.collection
    outputs = {split: run.work / f"trajectories/{split}.jsonl" for split in ("train", "validation")}
    limits = {"train": settings.train_tasks, "validation": settings.validation_tasks}
    with run.work.stage("collect", run.collect_inputs, list(outputs.values())) as needed:
        if not needed:
            return
        if settings.files:
            import_user_files(run, outputs)
            return
        for split, output in outputs.items():
            sample(
                run.make_environment,
                run.policy,
                run.tasks(split, limits[split]),
                output,
                count=settings.trajectories_per_task,
                temperature=settings.temperature,
                in_flight=run.experiment.policy.in_flight,
                split=split,
                environment=run.experiment.environment.name,
                seed=run.experiment.seed,
                label=f"collect {split}",
            )


def import_user_files(run: Run, outputs: dict[str, Path]) -> None:
    """Imports the trajectories in `collection.files`, and prints how many of each split were used, unused and bad."""
    settings = run.experiment.collection
    imported = user_files.import_files(
        settings.files,
        outputs,
        validation_share=settings.validation_share,
        seed=run.experiment.seed,
        skip_bad=settings.skip_bad,
    )
    print("trajectories: " + ", ".join(f"{count} {split}" for split, count in sorted(imported.splits.items())))
    if unused := sorted(imported.splits.keys() - outputs.keys()):
        print(f"not used: trajectories of {', '.join(unused)}")
    _print_bad_rows(imported.bad)


def build(run: Run) -> None:
    """Encodes the trajectories with the base model's tokenizer and writes them as shards."""
    from data_pipeline import build as builder
    from data_pipeline.encode import Encoder

    settings, output, bad = run.experiment.data, run.work / "shards", []
    with run.work.stage("build", run.build_inputs, [output]) as needed:
        # Shards appear all at once, together with their metadata: only the record of this stage was lost.
        if not needed or (output / "metadata.json").exists():
            return
        inputs = {split: [run.work / f"trajectories/{split}.jsonl"] for split in ("train", "validation")}
        with absolute("build shards", unit="trajectory") as show:
            builder.build(
                inputs,
                Encoder.load(run.base_directory, **run.experiment.policy.encoding),
                output,
                max_length=settings.length,
                too_long=settings.too_long,
                shards=settings.shards,
                progress=show,
                skip_bad=bad.append if run.experiment.collection.skip_bad else None,
            )
        _print_bad_rows(bad)


def train(run: Run) -> None:
    """Trains every reward model with every seed, on the same shards and from the base model's weights."""
    from jaxprm.training import distributed

    for model, seed in run.trained():
        output = run.model_directory(model.label, seed)
        with run.work.stage(f"train-{model.label}-{seed}", run.train_inputs(model, seed), [output]) as needed:
            if needed:
                least = run.experiment.collection.min_success
                check_outcomes(run.work / "trajectories/train.jsonl", min_success=least)
            # All processes must agree: a training run that only some of them enter never ends.
            if distributed.broadcast_from_primary(needed):
                _train(run, model, seed, output)


def run_secondary_process(run: Run) -> None:
    """The work of every process but 0: takes part in the training runs that process 0 starts."""
    from jaxprm.training import distributed

    for model, seed in run.trained():
        # Also waits until process 0 has the shards. What this process passes is not used.
        if distributed.broadcast_from_primary(False):
            _train(run, model, seed, run.model_directory(model.label, seed))


def _train(run: Run, model: config_lib.RewardModelConfig, seed: int, output: Path) -> None:
    from jaxprm.training.train import train_reward_model

    paths = {"shards": run.work / "shards", "base": run.base_directory, "output": output}
    train_reward_model(run.experiment, model, seed, **paths, profile=run.profile)


def validation_lines(experiment: config_lib.Experiment, workdir: Path) -> list[str]:
    """Validation metrics of the trained reward models, one line each."""
    lines = []
    run = Run(experiment, WorkDirectory(workdir))
    for model, seed in run.trained():
        recipe = files.read_json(run.model_directory(model.label, seed) / "model/reward_model.json")
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in recipe["validation"].items() if value is not None)
        lines.append(f"{model.label}, seed {seed}: {metrics}")
    return lines


def search(run: Run) -> None:
    """Samples pools, scores them, and runs the guided searches on the held-out tasks."""
    from jaxprm.workflow import search_stage

    search_stage.search(run)


def report(run: Run) -> Path:
    """Writes results.json from the files of all stages, and the page that shows it; returns the page's path."""
    from jaxprm.report import build_report
    from jaxprm.workflow.results import write_results

    write_results(run)
    return build_report(run.work.path)


def _print_bad_rows(rows: list) -> None:
    print("".join(f"{line}\n" for line in listed(rows)), end="", file=sys.stderr)
