"""Reward models judged on preference pairs: how often the chosen action of a state gets a higher promise.

    pairwise accuracy = mean over pairs (1 if M+ > M-, 1/2 if they are equal, else 0)
    MRR               = mean over states 1 / rank,    rank = 1 + rejected actions above the chosen one + half the ties

M+ is the promise of the chosen action of a state, M- that of a rejected one. Lines with the same state and the same
chosen action are one state with all of their rejected actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data_pipeline.encode import Reasoning, SpecialTokens
from data_pipeline.errors import DataError
from data_pipeline.preferences import Preference, read_rows
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation.evaluate import weights_sha256
from jaxprm.evaluation.labels import lookup
from jaxprm.evaluation.scored import NO_GROUP
from jaxprm.evaluation.statistics import Array, Measure, Resampling, mean_by_task
from jaxprm.progress import bar
from jaxprm.scoring.engine import bucket_of
from jaxprm.scoring.scorer import Scorer
from jaxprm.scoring.sources import Source, reward_model

FORMAT = 1
SHOWN_ERRORS = 20
METRICS = ("pairwise_accuracy", "mrr")


class State(NamedTuple):
    """A state with its chosen action (first) and the rejected ones, and by model their promises, [actions] each."""

    task: str
    group: str | None
    promises: tuple[Array, ...]


def evaluate_pairs(
    models: Sequence[Path | Source],
    input: Path,
    resampling: Resampling,
    *,
    group: str | None = None,
    chunk: int = 64,
    reasoning: Reasoning | None = None,
    special_tokens: SpecialTokens | None = None,
) -> dict[str, Any]:
    """Scores the actions of every state with every model, one model and `chunk` lines in memory at a time.

    A line that one model cannot score is left out for all. reasoning, special_tokens: as in loading.load_encoder.

    Args:
        models: locations of reward models, or other sources of promises.

    Returns:
        The report of docs/formats.md, "Evaluations", with `pairs`: plain JSON without NaN.

    Raises:
        UserError: a model or the file cannot be read, the file changes meanwhile, no line has the group, or no line
            could be scored.
    """
    sources = [model if isinstance(model, Source) else reward_model(model) for model in models]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"models {', '.join(names)}: one is named twice")
    digest = files.sha256(input)
    errors: dict[str, str] = {}
    preferences: dict[str, Preference] = {}
    for where, row in read_rows(input, skip_bad=lambda error: errors.setdefault(f"line {len(errors)}", str(error))):
        if isinstance(row, Preference):
            preferences[where] = row
        else:
            errors[where] = f"{where}: a trajectory in a file of pairs; put trajectories into a file of their own"
    if files.sha256(input) != digest:
        raise UserError(f"input {input}: changed while it was read; run the same command again")
    if group is not None and preferences and all(_group(row, group) == NO_GROUP for row in preferences.values()):
        raise UserError(f"group {group}: no line has it; name another field, as in environment or meta.domain")
    lines = len(preferences) + len(errors)
    promises: dict[str, list[Array]] = {where: [] for where in preferences}
    for index, source in enumerate(sources):
        scorer = source.load(reasoning=reasoning, special_tokens=special_tokens)
        name = "score" if len(sources) == 1 else f"score {index + 1} of {len(sources)}"
        rows = iter(preferences.items())
        with bar(name, len(preferences), unit="state") as progress:
            while batch := list(itertools.islice(rows, chunk)):
                for where, values in _score(scorer, batch, errors).items():
                    promises[where].append(values)
                progress.update(len(batch))
    scored = {where: row for where, row in preferences.items() if where not in errors}
    if not scored:
        why = f"; {next(iter(errors.values()))}" if errors else ""
        raise UserError(f"input {input}: none of its {lines} lines could be scored{why}")
    states = merged_states([(row, promises[where], _group(row, group)) for where, row in scored.items()])
    report = report_of(states, names, resampling)
    report["input"] = {
        "file": str(input),
        "sha256": digest,
        "lines": lines,
        "errors": len(errors),
        "examples": list(errors.values())[:SHOWN_ERRORS],
    }
    report["models"] = [{"name": source.name, "sha256": weights_sha256(source)} for source in sources]
    return files.without_nan(report)


def _score(scorer: Scorer, batch: Sequence[tuple[str, Preference]], errors: dict[str, str]) -> dict[str, Array]:
    """Promises of the actions of each line, by its place; a line that cannot be encoded is put into `errors`."""
    encoded, owners = [], []
    for where, row in batch:
        try:
            conversations = [
                scorer.encoder.trajectory([*row.state, action], row=where, tools=row.tools) for action in row.actions
            ]
            for conversation in conversations:
                bucket_of(len(conversation.tokens), where)
        except (DataError, UserError) as error:
            errors.setdefault(where, " ".join(str(error).split()))
            continue
        encoded += conversations
        owners += [where] * len(conversations)
    values: dict[str, list[float]] = {}
    for where, of_conversation in zip(owners, scorer.score_encoded(encoded, owners), strict=True):
        if not np.isfinite(of_conversation).all():
            raise UserError("the model's scores are not finite; its weights are broken")
        values.setdefault(where, []).append(float(of_conversation[-1]))
    return {where: np.array(of_line) for where, of_line in values.items()}


def merged_states(rows: Sequence[tuple[Preference, Sequence[Array], str | None]]) -> list[State]:
    """The states of lines with the promises of each model; lines of one state and chosen action are joined."""
    states: dict[bytes, State] = {}
    for row, promises, group in rows:
        key = msgspec.json.encode([row.task_id, row.messages, row.tools, row.actions[0]])
        if key in states:
            joined = (np.append(old, new[1:]) for old, new in zip(states[key].promises, promises, strict=True))
            states[key] = states[key]._replace(promises=tuple(joined))
        else:
            states[key] = State(row.task_id, group, tuple(promises))
    return list(states.values())


def report_of(states: Sequence[State], names: Sequence[str], resampling: Resampling) -> dict[str, Any]:
    """The counts, `pairs`, `groups` and `paired` of the report; intervals are over tasks."""
    report: dict[str, Any] = {
        "format": FORMAT,
        "counts": _counts(states),
        "bootstrap": {"samples": resampling.samples, "seed": resampling.seed},
        "pairs": _part(states, names, resampling),
        "groups": {},
        "paired": [],
    }
    for group in sorted({state.group for state in states if state.group is not None}):
        own = [state for state in states if state.group == group]
        report["groups"][group] = {"counts": _counts(own), "pairs": _part(own, names, resampling)}
    for a, b in itertools.combinations(range(len(names)), 2):
        first, second = measures(states, a), measures(states, b)
        tasks = len({state.task for state in states})
        report["paired"] += [
            {"a": names[a], "b": names[b], "metric": metric}
            | resampling.difference(first[metric], second[metric], tasks)
            for metric in METRICS
        ]
    return report


def _counts(states: Sequence[State]) -> dict[str, int]:
    return {
        "states": len(states),
        "pairs": sum(len(state.promises[0]) - 1 for state in states),
        "tasks": len({state.task for state in states}),
    }


def _part(states: Sequence[State], names: Sequence[str], resampling: Resampling) -> dict[str, Any]:
    """The metrics by model, and those of a random order."""
    tasks = len({state.task for state in states})
    # In a random order every rank is equally likely.
    sizes = [len(state.promises[0]) for state in states]
    chance = {"pairwise_accuracy": 0.5, "mrr": float(np.mean([np.mean(1 / np.arange(1, n + 1)) for n in sizes]))}
    return {
        "models": {name: resampling.estimates(measures(states, index), tasks) for index, name in enumerate(names)},
        "random": chance,
    }


def measures(states: Sequence[State], model: int) -> dict[str, Measure]:
    """The metrics of a model as measures over tasks."""
    names, task = np.unique([state.task for state in states], return_inverse=True)
    ordered, pair_tasks, reciprocal = [], [], []
    for state, number in zip(states, task, strict=True):
        chosen, rejected = state.promises[model][0], state.promises[model][1:]
        ordered += list((rejected < chosen) + 0.5 * (rejected == chosen))
        pair_tasks += [number] * len(rejected)
        reciprocal.append(1 / (1 + np.sum(rejected > chosen) + 0.5 * np.sum(rejected == chosen)))
    return {
        "pairwise_accuracy": Measure(mean_by_task(ordered, np.array(pair_tasks), len(names)), len(names)),
        "mrr": Measure(mean_by_task(reciprocal, task, len(names)), len(names)),
    }


def _group(row: Preference, name: str | None) -> str | None:
    if name is None:
        return None
    value = getattr(row, name) if name in ("environment", "split", "task") else lookup(row.meta, name)
    return NO_GROUP if value is None else str(value)


def pairs_table(report: Mapping[str, Any]) -> str:
    """The report for the terminal, in per cent."""
    counts, source = report["counts"], report["input"]
    lines = [
        f"{source['file']}: {counts['pairs']} pairs in {counts['states']} states of {counts['tasks']} tasks",
        *([f"{source['errors']} of {source['lines']} lines could not be used:"] if source["errors"] else []),
        *(f"  {error}" for error in source["examples"]),
        *_rows(report["pairs"]),
    ]
    for name, part in report["groups"].items():
        lines += ["", f"== {name}: {part['counts']['pairs']} pairs", *_rows(part["pairs"])]
    for pair in report["paired"]:
        lines.append(f"{pair['a']} - {pair['b']}: {pair['metric']} {_cell(pair)}")
    return "\n".join(lines)


def _rows(part: Mapping[str, Any]) -> list[str]:
    rows = [["", "pairwise accuracy", "MRR"]]
    rows += [[name, *(_cell(numbers[metric]) for metric in METRICS)] for name, numbers in part["models"].items()]
    rows.append(["random order", *(f"{100 * part['random'][metric]:.1f}" for metric in METRICS)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(estimate: Mapping[str, Any]) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
