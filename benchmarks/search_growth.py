"""Measures how the cost of scoring a search grows with depth and candidates; draws docs/search-cost.svg.

    python -m benchmarks.search_growth --json growth.json --figure docs/search-cost.svg

Lengths are those of TextCraft, with 4 beams: depth 5 to 40 with 4 candidates, then 2 to 32 candidates at depth 10. The
fastest of several searches counts, as in `bench search`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprm.host_memory import keep_freed
from jaxprm.scoring.bench import TreeSizes, bench_engine

LENGTHS = {"prompt_tokens": 300, "action_tokens": 20, "observation_tokens": 40, "beams": 4}
DEPTHS, CANDIDATES = (5, 10, 20, 40), (2, 4, 8, 16, 32)


def measure(depths: Sequence[int], candidates: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """{"depth": [...], "candidates": [...]}, one row a search."""
    sizes = {
        "depth": [TreeSizes(**LENGTHS, candidates=4, depth=depth) for depth in depths],
        "candidates": [TreeSizes(**LENGTHS, candidates=count, depth=10) for count in candidates],
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for axis, of_axis in sizes.items():
        for tree in of_axis:
            row = {axis: getattr(tree, axis)} | bench_engine(tree)
            # A process may have 65,530 mappings (vm.max_map_count); programs compiled for the CPU take hundreds each.
            jax.clear_caches()
            rows.setdefault(axis, []).append(row)
            print(f"{axis} {row[axis]}: {row['tokens_encoded']} tokens, {row['seconds']:.2f} s", flush=True)
    return rows


def microseconds_a_token(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Microseconds per encoded token of each search."""
    return [1e6 * row["seconds"] / row["tokens_encoded"] for row in rows]


def draw(rows: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Plots encoded tokens and seconds over depth and over candidates, logarithmic. Grey: tokens without a cache."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "jaxprm", "font.size": 9}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (axis, searches) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        ticks = [row[axis] for row in searches]
        axes.plot(
            ticks, [row["reencoded_tokens"] for row in searches], "--", color="0.6", label="tokens, all read again"
        )
        axes.plot(ticks, [row["tokens_encoded"] for row in searches], "o-", color="#2a6f97", label="tokens, engine")
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="tokens")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        time = axes.twinx()
        time.plot(ticks, [row["seconds"] for row in searches], "s:", color="#d1495b", label="seconds, engine")
        # Both axes span the same factor, so the lines coincide if seconds are proportional to tokens.
        rate = searches[0]["seconds"] / searches[0]["tokens_encoded"]
        time.set(yscale="log", ylabel="seconds", ylim=[rate * limit for limit in axes.get_ylim()])
        handles = [*axes.get_lines(), *time.get_lines()]
        axes.legend(handles, [str(line.get_label()) for line in handles], frameon=False)
    figure.savefig(output, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--candidates", type=int, nargs="+", default=CANDIDATES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    keep_freed()
    rows = measure(options.depths, options.candidates)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(rows, options.figure)
    for axis, searches in rows.items():
        costs = microseconds_a_token(searches)
        print(f"microseconds a new token over {axis}: {', '.join(f'{cost:.0f}' for cost in costs)}")
    slots = np.array([row["slots_computed"] / row["least_tokens"] for searches in rows.values() for row in searches])
    print(f"slots computed over the least possible: at most {slots.max():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
