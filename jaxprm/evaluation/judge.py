"""The `evaluate` verb: reward models judged on trajectories with outcomes, step labels, or both."""

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
from jaxprm.evaluation import judge_metrics
from jaxprm.evaluation.labels import OWN_FIELD, kind_of, validation_tasks
from jaxprm.evaluation.scored import ScoredFile, ScoredTrajectory, score_models, steps_of
from jaxprm.evaluation.statistics import Measure, Resampling, paired_difference
from jaxprm.evaluation.value_metrics import calibration
from jaxprm.hf.safetensors import WEIGHTS

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What is compared with what, and how thresholds and intervals are made."""

    labels: str = OWN_FIELD  # `step_labels`, or a dotted path into meta
    label_kind: str | None = None  # one of labels.KINDS; found by the values if not given
    validation_share: float = 0.5  # of the labelled tasks: thresholds are chosen on these, and tested on the others
    threshold: float | None = None  # of the promise, in place of a chosen one: every row is a test row
    group: str | None = None  # numbers for each value of this field too
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


class JudgedModel(NamedTuple):
    """What is known of a reward model before it has scored."""

    name: str
    discount: float

    @property
    def has_progress(self) -> bool:
        return self.discount == 1.0


def evaluate(models: Sequence[Path], input: Path, settings: Settings, *, chunk: int = 256) -> dict[str, Any]:
    """Scores every step of a file and compares the values with outcomes and step labels.

    Returns what docs/formats.md describes, plain JSON without NaN.

    Raises UserError for a model or a file that cannot be read, and where there is nothing to compare with.
    """
    names = [str(model) for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"models {', '.join(names)}: one is named twice")
    found = [find_model(model) for model in models]
    recipes = [read_recipe(model) for model in found]
    known = [
        JudgedModel(name, recipe.get("targets", {}).get("discount", 1.0))
        for name, recipe in zip(names, recipes, strict=True)
    ]
    scored = score_models(found, Path(input), labels=settings.labels, group=settings.group, chunk=chunk)
    report = judge(scored, known, settings)
    report["input"]["file"] = str(input)
    report["models"] = [
        {"name": name, "sha256": files.sha256(model / WEIGHTS)} for name, model in zip(names, found, strict=True)
    ]
    return files.without_nan(report)


def judge(scored: ScoredFile, models: Sequence[JudgedModel], settings: Settings) -> dict[str, Any]:
    """`evaluate` without the models: from promises to the report."""
    outcomes = [row for row in scored.rows if row.outcome is not None]
    labelled = [row for row in scored.rows if row.labels is not None]
    if not outcomes and not labelled:
        raise UserError(f"no line has an outcome, or labels in {settings.labels}; nothing to compare the values with")
    if not labelled and settings.labels != OWN_FIELD:
        raise UserError(f"labels {settings.labels}: no line has any; name the field that holds them, as in meta.label")
    labels = _Labels(labelled, models, settings) if labelled else None
    test = labels.test if labels else []
    report: dict[str, Any] = {
        "format": FORMAT,
        "input": {"sha256": scored.sha256, "lines": scored.lines, "errors": scored.errors, "examples": scored.examples},
        "counts": _counts(scored.rows),
        "bootstrap": {"samples": settings.resampling.samples, "seed": settings.resampling.seed},
        "labels": labels.described if labels else None,
        "outcomes": _outcomes(outcomes, models, settings.resampling, by_depth=True),
        "step_labels": labels.judged(test) if labels else None,
        "groups": {},
        "paired": [],
    }
    for name in sorted({row.group for row in scored.rows if row.group is not None}):
        rows, with_outcome, tested = (
            [row for row in some if row.group == name] for some in (scored.rows, outcomes, test)
        )
        report["groups"][name] = {
            "counts": _counts(rows),
            "outcomes": _outcomes(with_outcome, models, settings.resampling, by_depth=False),
            "step_labels": labels.judged(tested) if labels else None,
        }
    for a, b in itertools.combinations(range(len(models)), 2):
        differences = _outcome_differences(outcomes, models, a, b, settings.resampling) if outcomes else []
        differences += labels.differences(a, b) if labels else []
        report["paired"] += [{"a": models[a].name, "b": models[b].name} | one for one in differences]
    return report


def _counts(rows: Sequence[ScoredTrajectory]) -> dict[str, int]:
    labelled = [row.labels.values for row in rows if row.labels is not None]
    return {
        "trajectories": len(rows),
        "steps": sum(len(row.promises[0]) for row in rows),
        "tasks": len({row.task for row in rows}),
        "with_outcome": sum(row.outcome is not None for row in rows),
        "ended_in_error": sum(row.failed for row in rows),
        "with_labels": len(labelled),
        "labelled_steps": sum(int(np.count_nonzero(~np.isnan(one))) for one in labelled),
        "null_labels": sum(int(np.count_nonzero(np.isnan(one))) for one in labelled),
    }


def _outcomes(
    rows: Sequence[ScoredTrajectory], models: Sequence[JudgedModel], resampling: Resampling, *, by_depth: bool
) -> Any:
    if not rows:
        return None
    steps = steps_of(rows)
    records = [judge_metrics.records_of(rows, steps, place, model.discount) for place, model in enumerate(models)]
    reading_nothing = judge_metrics.baselines(rows, steps, records[0])
    found: dict[str, Any] = {
        "baselines": {name: resampling.estimates(one, steps.count) for name, one in reading_nothing.items()},
        "models": {},
    }
    for place, (model, own) in enumerate(zip(models, records, strict=True)):
        one: dict[str, Any] = {
            "summary": resampling.estimates(judge_metrics.summary(own, steps.count), steps.count),
            "best_of_n": judge_metrics.best_of_n(judge_metrics.choices(rows, place), resampling),
        }
        if by_depth:
            options = {"samples": resampling.samples, "seed": resampling.seed}
            one["calibration"] = calibration([own], bins=judge_metrics.BINS, **options)
            one["by_depth"] = judge_metrics.by_depth(own, resampling)
            one["by_relative_depth"] = judge_metrics.by_relative_depth(own, steps.length, resampling)
        found["models"][model.name] = one
    return found


def _outcome_differences(
    rows: Sequence[ScoredTrajectory], models: Sequence[JudgedModel], a: int, b: int, resampling: Resampling
) -> list[dict[str, Any]]:
    steps = steps_of(rows)
    both = [
        judge_metrics.summary(judge_metrics.records_of(rows, steps, place, models[place].discount), steps.count)
        for place in (a, b)
    ]
    found = [{"metric": name} | resampling.difference(both[0][name], both[1][name], steps.count) for name in both[0]]
    tables = [judge_metrics.choices(rows, place) for place in (a, b)]
    options = {"samples": resampling.samples, "seed": resampling.seed}
    for n in tables[0]:
        difference = paired_difference(tables[0][n]["final"], tables[1][n]["final"], **options)
        found.append({"metric": f"best_of_{n}"} | difference)
    return found


class _Labels:
    """Step labels: the split of the tasks, the thresholds it gave, and the numbers of any rows of the test part."""

    def __init__(self, rows: Sequence[ScoredTrajectory], models: Sequence[JudgedModel], settings: Settings):
        self.models, self.settings = models, settings
        self.kind = kind_of([row.labels for row in rows], settings.labels, settings.label_kind)
        self.validation, self.test = self._split(rows)
        self.thresholds: dict[tuple[int, str], judge_metrics.Thresholds] = {}
        if self.kind == "soft":
            return
        if settings.threshold is not None:
            for place in range(len(models)):
                self.thresholds[place, "promise"] = judge_metrics.fixed(settings.threshold)
            # Whatever is not negative is accepted.
            self.thresholds[0, "constant"] = judge_metrics.fixed(0.0)
            return
        some = judge_metrics.labelled_steps(self.validation, self.kind)
        for place, criterion in self._criteria():
            self.thresholds[place, criterion] = judge_metrics.choose(some, self.kind, criterion, place)

    def _criteria(self) -> list[tuple[int, str]]:
        found = [(0, name) for name in judge_metrics.BASELINES]
        for place, model in enumerate(self.models):
            found += [(place, name) for name in judge_metrics.MODEL_CRITERIA if name == "promise" or model.has_progress]
        return found

    def _split(self, rows: Sequence[ScoredTrajectory]) -> tuple[list[ScoredTrajectory], list[ScoredTrajectory]]:
        settings = self.settings
        if self.kind == "soft" or settings.threshold is not None:
            return [], list(rows)
        names = {row.task for row in rows}
        if len(names) < 2:
            raise UserError(
                f"labels {settings.labels}: all on one task, and thresholds are chosen on other tasks than they are "
                "tested on; label trajectories of several tasks, or give --threshold"
            )
        chosen = validation_tasks(names, settings.validation_share, settings.resampling.seed)
        return [row for row in rows if row.task in chosen], [row for row in rows if row.task not in chosen]

    @property
    def described(self) -> dict[str, Any]:
        parts = {"validation": self.validation, "test": self.test}
        return {
            "field": self.settings.labels,
            "kind": self.kind,
            "threshold": self.settings.threshold,
            "validation_share": self.settings.validation_share if self.validation else None,
            "parts": {name: _counts(rows) for name, rows in parts.items()},
        }

    def measured(self, rows: Sequence[ScoredTrajectory]) -> tuple[dict[tuple[int, str], dict[str, Measure]], int]:
        """The measures of each model (by its place) and criterion, and the number of tasks."""
        some = judge_metrics.labelled_steps(rows, self.kind)
        if self.kind == "soft":
            constant = np.full(len(some.labels), some.labels.mean())
            found = {
                (place, name): judge_metrics.soft_measures(
                    some, constant if name == "constant" else some.values(name, place)
                )
                for place, name in self._criteria()
            }
            # Promises and labels are on one scale; progress and step numbers are on another.
            for key, one in found.items():
                if key[1] in ("progress", "depth"):
                    one.pop("mse", None)
        else:
            found = {
                (place, name): judge_metrics.measures(some, self.kind, name, thresholds, place)
                for (place, name), thresholds in self.thresholds.items()
            }
        return found, some.tasks

    def judged(self, rows: Sequence[ScoredTrajectory]) -> dict[str, Any] | None:
        """{"baselines": {criterion: ...}, "models": {name: {criterion: ...}}} of some rows of the test part."""
        if not rows:
            return None
        measured, tasks = self.measured(rows)
        found: dict[str, Any] = {"baselines": {}, "models": {model.name: {} for model in self.models}}
        for (place, criterion), one in measured.items():
            described = {
                "thresholds": dict(self.thresholds.get((place, criterion), {})),
                "metrics": self.settings.resampling.estimates(one, tasks),
            }
            if criterion in judge_metrics.BASELINES:
                found["baselines"][criterion] = described
            else:
                found["models"][self.models[place].name][criterion] = described
        return found

    def differences(self, a: int, b: int) -> list[dict[str, Any]]:
        measured, tasks = self.measured(self.test)
        found = []
        for criterion in judge_metrics.MODEL_CRITERIA:
            one, other = (measured.get((place, criterion), {}) for place in (a, b))
            for metric in one.keys() & other.keys():
                difference = self.settings.resampling.difference(one[metric], other[metric], tasks)
                found.append({"metric": f"{criterion} {metric}"} | difference)
        return sorted(found, key=lambda row: row["metric"])
