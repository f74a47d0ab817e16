"""The `evaluate` verb: reward models compared with outcomes, step labels, or both, on a file of trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.encode import Reasoning, SpecialTokens
from jaxprm import files
from jaxprm.config import fingerprint
from jaxprm.errors import UserError
from jaxprm.evaluation import outcome_metrics, step_metrics
from jaxprm.evaluation.labels import OWN_FIELD, kind_of, validation_tasks
from jaxprm.evaluation.scored import NO_GROUP, ScoredFile, ScoredTrajectory, score_models, steps_of
from jaxprm.evaluation.statistics import Measure, Resampling, paired_difference
from jaxprm.evaluation.value_metrics import StepRecords, calibration
from jaxprm.hf.safetensors import WEIGHTS
from jaxprm.scoring.sources import Source, reward_model

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
    reasoning: Reasoning | None = None  # as in loading.load_encoder
    special_tokens: SpecialTokens | None = None

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
    """Name and training settings of a reward model that the metrics depend on.

    Args:
        is_expectation: whether its values are expected outcomes. Of a log-ratio, and of a model of pairs, only the
            order has a meaning.
        start: the value before the first step, from which its progress is counted; -inf if a first step has none.
    """

    name: str
    discount: float
    is_expectation: bool = True
    start: float = -math.inf

    @property
    def has_progress(self) -> bool:
        """Progress is the difference of neighbouring promises only without a discount between them."""
        return self.discount == 1.0


def evaluate(models: Sequence[Path | Source], input: Path, settings: Settings, *, chunk: int = 256) -> dict[str, Any]:
    """Scores every step of a file and compares the values with outcomes and step labels.

    Args:
        models: model directories, training outputs, checkpoints or Hub ids, or other sources of scores.
        input: trajectories as JSON Lines.
        chunk: trajectories in memory at a time.

    Returns:
        The report of docs/formats.md, "Evaluations": plain JSON without NaN.

    Raises:
        UserError: a model or the file cannot be read, there is nothing to compare the values with, or labels, groups
            or thresholds do not fit the file. What does not depend on scores is checked before a model is loaded.
    """
    sources = [model if isinstance(model, Source) else reward_model(model) for model in models]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"models {', '.join(names)}: one is named twice")
    evaluated = [
        EvaluatedModel(source.name, source.discount, source.is_expectation, source.start) for source in sources
    ]
    scored = score_models(
        sources,
        Path(input),
        labels=settings.labels,
        group=settings.group,
        chunk=chunk,
        check=lambda rows: check_settings(rows, settings),
        encoding={"reasoning": settings.reasoning, "special_tokens": settings.special_tokens},
    )
    report = evaluate_scores(scored, evaluated, settings)
    report["input"]["file"] = str(input)
    report["models"] = [
        {"name": source.name, "sha256": weights_sha256(source)}
        | {"trained_length": of_file.trained, "longer": of_file.longer, "longest": of_file.longest}
        for source, of_file in zip(sources, scored.lengths, strict=True)
    ]
    return files.without_nan(report)


def weights_sha256(source: Source) -> str:
    """sha256 of a model's only file of weights; of all its files' digests if there are more."""
    weights = source.directory and source.directory / WEIGHTS
    return files.sha256(weights) if weights and weights.is_file() else fingerprint(source.identity)


def check_settings(rows: Sequence[ScoredTrajectory], settings: Settings) -> None:
    """Raises UserError if there is nothing to compare values with, or labels, group or thresholds do not fit the rows.

    It needs no promises.
    """
    labelled = [row for row in rows if row.labels is not None]
    if not labelled and all(row.outcome is None for row in rows):
        raise UserError(f"no line has an outcome, or labels in {settings.labels}; nothing to compare the values with")
    if not labelled and settings.labels != OWN_FIELD:
        raise UserError(f"labels {settings.labels}: no line has any; name the field that holds them, as in meta.label")
    if settings.group is not None and all(row.group == NO_GROUP for row in rows):
        raise UserError(f"group {settings.group}: no line has it; name another field, as in environment or meta.domain")
    if labelled:
        kind = kind_of([row.labels for row in labelled], settings.labels, settings.label_kind)
        _check_tasks({row.task for row in labelled}, kind, settings)


def _check_tasks(tasks: Collection[str], kind: str, settings: Settings) -> None:
    """Raises UserError if thresholds have to be chosen, and all labels are on one task."""
    if kind != "soft" and settings.threshold is None and len(tasks) < 2:
        raise UserError(
            f"labels {settings.labels}: all on one task, but thresholds are chosen and tested on different tasks; "
            "label trajectories of several tasks, or give --threshold"
        )


def evaluate_scores(scored: ScoredFile, models: Sequence[EvaluatedModel], settings: Settings) -> dict[str, Any]:
    """The report of `evaluate` from promises, without loading a model; numbers that are not defined may be NaN.

    models: in the order of each row's promises.

    Raises UserError if there is nothing to compare the values with, or if thresholds cannot be chosen.
    """
    # Again: lines that could not be scored may have been the only ones with labels.
    check_settings(scored.rows, settings)
    with_outcome = [row for row in scored.rows if row.outcome is not None]
    labelled = [row for row in scored.rows if row.labels is not None]
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
            "summary": resampling.estimates(_summary(model, own, steps.count), steps.count),
            "best_of_n": outcome_metrics.best_of_n(outcome_metrics.choices(rows, index), resampling),
        }
        if by_depth:
            bins = outcome_metrics.BINS
            numbers["calibration"] = calibration([own], bins=bins, **resampling.options) if model.is_expectation else []
            numbers["by_depth"] = outcome_metrics.by_depth(own, resampling)
            if not model.is_expectation:
                for row in numbers["by_depth"]:
                    del row["calibration"], row["calibration_error"]
            numbers["by_relative_depth"] = outcome_metrics.by_relative_depth(own, steps.length, resampling)
        part["models"][model.name] = numbers
    return part


def _summary(model: EvaluatedModel, records: StepRecords, tasks: int) -> dict[str, Measure]:
    """`outcome_metrics.summary`; of values that are no expected outcomes, only what depends on their order."""
    measures = outcome_metrics.summary(records, tasks)
    ranked = ("auroc", "auroc_within_task")
    return {name: measure for name, measure in measures.items() if model.is_expectation or name in ranked}


def _outcome_differences(
    rows: Sequence[ScoredTrajectory], models: Sequence[EvaluatedModel], a: int, b: int, resampling: Resampling
) -> list[dict[str, Any]]:
    """Model a - model b, by task, in every measure of the summary and in best of n by the final promise."""
    steps = steps_of(rows)
    records = [outcome_metrics.records_of(rows, steps, index, models[index].discount) for index in (a, b)]
    first, second = (_summary(models[index], own, steps.count) for index, own in zip((a, b), records, strict=True))
    differences = [
        {"metric": name} | resampling.difference(first[name], second[name], steps.count)
        for name in first
        if name in second
    ]
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
        steps = self._labelled_steps(self.validation)
        for index, criterion in self._criteria():
            self.thresholds[index, criterion] = step_metrics.choose_thresholds(steps, self.kind, criterion, index)

    def _labelled_steps(self, rows: Sequence[ScoredTrajectory]) -> step_metrics.LabelledSteps:
        return step_metrics.labelled_steps(rows, self.kind, [model.start for model in self.models])

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
        steps = self._labelled_steps(rows)
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
        for index, model in enumerate(self.models):
            if not model.is_expectation:
                measures[index, "promise"].pop("mse", None)
        return measures, steps.tasks
