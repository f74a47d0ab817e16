"""The panels of a run's results. A panel holds only what was measured; a panel without points is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from jaxprm.report.figures import Level, Panel, Series, shared_limits
from jaxprm.report.labels import METRICS, method_name
from jaxprm.report.results import ReportedEstimate, RunResults, is_number, size_key

T = TypeVar("T")
SCALING = (
    ("best_of_n", "Best of N whole trajectories", "N trajectories"),
    ("prefix_best_of_n", "Best of N prefixes", "N half-finished trajectories"),
    ("stepwise", "Best of K at every step", "K actions"),
)
CURVES = ("value_loss", "progress_loss", "validation_loss", "explained_variance")
# Labels below an axis; more would run into each other.
MAX_TICKS = 8
MAX_POINTS = 200


def non_empty(panels: Iterable[Panel]) -> list[Panel]:
    """The panels that have something to show."""
    return [panel for panel in panels if not panel.empty]


def levels(results: RunResults) -> list[Level]:
    """The plain and the greedy policy, where they were measured."""
    baselines = {"policy": results.baseline("sampled"), "greedy": results.baseline("greedy")}
    return [Level(label=label, value=value) for label, value in baselines.items() if value]


def beam_panel(results: RunResults) -> Panel:
    """Success by beam size, one dodged mark per method."""
    sizes = sorted({size for label in results.methods for size in results.curve(label, "beam")}, key=size_key)
    position = {size: float(index) for index, size in enumerate(sizes)}
    return _with_limits(
        Panel(
            title="Beam search",
            x_label="beam: kept × actions tried for each",
            y_label="tasks solved",
            series=[
                _series(label, {position[size]: point for size, point in results.curve(label, "beam").items()})
                for label in results.with_search("beam")
            ],
            levels=levels(results),
            ticks=[(position[size], size.replace("x", "×")) for size in sizes],
            bars=True,
            unit="beam",
        )
    )


def scaling_panels(results: RunResults) -> list[Panel]:
    """Success against N, for every search that picks the best of N; the oracle is in the panel of best-of-N."""
    panels = non_empty(_scaling_panel(results, *search) for search in SCALING)
    # One range for all panels, so that they can be compared with each other.
    limits = shared_limits(panels)
    return [replace(panel, limits=limits) for panel in panels]


def _scaling_panel(results: RunResults, search: str, title: str, x_label: str) -> Panel:
    curves = {label: results.curve(label, search) for label in results.with_search(search)}
    if search == "best_of_n" and results.oracle_curve():
        curves["oracle"] = results.oracle_curve()
    sizes = sorted({size for curve in curves.values() for size in curve if _is_count(size)}, key=size_key)
    return Panel(
        title=title,
        x_label=x_label,
        y_label="tasks solved",
        series=[
            # N doubles from size to size: in log2 the sizes are evenly spaced.
            _series(label, {math.log2(int(size)): point for size, point in curve.items() if _is_count(size)})
            for label, curve in curves.items()
        ],
        levels=levels(results),
        ticks=[(math.log2(int(size)), size) for size in sizes],
    )


def value_panels(results: RunResults) -> list[Panel]:
    """Mean step value of successful (filled) and failed (hollow) trajectories by step, one panel per method."""
    panels = []
    for label, rows in results.value_by_depth.items():
        success = {row.depth: row.success for row in rows}
        failure = {row.depth: row.failure for row in rows}
        panels.append(
            Panel(
                title=method_name(label),
                x_label="step of the trajectory",
                y_label="mean promise",
                series=[
                    _series(label, success, variant="solid", note="succeeded"),
                    _series(label, failure, variant="hollow", note="failed"),
                ],
                fractions=False,
                unit="step",
            )
        )
    panels = [_with_depth_ticks(panel) for panel in non_empty(panels)]
    limits = shared_limits(panels)
    return [replace(panel, limits=limits) for panel in panels]


def auroc_panels(results: RunResults) -> list[Panel]:
    """How well step values tell success from failure by step, over all steps and within a task."""
    kinds = (("auroc", "Over all tasks"), ("auroc_within_task", "Within a task"))
    panels = non_empty(
        Panel(
            title=title,
            x_label="step of the trajectory",
            y_label="AUROC",
            series=[
                _series(label, {row.depth: getattr(row, kind) for row in rows})
                for label, rows in results.value_by_depth.items()
            ],
            fractions=False,
            chance=0.5,
            unit="step",
        )
        for kind, title in kinds
    )
    limits = shared_limits(panels)
    # Chance, at 0.5, is always in view.
    return [replace(_with_depth_ticks(panel), limits=(min(limits[0], 0.4), max(limits[1], 0.6))) for panel in panels]


def calibration_panel(results: RunResults) -> Panel:
    """Observed against predicted success, in bins of the prediction."""
    curves = {label: {row.predicted: row.observed for row in rows} for label, rows in results.calibration.items()}
    series = [_series(label, curve) for label, curve in curves.items()]
    panel = Panel(
        title="Calibration",
        x_label="promise (predicted success)",
        y_label="observed success",
        series=series,
        diagonal=True,
        unit="predicted",
    )
    reach = [x for each in series for x in each.xs]
    low, high = shared_limits([panel]) or (0.0, 1.0)
    # The margin keeps markers at 0 and 1 clear of the axes.
    margin = 0.02
    return replace(
        panel,
        reach=(min([0.0, *reach]) - margin, max([1.0, *reach]) + margin),
        limits=(min(0.0, low) - margin, max(1.0, high) + margin),
    )


def training_panels(results: RunResults) -> list[Panel]:
    """One panel per logged quantity, one line per method and seed, each of at most MAX_POINTS points."""
    return non_empty(
        Panel(
            title=METRICS[metric],
            x_label="training step",
            y_label="",
            series=[
                _series(label, _logged(rows, metric), faint=True, note=f"seed {seed}")
                for label, seeds in results.training.items()
                for seed, rows in seeds.items()
            ],
            fractions=False,
            unit="step",
        )
        for metric in CURVES
    )


def evenly_spaced(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the items, evenly spaced, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]


def _logged(rows: Sequence[Mapping[str, float | None]], metric: str) -> dict[float, ReportedEstimate]:
    # A line of metrics is a training step or a validation, and has the quantities of that alone.
    logged = [(row["step"], row[metric]) for row in rows if row.get("step") is not None and row.get(metric) is not None]
    return {step: ReportedEstimate(value) for step, value in evenly_spaced(logged, MAX_POINTS)}


def compute_panel(results: RunResults) -> Panel:
    """Success of the plain policy and of beam search against the tokens read and written, where they were counted."""
    compute = results.compute if isinstance(results.compute, Mapping) else {}
    unit = compute.get("unit")
    curves = {label: results.curve(label, "beam") for label in results.with_search("beam")}
    if plain := results.baseline("sampled"):
        # The costs of the plain policy are recorded under the size 1.
        curves = {"policy": {"1": plain}, **curves}
    return _with_limits(
        Panel(
            title="Success for tokens spent",
            x_label="tokens of policy and reward model" + (f" {unit}" if isinstance(unit, str) else ""),
            y_label="tasks solved",
            series=[_series(label, dict(_spent(compute, label, curve))) for label, curve in curves.items()],
            levels=levels(results),
            log_x=True,
            unit="tokens",
        )
    )


def _spent(
    compute: Mapping[str, Any], label: str, curve: dict[str, ReportedEstimate]
) -> Iterator[tuple[float, ReportedEstimate]]:
    # The counts have no checked form: what is not as expected is not drawn.
    for size, point in curve.items():
        counts: Any = compute
        for key in ("methods", label, size):
            counts = counts.get(key) if isinstance(counts, Mapping) else None
        kinds = ("policy_tokens", "reward_tokens")
        tokens = [counts.get(kind) for kind in kinds] if isinstance(counts, Mapping) else []
        if tokens and all(is_number(count) for count in tokens) and sum(tokens) > 0:
            yield float(sum(tokens)), point


def _series(label: str, curve: Mapping[float, ReportedEstimate | None], **options: Any) -> Series:
    measured = {x: curve[x] for x in sorted(curve) if curve[x] is not None and curve[x].mean is not None}
    return Series(label=label, xs=list(measured), points=list(measured.values()), **options)


def _with_limits(panel: Panel) -> Panel:
    return replace(panel, limits=shared_limits([panel]))


def _is_count(size: str) -> bool:
    return size.isdigit() and int(size) > 0


def _with_depth_ticks(panel: Panel) -> Panel:
    depths = sorted({depth for series in panel.series for depth in series.xs})
    stride = max(1, math.ceil(len(depths) / MAX_TICKS))
    return replace(panel, ticks=[(depth, f"{depth:g}") for depth in depths[::stride]])
