"""Steps of mathematical solutions with labels: ProcessBench, PRM800K and Math-Shepherd.

A solution is one assistant message whose parts are the steps. Labels are those of the data, and null
where they say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_pipeline.conversations.kinds import kind_of
from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, full_list, note, step_parts

_MARK = "\u043a\u0438"  # Math-Shepherd's end of a step, a Cyrillic word.
_FIRST_STEP = re.compile(r"\s*Step 1\s*:")


def processbench_matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has a problem, its steps and the first error."""
    is_row = isinstance(row.get("problem"), str) and isinstance(row.get("steps"), list)
    return "`problem`, `steps` and `label`" if is_row and _is_int(row.get("label")) else None


def processbench(row: dict[str, Any], context: Context) -> list[Parsed]:
    """`label` is the first wrong step, -1 for none; it is also kept in meta, as the first error."""
    texts = _texts(full_list(row.get("steps"), "steps"), "steps")
    first = row.get("label")
    if not _is_int(first) or not -1 <= first < len(texts):
        raise DataError(f"label is {first!r:.40}; the first wrong step is in [0, {len(texts) - 1}], or -1 for none")
    labels: list[float | None] = [1.0] * len(texts)
    if first >= 0:
        # Nobody says whether the steps after the first error are right.
        labels[first:] = [0.0, *[None] * (len(texts) - first - 1)]
    return [_solution(row.get("problem"), texts, labels, context, {"problem", "steps"})]


def prm800k_matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has a question and rated completions of each step."""
    question, label = row.get("question"), row.get("label")
    is_row = isinstance(question, dict) and isinstance(label, dict) and isinstance(label.get("steps"), list)
    return "`question.problem` and `label.steps`" if is_row else None


def prm800k(row: dict[str, Any], context: Context) -> list[Parsed]:
    """The chosen completion of each step; every other completion that was rated is a trajectory that ends with it.

    Ratings are the labels 1, 0 and -1. In the trajectories of other completions the steps before are not labelled
    again.
    """
    problem, given = row["question"].get("problem"), full_list(row["label"].get("steps"), "label.steps")
    texts: list[str] = []
    labels: list[float | None] = []
    others: list[Parsed] = []
    for index, step in enumerate(given):
        completions = step.get("completions") if isinstance(step, dict) else None
        options = [option for option in completions or () if isinstance(option, dict)]
        human = step.get("human_completion") if isinstance(step, dict) else None
        chosen = step.get("chosen_completion") if isinstance(step, dict) else None
        for number, option in enumerate(options):
            if number != chosen and _rating(option) is not None:
                path = [*texts, *_texts([option.get("text")], f"label.steps[{index}]")]
                unlabelled: list[float | None] = [None] * len(texts)
                others.append(_solution(problem, path, [*unlabelled, _rating(option)], context, {"question", "label"}))
        if _is_int(chosen) and 0 <= chosen < len(options):
            texts += _texts([options[chosen].get("text")], f"label.steps[{index}]")
            labels.append(_rating(options[chosen]))
        elif isinstance(human, (dict, str)):
            texts += _texts([human if isinstance(human, str) else human.get("text")], f"label.steps[{index}]")
            labels.append(None if isinstance(human, str) else _rating(human))
        else:
            break  # Nothing was chosen: the solution ends with the completions that were rated here.
    if others:
        note(context.notes, "rated completions that were not chosen, each a trajectory of its own", len(others))
    main = [_solution(problem, texts, labels, context, {"question", "label"})] if texts else []
    if not main and not others:
        raise DataError("label.steps has no completion with a rating")
    meta = {"question": row["question"], "finish_reason": row["label"].get("finish_reason")}
    return [parsed._replace(meta=meta) for parsed in (*main, *others)]


def shepherd_matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has a solution with marks at the end of steps."""
    both = isinstance(row.get("input"), str) and isinstance(row.get("label"), str)
    return "`input` with marks at the ends of steps, and `label`" if both and _MARK in row["input"] else None


def shepherd(row: dict[str, Any], context: Context) -> list[Parsed]:
    """`input` is the problem and steps that end with a mark; `label` is the same text with + or - for the marks."""
    text, labelled = row.get("input"), row.get("label")
    if not isinstance(text, str) or not isinstance(labelled, str):
        raise DataError("input and label must be texts")
    pieces = text.split(_MARK)
    labels: list[float | None] = []
    at = 0
    for piece in pieces[:-1]:
        if labelled[at : at + len(piece)] != piece or labelled[at + len(piece) : at + len(piece) + 1] not in ("+", "-"):
            raise DataError(f"label differs from input before mark {len(labels)}, or has no + or - there")
        labels.append(1.0 if labelled[at + len(piece)] == "+" else 0.0)
        at += len(piece) + 1
    if pieces[-1].strip():
        raise DataError(f"input has text after its last mark: {pieces[-1].strip()[:40]!r}")
    start = _FIRST_STEP.search(pieces[0])
    if start is None or not pieces[0][: start.start()].strip():
        raise DataError("input has no problem before `Step 1:`")
    problem, first = pieces[0][: start.start()], pieces[0][start.start() :].lstrip()
    texts = [piece.strip() for piece in (first, *pieces[1:-1])]
    return [_solution(problem, texts, labels, context, {"input", "label"})]


def _solution(problem: Any, texts: list[str], labels: list[float | None], context: Context, used: set[str]) -> Parsed:
    if not isinstance(problem, str) or not problem.strip():
        raise DataError(f"the problem is {'empty' if problem == '' else kind_of(problem)}")
    parts = step_parts(texts, context.notes, "steps")
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": parts}]
    return Parsed(messages, {"step_labels": labels}, used, [0, 1])


def _texts(values: list[Any], where: str) -> list[str]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{where}[{index}] is {kind_of(value)}, not a text")
    return values


def _rating(option: Mapping[str, Any]) -> float | None:
    rating = option.get("rating")
    if rating is not None and (isinstance(rating, bool) or rating not in (-1, 0, 1)):
        raise DataError(f"rating is {rating!r:.40}, not -1, 0, 1 or null")
    return None if rating is None else float(rating)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


PROCESSBENCH = Reader(
    "processbench", "ProcessBench", processbench_matches, processbench, outcome=("outcome", "final_answer_correct")
)
PRM800K = Reader("prm800k", "PRM800K", prm800k_matches, prm800k)
# `task` is the data set there, the same in every row.
MATH_SHEPHERD = Reader("math-shepherd", "Math-Shepherd", shepherd_matches, shepherd, task=())
