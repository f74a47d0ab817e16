"""Compares reward models of TextCraft that learn from outcomes, from step labels of the planner, and from both.

    python -m benchmarks.labels --workdir runs/labels --json labels.json

The shipped policy plays the tasks once, and all models train on these trajectories. A step is labelled 1 if the plan
after it is one action shorter than the plan before it, or if it ends the episode with success, and 0 if not. Models are
judged on trajectories of held-out tasks: do promises tell right from wrong steps, and steps of successful from steps of
failed episodes? Intervals are over tasks and seeds. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data_pipeline import trajectory as trajectories
from data_pipeline.trajectory import Trajectory
from jaxprm import config as config_lib
from jaxprm import environments
from jaxprm.config import CollectionConfig, DataConfig, EnvironmentConfig, Experiment, LabelsConfig, RewardModelConfig
from jaxprm.environments.textcraft.environment import TextCraft
from jaxprm.environments.textcraft.planner import plan
from jaxprm.evaluation.scored import ScoredTrajectory, score_models, steps_of
from jaxprm.evaluation.statistics import Measure, bootstrap_statistic, task_pairs, within_task_auroc
from jaxprm.files import write_atomic
from jaxprm.host_memory import keep_freed
from jaxprm.policies import loading
from jaxprm.policies.rollouts import collect
from jaxprm.workflow.run import run

TEXTCRAFT = {"distractors": 4, "max_rounds": 12}
POLICY = config_lib.PolicyConfig(path="default", in_flight=64, max_action_tokens=64, max_tokens=896)
# One head and one kind of loss, so that only the targets differ.
SQUARED = LabelsConfig(loss="mse")
MODELS = {
    "outcomes": {"objective": "pvm", "beta": 0.0},
    "labels": {"objective": "step_labels", "beta": 0.0, "labels": SQUARED},
    "both": {"objective": "pvm", "beta": 0.0, "labels": msgspec.structs.replace(SQUARED, weight=0.5)},
}
PAIRS = (("labels", "outcomes"), ("both", "outcomes"), ("both", "labels"))


def step_labels(environment: TextCraft, trajectory: Trajectory) -> list[float]:
    """1.0 for each action that keeps the planner's shortest plan, 0.0 for the others: the episode is played again.

    Raises ValueError if the environment answers otherwise than in the trajectory.
    """
    environment.reset(trajectory.task_id)
    labels: list[float] = []
    for step in trajectories.steps(trajectory.messages):
        before = _turns(environment)
        result = environment.step(str(trajectory.messages[step.message].content))
        after = trajectory.messages[step.message + 1 : step.message + 2]
        if after and after[0].content != result.observation:
            raise ValueError(f"{trajectory.id}: another observation after message {step.message}")
        labels.append(float(result.reward > 0 or _turns(environment) < before))
    return labels


def _turns(environment: TextCraft) -> int:
    """Actions of the planner from here to the goal."""
    episode = environment.episode
    return plan(episode.goal, environment.inventory, episode.recipes).turns


def sample(workdir: Path, split: str, tasks: int, attempts: int) -> Path:
    """The labelled trajectories of a split, LABELLED/<split>.jsonl."""
    output = workdir / "labelled" / f"{split}.jsonl"
    if output.exists():
        return output
    make = lambda: environments.create("textcraft", TEXTCRAFT)
    names = make().tasks(split)
    names = [names[index * len(names) // tasks] for index in range(tasks)]
    sampled = collect(
        make,
        loading.load(Experiment(name="labels", policy=POLICY)),
        names,
        workdir / "sampled" / f"{split}.jsonl",
        count=attempts,
        temperature=1.0,
        in_flight=POLICY.in_flight,
        split=split,
        environment="textcraft",
        seed=0,
        label=f"collect {split}",
    )
    environment, lines = make(), []
    for row in trajectories.read(sampled):
        if row.ended == "error":
            continue
        labelled = msgspec.structs.replace(row, step_labels=step_labels(environment, row))
        lines.append(trajectories.to_line(labelled) + "\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, "".join(lines))
    return output


def experiment_of(files: Mapping[str, Path], seeds: Sequence[int], *, epochs: int, rows: int = 8) -> Experiment:
    """The experiment that trains all models with all seeds on the labelled files of train and validation."""
    return Experiment(
        name="labels",
        environment=EnvironmentConfig(name="textcraft", arguments=TEXTCRAFT),
        policy=POLICY,
        collection=CollectionConfig(files=tuple(f"{split}={files[split]}" for split in ("train", "validation"))),
        data=DataConfig(rows=rows, length=512, steps_per_row=32),
        reward_models=tuple(
            RewardModelConfig(label=label, epochs=epochs, evaluate_every=80, **fields)
            for label, fields in MODELS.items()
        ),
        reward_seeds=tuple(seeds),
    )


def judge(rows: Sequence[ScoredTrajectory], seeds: int, *, samples: int = 2000) -> dict[str, Any]:
    """AUROC of each model against labels and outcomes, and paired differences; models are in the order of MODELS.

    rows: with the promises of all seeds of the first model, then of the second, and so on.
    """
    steps = steps_of(rows)
    right = np.concatenate([row.labels.values for row in rows]) > 0.5
    success = np.array([row.outcome > 0.5 for row in rows])[steps.row]
    report: dict[str, Any] = {"models": {label: {} for label in MODELS}, "paired": []}
    for metric, positive in (("labels", right), ("outcomes", success)):
        measures: dict[str, dict[str, list[Callable]]] = {"auroc": {}, "auroc_within_task": {}}
        for index, label in enumerate(MODELS):
            promises = [np.concatenate([row.promises[index * seeds + seed] for row in rows]) for seed in range(seeds)]
            pairs = [task_pairs(values, positive, steps.task, steps.count) for values in promises]
            measures["auroc"][label] = [of_seed.auroc for of_seed in pairs]
            within: list[Measure] = [within_task_auroc([of_seed], steps.count) for of_seed in pairs]
            measures["auroc_within_task"][label] = [measure.statistic for measure in within]
        for name, by_label in measures.items():
            key, options = f"{metric} {name}", {"samples": samples}
            for label, statistics in by_label.items():
                report["models"][label][key] = bootstrap_statistic(statistics, steps.count, **options)
            for a, b in PAIRS:
                differences = [_difference(x, y) for x, y in zip(by_label[a], by_label[b], strict=True)]
                estimate = bootstrap_statistic(differences, steps.count, **options)
                report["paired"].append({"a": a, "b": b, "metric": key, **estimate})
    return report | {
        "tasks": steps.count,
        "trajectories": len(rows),
        "steps": len(right),
        "right": float(right.mean()),
        "success": float(np.mean([row.outcome for row in rows])),
    }


def _difference(a: Callable, b: Callable) -> Callable:
    return lambda counts: a(counts) - b(counts)


def compare(workdir: Path, *, tasks: Mapping[str, int], attempts: int, seeds: Sequence[int], epochs: int) -> dict:
    """Samples, labels, trains and judges; what exists in the work directory is not done again."""
    files = {split: sample(workdir, split, count, attempts) for split, count in tasks.items()}
    experiment = experiment_of(files, seeds, epochs=epochs)
    run(experiment, workdir / "run", until="train")
    models = [workdir / f"run/reward_models/{label}/seed-{seed}" for label in MODELS for seed in seeds]
    scored = score_models(models, files["test"], labels="step_labels")
    training = list(trajectories.read(files["train"]))
    labels = [label for row in training for label in row.step_labels or ()]
    report = judge(scored.rows, len(seeds))
    return report | {
        "seeds": list(seeds),
        "epochs": epochs,
        "trained_on": {
            "tasks": tasks["train"],
            "trajectories": len(training),
            "steps": len(labels),
            "right": float(np.mean(labels)),
            "success": float(np.mean([row.outcome for row in training])),
        },
    }


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    trained = report["trained_on"]
    lines = [
        f"trained on {trained['trajectories']} trajectories of {trained['tasks']} tasks: {trained['steps']} steps, "
        f"{trained['right']:.0%} labelled right, {trained['success']:.0%} of the trajectories succeed",
        f"judged on {report['trajectories']} trajectories of {report['tasks']} held-out tasks: {report['steps']} "
        f"steps, {report['right']:.0%} right, {report['success']:.0%} succeed",
    ]
    cell = lambda r: f"{100 * r['mean']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
    for label, numbers in report["models"].items():
        lines += [f"{label:9} {key:26} {cell(estimate)}" for key, estimate in numbers.items()]
    lines += [f"{pair['a']} - {pair['b']}: {pair['metric']} {cell(pair)}" for pair in report["paired"]]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=64, help="tasks for training (default: 64)")
    parser.add_argument("--held-out", type=int, default=48, help="tasks that models are judged on (default: 48)")
    parser.add_argument("--attempts", type=int, default=8, help="trajectories of each task (default: 8)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    keep_freed()
    report = compare(
        options.workdir,
        tasks={"train": options.tasks, "validation": max(2, options.tasks // 4), "test": options.held_out},
        attempts=options.attempts,
        seeds=range(options.seeds),
        epochs=options.epochs,
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines_of(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
