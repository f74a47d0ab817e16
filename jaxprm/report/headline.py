"""The result in words, computed from the results alone. It says when there is no gain, or no certain one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxprm.report.labels import (
    ALIASES,
    THIN_SPACE,
    method_name,
    number,
    percent,
    plural,
    search_name,
    signed_points,
    split_search,
)
from jaxprm.report.results import ReportedEstimate, RunResults

PREFERRED = ("agentprm", "pvm", "orm", "mc")
PREFERRED_BEAM = "4x4"
FEW_TASKS = 50


class Headline(NamedTuple):
    """The claim is the page's title, the detail the sentence below it.

    label, size: the method and the beam of the guided search that is compared, None where there is none.
    """

    claim: str
    detail: str
    verdict: Literal["better", "unclear", "worse", "unknown"]
    label: str | None = None
    size: str | None = None


def headline(results: RunResults) -> Headline:
    """Compare the plain policy with beam search by AgentPRM at 4x4, or by the next method and size that was run."""
    plain = results.baseline("sampled")
    guided = _guided(results)
    if guided is None:
        alone = f"The policy alone solves {percent(plain.mean)} of unseen tasks. " if plain else ""
        return Headline(f"{alone}No guided search was measured in this run.", "", "unknown")
    label, size, success = guided
    if plain is None:
        claim = f"Guided by {method_name(label)}, the policy solves {percent(success.mean)} of unseen tasks."
        return Headline(claim, "The policy alone was not measured in this run.", "unknown", label, size)
    difference = paired_with_policy(results, label, size)
    verdict = _verdict(difference)
    detail = _detail(verdict, size, difference, results)
    return Headline(_claim(verdict, label, plain, success), detail, verdict, label, size)


def paired_with_policy(results: RunResults, label: str, size: str) -> ReportedEstimate | None:
    """Mean over tasks of the success of `label` with this beam minus that of the plain policy, None if not computed."""
    for pair in results.paired:
        if pair.mean is None or split_search(pair.at) != ("beam", size):
            continue
        a, b = (ALIASES.get(side, side) for side in (pair.a, pair.b))
        # The file may have the pair in either order.
        if (a, b) == (label, "policy"):
            return pair.estimate
        if (a, b) == ("policy", label):
            return pair.estimate.negated()
    return None


def sample_words(results: RunResults, estimates: Sequence[ReportedEstimate]) -> str:
    """What the means were taken over, for a caption: " (120 tasks, 3 seeds)"; empty when neither is known."""
    counts = sorted({estimate.n for estimate in estimates if estimate.n is not None})
    words = []
    if counts:
        span = plural(counts[0], "task") if len(counts) == 1 else f"{number(counts[0])} to {number(counts[-1])} tasks"
        words.append(span)
    seeds = results.provenance.get("seeds") if isinstance(results.provenance, dict) else None
    if isinstance(seeds, list) and seeds:
        words.append(plural(len(seeds), "seed"))
    return f" ({', '.join(words)})" if words else ""


def _guided(results: RunResults) -> tuple[str, str, ReportedEstimate] | None:
    """The label, size and success of the search that the headline reports."""
    measured = [label for label in results.with_search("beam") if label != "random"]
    # The order of preference is fixed: the headline does not depend on which result looks best.
    for label in sorted(measured, key=lambda each: PREFERRED.index(each) if each in PREFERRED else len(PREFERRED)):
        curve = results.curve(label, "beam")
        # Sizes ascend, so the alternative is the smallest beam.
        size = PREFERRED_BEAM if PREFERRED_BEAM in curve else next(iter(curve))
        return label, size, curve[size]
    return None


def _verdict(difference: ReportedEstimate | None) -> Literal["better", "unclear", "worse", "unknown"]:
    if difference is None or not difference.has_interval:
        return "unknown"
    # A gain is claimed only where the interval of the paired difference is clear of zero.
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "unclear"


def _claim(verdict: str, label: str, plain: ReportedEstimate, success: ReportedEstimate) -> str:
    alone, guided, model = percent(plain.mean), percent(success.mean), method_name(label)
    return {
        "better": f"Guided by {model}, the policy solves {guided} of unseen tasks. Alone it solves {alone}.",
        "worse": f"Guided by {model}, the policy solves fewer unseen tasks: {guided}. Alone it solves {alone}.",
        "unclear": f"The policy alone solves {alone} of unseen tasks, guided by {model} {guided}: no clear difference.",
        "unknown": f"The policy alone solves {alone} of unseen tasks, guided by {model} {guided}.",
    }[verdict]


def _detail(verdict: str, size: str, difference: ReportedEstimate | None, results: RunResults) -> str:
    if difference is None:
        return f"{_capitalized(search_name(f'beam {size}'))}. The paired difference was not computed."
    interval = ""
    if difference.has_interval:
        interval = f", 95{THIN_SPACE}% interval {signed_points(difference.low)} to {signed_points(difference.high)}"
    meaning = {
        "better": "The interval is clear of zero.",
        "worse": "The interval lies below zero: in this run guidance hurt.",
        "unclear": "The interval includes zero: this run does not show that guidance helps.",
        "unknown": "No interval was computed, so this difference may be chance.",
    }[verdict]
    small = difference.n is not None and difference.n < FEW_TASKS
    caution = f" Only {plural(difference.n, 'task')}: enough to see that it runs, not to conclude." if small else ""
    return (
        f"{_capitalized(search_name(f'beam {size}'))} against one plain sample, paired by task"
        f"{sample_words(results, [difference])}: {signed_points(difference.mean)} points{interval}. {meaning}{caution}"
    )


def _capitalized(text: str) -> str:
    return re.sub(r"^\w", lambda first: first[0].upper(), text)
