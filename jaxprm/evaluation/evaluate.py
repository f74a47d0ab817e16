"""The `evaluate` verb: reward models compared with outcomes, step labels, or both, on a file of trajectories."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprm import files
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.evaluation import outcome_metrics, step_metrics
from jaxprm.evaluation.labels import OWN_FIELD, kind_of, validation_tasks
from jaxprm.evaluation.scored import ScoredFile, ScoredTrajectory, score_models, steps_of
from jaxprm.evaluation.statistics import Measure, Resampling, paired_difference
from jaxprm.evaluation.value_metrics import calibration
from jaxprm.hf.safetensors import WEIGHTS

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """Which labels the values are compared with, and how thresholds and intervals are computed.

    Raises UserError for a value out of range.
    """

    labels: str = OWN_FIELD  # `step_labels`, or a dotted path into meta
    label_kind: str | None = None  # one of labels.KINDS; default: detected from the values
    validation_share: float = 0.5  # of the labelled tasks: thresholds are chosen on these, and tested on the others
    threshold: float | None = None  # of the promise, instead of a chosen one: every row is a test row
    group: str | None = None  # a field: numbers are repeated for each of its values
    resampling: Resampling = field(default_factory=Resampling)

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UserError(f"validation share {self.validation_share}: must be in (0, 1)")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise UserError(f"threshold {self.threshold}: must be a finite number")
        if self.resampling.samples < 1 or self.resampling.seed < 0:
            raise UserError(
                f"samples {self.resampling.samples} must be 1 or more, seed {self.resampling.seed} not negative"
            )


class EvaluatedModel(NamedTuple):
    """Name and training settings of a reward model that the metrics depend on."""

    name: str
    discount: float

    @property
    def has_progress(self) -> bool:
        """Progress is the difference of neighbouring promises only without a discount between them."""
        return self.discount == 1.0


def evaluate(models: Sequence[Path], input: Path, settings: Settings, *, chunk: int = 256) -> dict[str, Any]:
    """Scores every step of a file and compares the values with outcomes and step labels.

    Args:
        models: model directories, training outputs, checkpoints or Hub ids.
        input: trajectories as JSON Lines.
        chunk: trajectories in memory at a time.

    Returns:
        The report of docs/formats.md, "Evaluations": plain JSON without NaN.

    Raises:
        UserError: a model or the file cannot be read, or there is nothing to compare the values with.
    """
    names = [str(model) for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"models {', '.join(names)}: one is named twice")
    directories = [find_model(model) for model in models]
    recipes = [read_recipe(directory) for directory in directories]
    evaluated = [
        EvaluatedModel(name, recipe.get("targets", {}).get("discount", 1.0))
        for name, recipe in zip(names, recipes, strict=True)
    ]
    scored = score_models(directories, Path(input), labels=settings.labels, group=settings.group, chunk=chunk)
    report = evaluate_scores(scored, evaluated, settings)
    report["input"]["file"] = str(input)
    report["models"] = [
        {"name": name, "sha256": files.sha256(directory / WEIGHTS)}
        for name, directory in zip(names, directories, strict=True)
    ]
    return files.without_nan(report)


def evaluate_scores(scored: ScoredFile, models: Sequence[EvaluatedModel], settings: Settings) -> dict[str, Any]:
    """The report of `evaluate` from promises, without loading a model; numbers that are not defined may be NaN.

    models: in the order of each row's promises.

    Raises UserError if there is nothing to compare the values with, or if thresholds cannot be chosen.
    """
    with_outcome = [row for row in scored.rows if row.outcome is not None]
    labelled = [row for row in scored.rows if row.labels is not None]
    if not with_outcome and not labelled:
        raise UserError(f"no line has an outcome, or labels in {settings.labels}; nothing to compare the values with")
    if not labelled and settings.labels != OWN_FIELD:
        raise UserError(f"labels {settings.labels}: no line has any; name the field that holds them, as in meta.label")
    labels = _StepLabels(labelled, models, settings) if labelled else None
    test = labels.test if labels else []
    report: dict[str, Any] = {
        "format": FORMAT,
        "input": {"sha256": scored.sha256, "lines": scored.lines, "errors": scored.errors, "examples": scored.examples},
        "counts": _counts(scored.rows),
        "bootstrap": {"samples": settings.resampling.samples, "seed": settings.resampling.seed},
        "labels": labels.describe() if labels else None,
        "outcomes": _outcomes(with_outcome, models, settings.resampling, by_depth=True),
        "step_labels": labels.report(test) if labels else None,
        "groups": {},
        "paired": [],
    }
    for name in sorted({row.group for row in scored.rows if row.group is not None}):
        group_rows, group_outcomes, group_test = (
            [row for row in rows if row.group == name] for rows in (scored.rows, with_outcome, test)
        )
        # Groups share the thresholds of the whole file.
        report["groups"][name] = {
            "counts": _counts(group_rows),
            "outcomes": _outcomes(group_outcomes, models, settings.resampling, by_depth=False),
            "step_labels": labels.report(group_test) if labels else None,
        }
    for a, b in itertools.combinations(range(len(models)), 2):
        differences = _outcome_differences(with_outcome, models, a, b, settings.resampling) if with_outcome else []
        differences += labels.differences(a, b) if labels else []
        report["paired"] += [{"a": models[a].name, "b": models[b].name} | difference for difference in differences]
    return report


def _counts(rows: Sequence[ScoredTrajectory]) -> dict[str, int]:
    labels = [row.labels.values for row in rows if row.labels is not None]
    return {
        "trajectories": len(rows),
        "steps": sum(len(row.promises[0]) for row in rows),
        "tasks": len({row.task for row in rows}),
        "with_outcome": sum(row.outcome is not None for row in rows),
        "ended_in_error": sum(row.failed for row in rows),
        "with_labels": len(labels),
        "labelled_steps": sum(int(np.count_nonzero(~np.isnan(values))) for values in labels),
        "null_labels": sum(int(np.count_nonzero(np.isnan(values))) for values in labels),
    }


def _outcomes(
    rows: Sequence[ScoredTrajectory], models: Sequence[EvaluatedModel], resampling: Resampling, *, by_depth: bool
) -> dict[str, Any] | None:
    """The part "outcomes" of the report, or of a group, which has no tables by depth."""
    if not rows:
        return None
    steps = steps_of(rows)
    records = [outcome_metrics.records_of(rows, steps, index, model.discount) for index, model in enumerate(models)]
    # The baselines are fitted on the returns of the first model's discount.
    baselines = outcome_metrics.baselines(rows, steps, records[0])
    part: dict[str, Any] = {
        "baselines": {name: resampling.estimates(measures, steps.count) for name, measures in baselines.items()},
        "models": {},
    }
    for index, (model, own) in enumerate(zip(models, records, strict=True)):
        numbers: dict[str, Any] = {
            "summary": resampling.estimates(outcome_metrics.summary(own, steps.count), steps.count),
            "best_of_n": outcome_metrics.best_of_n(outcome_metrics.choices(rows, index), resampling),
        }
        if by_depth:
            numbers["calibration"] = calibration([own], bins=outcome_metrics.BINS, **resampling.options)
            numbers["by_depth"] = outcome_metrics.by_depth(own, resampling)
            numbers["by_relative_depth"] = outcome_metrics.by_relative_depth(own, steps.length, resampling)
        part["models"][model.name] = numbers
    return part


def _outcome_differences(
    rows: Sequence[ScoredTrajectory], models: Sequence[EvaluatedModel], a: int, b: int, resampling: Resampling
) -> list[dict[str, Any]]:
    """Model a - model b, by task, in every measure of the summary and in best of n by the final promise."""
    steps = steps_of(rows)
    records = [outcome_metrics.records_of(rows, steps, index, models[index].discount) for index in (a, b)]
    first, second = (outcome_metrics.summary(own, steps.count) for own in records)
    differences = [{"metric": name} | resampling.difference(first[name], second[name], steps.count) for name in first]
    first_table, second_table = (outcome_metrics.choices(rows, index) for index in (a, b))
    for n in first_table:
        difference = paired_difference(first_table[n]["final"], second_table[n]["final"], **resampling.options)
        differences.append({"metric": f"best_of_{n}"} | difference)
    return differences


class _StepLabels:
    """Comparison with step labels: the split of the tasks, the thresholds chosen on one part, numbers of the other.

    A criterion of a model is keyed by (index of the model, name); baselines have index 0.
    """

    def __init__(self, rows: Sequence[ScoredTrajectory], models: Sequence[EvaluatedModel], settings: Settings):
        self.models, self.settings = models, settings
        self.kind = kind_of([row.labels for row in rows], settings.labels, settings.label_kind)
        self.validation, self.test = self._split(rows)
        self.thresholds: dict[tuple[int, str], step_metrics.Thresholds] = {}
        if self.kind == "soft":
            return
        if settings.threshold is not None:
            for index in range(len(models)):
                self.thresholds[index, "promise"] = step_metrics.fixed_thresholds(settings.threshold)
            # The constant baseline has the value 0, so a threshold of 0 makes it accept every step.
            self.thresholds[0, "constant"] = step_metrics.fixed_thresholds(0.0)
            return
        steps = step_metrics.labelled_steps(self.validation, self.kind)
        for index, criterion in self._criteria():
            self.thresholds[index, criterion] = step_metrics.choose_thresholds(steps, self.kind, criterion, index)

    def _criteria(self) -> list[tuple[int, str]]:
        criteria = [(0, name) for name in step_metrics.BASELINES]
        for index, model in enumerate(self.models):
            criteria += [
                (index, name) for name in step_metrics.MODEL_CRITERIA if name == "promise" or model.has_progress
            ]
        return criteria

    def _split(self, rows: Sequence[ScoredTrajectory]) -> tuple[list[ScoredTrajectory], list[ScoredTrajectory]]:
        """(validation, test) trajectories, of disjoint tasks."""
        settings = self.settings
        if self.kind == "soft" or settings.threshold is not None:
            return [], list(rows)
        names = {row.task for row in rows}
        if len(names) < 2:
            raise UserError(
                f"labels {settings.labels}: all on one task, but thresholds are chosen and tested on different tasks; "
                "label trajectories of several tasks, or give --threshold"
            )
        chosen = validation_tasks(names, settings.validation_share, settings.resampling.seed)
        return [row for row in rows if row.task in chosen], [row for row in rows if row.task not in chosen]

    def describe(self) -> dict[str, Any]:
        """The part "labels" of the report."""
        parts = {"validation": self.validation, "test": self.test}
        return {
            "field": self.settings.labels,
            "kind": self.kind,
            "threshold": self.settings.threshold,
            "validation_share": self.settings.validation_share if self.validation else None,
            "parts": {name: _counts(rows) for name, rows in parts.items()},
        }

    def report(self, rows: Sequence[ScoredTrajectory]) -> dict[str, Any] | None:
        """{"baselines": {criterion: ...}, "models": {name: {criterion: ...}}} on trajectories of the test part."""
        if not rows:
            return None
        measures, tasks = self._measures(rows)
        part: dict[str, Any] = {"baselines": {}, "models": {model.name: {} for model in self.models}}
        for (index, criterion), by_metric in measures.items():
            numbers = {
                "thresholds": dict(self.thresholds.get((index, criterion), {})),
                "metrics": self.settings.resampling.estimates(by_metric, tasks),
            }
            if criterion in step_metrics.BASELINES:
                part["baselines"][criterion] = numbers
            else:
                part["models"][self.models[index].name][criterion] = numbers
        return part

    def differences(self, a: int, b: int) -> list[dict[str, Any]]:
        """Model a - model b, by task, in every metric that both have."""
        measures, tasks = self._measures(self.test)
        differences = []
        for criterion in step_metrics.MODEL_CRITERIA:
            first, second = (measures.get((index, criterion), {}) for index in (a, b))
            for metric in first.keys() & second.keys():
                difference = self.settings.resampling.difference(first[metric], second[metric], tasks)
                differences.append({"metric": f"{criterion} {metric}"} | difference)
        return sorted(differences, key=lambda row: row["metric"])

    def _measures(self, rows: Sequence[ScoredTrajectory]) -> tuple[dict[tuple[int, str], dict[str, Measure]], int]:
        """The measures of each criterion, and the number of tasks."""
        steps = step_metrics.labelled_steps(rows, self.kind)
        if self.kind != "soft":
            measures = {
                (index, name): step_metrics.threshold_measures(steps, self.kind, name, thresholds, index)
                for (index, name), thresholds in self.thresholds.items()
            }
            return measures, steps.tasks
        constant = np.full(len(steps.labels), steps.labels.mean())
        measures = {
            (index, name): step_metrics.soft_measures(
                steps, constant if name == "constant" else steps.values(name, index)
            )
            for index, name in self._criteria()
        }
        # Promises and labels are on one scale; progress and step numbers are on another.
        for (_, name), by_metric in measures.items():
            if name in ("progress", "depth"):
                by_metric.pop("mse", None)
        return measures, steps.tasks
