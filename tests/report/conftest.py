"""Results and search trees of the documented form, with random but valid numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LABELS = ("agentprm", "agentprm_no_progress", "pvm", "orm", "random")
LEVEL = {"agentprm": 0.58, "agentprm_no_progress": 0.56, "pvm": 0.55, "orm": 0.44, "random": 0.31}
SIZES = ("1", "2", "4", "8", "16", "32")
BEAMS = ("2x2", "4x4", "8x8")
ITEMS = ("oak sign", "stone brick stairs", "lantern", "polished andesite slab", "campfire", "fletching table")


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def trees() -> list[dict[str, Any]]:
    return make_trees()


@pytest.fixture(scope="session")
def full_run() -> Callable[[Path], Path]:
    """full_run(directory) writes the files of a complete run there."""
    return lambda directory: write(directory, make_results(), make_trees())


@pytest.fixture
def leave(tmp_path: Path) -> Callable[..., Path]:
    """leave(results, trees) writes the files where a run leaves them and returns the work directory."""

    def write_run(results: dict[str, Any] | None = None, trees: list[dict[str, Any]] | None = None) -> Path:
        return write(tmp_path / "run", results, trees)

    return write_run


def estimate(rng: random.Random, mean: float, spread: float = 0.06, n: int = 120) -> dict[str, float]:
    mean = min(1.0, max(0.0, mean + rng.uniform(-0.015, 0.015)))
    return {
        "mean": mean,
        "low": max(0.0, mean - spread * rng.uniform(0.7, 1)),
        "high": min(1.0, mean + spread * rng.uniform(0.7, 1)),
        "n": n,
    }


def make_results(seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    share = {size: step / (len(SIZES) - 1) for step, size in enumerate(SIZES)}
    methods = {label: _method(rng, label, share) for label in LABELS}
    judges = [label for label in LABELS if label != "random"]
    return {
        "name": "textcraft_test",
        "policy": {"sampled": estimate(rng, 0.41), "greedy": estimate(rng, 0.43)},
        "oracle": {size: estimate(rng, 0.41 + 0.38 * share[size]) for size in SIZES},
        "methods": methods,
        "paired": _paired(rng),
        "value_by_depth": {label: _depths(rng, label) for label in judges},
        "calibration": {label: _calibration(rng) for label in judges},
        "validation": {
            label: {"loss": rng.uniform(0.05, 0.1), "explained_variance": rng.uniform(0.2, 0.5), "auroc": 0.83}
            for label in judges
        },
        "training": {label: {str(run): _training(rng, label) for run in range(3)} for label in judges},
        "compute": {
            "unit": "per task",
            "flops_per_token": 1179648.0,
            "methods": {"policy": {"1": _spent(rng, 1)}}
            | {label: {beam: _spent(rng, int(beam[0])) for beam in BEAMS} for label in LABELS},
        },
        "seconds": {"collect": 71.2, "build": 8.4}
        | {f"train-{label}-{run}": 16.5 for label in judges for run in range(3)}
        | {"search-pool": 40.0, "search-beam-4x4-agentprm-0": 120.3},
        "data": {
            "trajectories": 6400,
            "unique": 3121,
            "success_rate": 0.3125,
            "tasks": {"train": 400, "validation": 48, "test": 96},
        },
        "provenance": {
            "config": {"environment": "textcraft", "beta": 1.0, "gae_lambda": 0.95},
            "seeds": [0, 1, 2],
            "versions": {"jax": "0.10.2"},
            "fingerprints": {"tokenizer": "9f2c"},
            "date": "2026-11-22",
        },
    }


def make_trees(seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        tree(rng, f"textcraft/{17 + index}", item, method, beam)
        for index, item in enumerate(ITEMS)
        for method in ("agentprm", "pvm", "random")
        for beam in ("2x2", "4x4")
    ]


def tree(rng: random.Random, task: str, goal: str, method: str, beam: str, rounds: int = 7) -> dict[str, Any]:
    keep, tries = (int(part) for part in beam.split("x"))
    nodes: list[dict[str, Any]] = []
    frontier = [{"id": 0, "promise": 0.4}]
    for number in range(1, rounds + 1):
        level = [
            _candidate(rng, len(nodes) + 1 + index, parent, number, goal)
            for index, parent in enumerate(
                p for p in frontier for _ in range(tries if number > 1 else keep * tries // 2)
            )
        ]
        for rank, node in enumerate(sorted(level, key=lambda each: -each["promise"])):
            node["kept"] = rank < keep
            node["observation"] = f"Got 1 {goal}" if node["kept"] else None
            node["done"] = number == rounds and node["kept"]
            node["outcome"] = (1.0 if node["promise"] > 0.5 else 0.0) if node["done"] else None
        nodes += level
        frontier = [node for node in level if node["kept"]]
    best = max(frontier, key=lambda each: each["promise"])
    prompt = "Crafting commands:\n" + "\n".join(f"craft 1 {item} using 2 oak planks, 1 stick" for item in ITEMS)
    return {
        "task": task,
        "goal": goal,
        "depth": rng.randint(1, 3),
        "method": method,
        "beam": beam,
        "seed": 0,
        "outcome": best["outcome"],
        "prompt": f"{prompt}\n\nGoal: craft {goal}.",
        "nodes": nodes,
        "best": best["id"],
    }


def write(workdir: Path, results: dict[str, Any] | None = None, trees: list[dict[str, Any]] | None = None) -> Path:
    """Write the files where a run leaves them; None writes no file."""
    (workdir / "search").mkdir(parents=True, exist_ok=True)
    if results is not None:
        (workdir / "results.json").write_text(json.dumps(results))
    if trees is not None:
        (workdir / "search" / "trees.json").write_text(json.dumps(trees))
    return workdir


def _method(rng: random.Random, label: str, share: dict[str, float]) -> dict[str, Any]:
    gain = LEVEL[label] - 0.41
    return {
        "best_of_n": {size: estimate(rng, 0.41 + (0.36 if gain > 0 else 0.0) * at) for size, at in share.items()},
        "prefix_best_of_n": {size: estimate(rng, 0.41 + max(gain, 0.0) * at) for size, at in share.items()},
        "stepwise": {size: estimate(rng, 0.41 + gain * 0.8 * share[size]) for size in ("2", "4", "8")},
        "beam": {beam: estimate(rng, 0.41 + gain * (0.7 + 0.15 * index)) for index, beam in enumerate(BEAMS)},
    }


def _paired(rng: random.Random) -> list[dict[str, Any]]:
    pairs = [
        ("agentprm", "policy"),
        ("pvm", "policy"),
        ("orm", "policy"),
        ("random", "policy"),
        ("agentprm", "pvm"),
        ("agentprm", "orm"),
    ]
    level = {**LEVEL, "policy": 0.41}
    rows = []
    for a, b in pairs:
        mean = level[a] - level[b] + rng.uniform(-0.01, 0.01)
        rows.append(
            {"a": a, "b": b, "at": "beam/4x4", "mean": mean, "low": mean - 0.055, "high": mean + 0.055, "n": 120}
        )
    return rows


def _depths(rng: random.Random, label: str) -> list[dict[str, Any]]:
    skill = LEVEL[label]
    return [
        {
            "depth": depth,
            "success": estimate(rng, 0.4 + 0.05 * depth * skill, 0.03 + 0.002 * depth, 2000 // depth),
            "failure": estimate(rng, 0.3 - 0.015 * depth * skill, 0.03, 3000 // depth),
            "auroc": estimate(rng, min(0.97, 0.6 + 0.06 * depth * skill), 0.03, 2000 // depth),
            "auroc_within_task": estimate(rng, min(0.95, 0.5 + 0.05 * depth * skill), 0.04, 900 // depth),
        }
        for depth in range(1, 13)
    ]


def _calibration(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"predicted": (k + 0.5) / 10, "observed": estimate(rng, (k + 0.5) / 10 * 0.9, 0.05, 400)} for k in range(10)
    ]


def _training(rng: random.Random, label: str) -> list[dict[str, Any]]:
    floor = 0.12 - 0.08 * LEVEL[label]
    rows = []
    for step in range(0, 400, 10):
        value = floor + 0.08 * 0.98 ** (step / 2) + rng.uniform(0, 0.008)
        row: dict[str, Any] = {"step": step, "loss": value * 1.3, "value_loss": value}
        if label == "agentprm":
            row["progress_loss"] = value * 0.3
        if step % 100 == 0:
            row |= {"validation_loss": value * 1.15, "explained_variance": 0.5 - 2 * value}
        rows.append(row)
    return rows


def _spent(rng: random.Random, size: int) -> dict[str, float]:
    return {
        "policy_tokens": size * size * rng.randint(900, 1000),
        "reward_tokens": size * size * rng.randint(1800, 2200),
        "environment_steps": size * rng.randint(8, 11),
        "flops": size * size * 2.1e9,
    }


def _candidate(rng: random.Random, ident: int, parent: dict[str, Any], number: int, goal: str) -> dict[str, Any]:
    verb = rng.choice(
        [
            f"craft 1 {goal} using 2 oak planks, 1 stick",
            "get 2 oak log",
            "inventory",
            "craft 4 oak planks using 1 oak log",
        ]
    )
    promise = min(1.02, max(-0.03, parent["promise"] + rng.gauss(0.04, 0.12)))
    return {
        "id": ident,
        "parent": parent["id"],
        "round": number,
        "action": f"Thought: I still need parts for {goal}.\nAction: {verb}",
        "promise": promise,
        "progress": promise - parent["promise"] if number > 1 else None,
        "count": rng.choice([1, 1, 1, 2, 5]),
    }
