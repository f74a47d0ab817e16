"""How the reward models judge before any search, and how they were trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec

from jaxprm.report import html, panels
from jaxprm.report.blocks import BAND, figure, panel_sample, section, side
from jaxprm.report.labels import METRICS, number, percent
from jaxprm.report.results import ReportedEstimate, RunResults, is_number

VARIANTS = (("succeeded", False), ("failed", True))


def judgement(results: RunResults) -> str:
    """Step values of successful against failed trajectories, AUROC by step, calibration."""
    validation = _validation_table(results)
    calibration = _calibration(results)
    body = _values(results) + _auroc(results)
    if calibration:
        body += f"<h3>Calibration</h3>{side(calibration, validation)}"
    else:
        body += validation
    intro = "Before any search: do the step values tell good trajectories from bad ones, and how early?"
    return section("judgement", "Does the model judge well?", intro, body) if body else ""


def _values(results: RunResults) -> str:
    found = panels.value_panels(results)
    if not found:
        return ""
    words = (
        "Mean promise at each step, for trajectories that succeeded in the end and for those that failed. The earlier "
        f"the lines part, the earlier the model knows. Bands: {BAND}{panel_sample(results, found)}."
    )
    return "<h3>Step values</h3>" + figure(found, "values", words, labels=[], variants=VARIANTS)


def _auroc(results: RunResults) -> str:
    found = panels.auroc_panels(results)
    if not found:
        return ""
    words = (
        "Probability that a step of a successful trajectory scores above one of a failed trajectory; 0.5 (dotted) "
        "is chance. Over all tasks this mostly measures how hard a task is; within a task it measures judgement. "
        f"Bands: {BAND}{panel_sample(results, found)}."
    )
    return "<h3>Telling success from failure</h3>" + figure(found, "auroc", words)


def _calibration(results: RunResults) -> str:
    found = panels.present([panels.calibration_panel(results)])
    if not found:
        return ""
    words = (
        "Steps grouped by predicted success, against how often their trajectories did succeed; on the dotted line "
        f"a promise of 0.3 means 30 %. Bands: {BAND}{panel_sample(results, found)}."
    )
    return figure(found, "calibration", words, titled=False)


def _validation_table(results: RunResults) -> str:
    found = {label: values for label, values in results.validation.items() if isinstance(values, Mapping)}
    metrics = [metric for metric in METRICS if any(_estimate(values.get(metric)) for values in found.values())]
    if not metrics:
        return ""
    heads = ["Method", *("Loss" if metric == "loss" else METRICS[metric] for metric in metrics)]
    rows = [
        [html.method(label), *(html.plain(_estimate(values.get(metric))) for metric in metrics)]
        for label, values in found.items()
    ]
    caption = "On validation tasks, where every choice was made; intervals as in the figures."
    return html.table(heads, rows, caption=caption)


def training(results: RunResults) -> str:
    """Training curves and what they were trained on."""
    found = panels.training_panels(results)
    body = ""
    if found:
        seeds = max(len(runs) for runs in results.training.values())
        words = (
            f"One line per method and seed (up to {number(seeds)} a method), not smoothed, so there is no band; "
            f"at most {panels.MAX_POINTS} logged values a line. Losses of different targets do not compare in height."
        )
        body += figure(found, "training", words)
    if facts := html.facts(leaves(results.data)):
        body += f"<h3>Data</h3>{facts}"
    return section("training", "Training", "How the reward models came to be.", body) if body else ""


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, HTML of the value) of every number and text in nested objects; lists are left out."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{path} · {key}" if path else str(key))
    elif is_number(node):
        share = path.endswith("rate") and 0 <= node <= 1
        yield path, html.data(node, percent(node)) if share else html.count(node)
    elif isinstance(node, str):
        yield path, escape(node)


def _estimate(value: Any) -> ReportedEstimate | None:
    if is_number(value):
        return ReportedEstimate(float(value))
    if isinstance(value, Mapping) and is_number(value.get("mean")):
        return msgspec.convert({key: part for key, part in value.items() if is_number(part)}, ReportedEstimate)
    return None
