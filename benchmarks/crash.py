"""Kills a training run again and again, and compares its result with that of an undisturbed run.

    python -m benchmarks.crash [--times 2] [--random 20] [--seconds 2] [--folder DIR] [--json FILE]

One run is killed (SIGKILL) `--times` times at every named point of benchmarks/killed_training.py, then runs to its end.
Others are killed at random times, up to `--seconds` after the second step of a process, `--random` times in total. Each
resumes where the killed process stopped. Parameters, optimizer, target network, exported weights and metrics.jsonl must
have the same sha256 as those of the undisturbed run. Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.crash_runs import KILLED, Trainer, result
from benchmarks.killed_training import NAMED
from benchmarks.toy import make_toy
from jaxprm import files
from jaxprm.progress import bar

EPOCHS = 6  # long enough for several random kills in a run


def named(train: Trainer, times: int, progress: Any) -> dict[str, Any]:
    """One run that is killed at each named point: {"kills", "status", "result"}."""
    kills = []
    for point in (point for point in NAMED for _ in range(times)):
        killed = train("named", kill_at=point)
        if killed.status != KILLED:
            raise RuntimeError(f"kill point {point} was not reached: status {killed.status}\n{killed.stderr[-2000:]}")
        kills.append({"point": point, "began": killed.began})
        progress.update()
    ended = train("named")
    progress.update()
    return {"kills": kills, "status": ended.status, "result": result(ended.output)}


def at_random(train: Trainer, count: int, seconds: float, seed: int, progress: Any) -> list[dict[str, Any]]:
    """As many runs as `count` kills need: [{"kills", "status", "result"}]. A process may end before its kill."""
    rng, runs, remaining = random.Random(seed), [], count
    while remaining:
        output, kills = f"random-{len(runs)}", []
        while True:
            after = rng.uniform(0, seconds) if remaining else None
            ended = train(output, kill_after=after)
            if ended.status != KILLED:
                break
            remaining -= 1
            kills.append({"after": after, "began": ended.began})
            progress.update()
        runs.append({"kills": kills, "status": ended.status, "result": result(ended.output)})
    return runs


def crash(folder: Path, *, times: int, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """{"whole": result of the undisturbed run, "named": one run, "random": [runs], "same": whether all are equal}."""
    (folder / "toy").mkdir(parents=True)
    train = Trainer(folder, make_toy(folder / "toy"), epochs=EPOCHS)
    with bar("crash test", 2 + len(NAMED) * times + count, unit="process") as progress:
        whole = result(train("whole").output)
        progress.update()
        results = {
            "whole": whole,
            "named": named(train, times, progress),
            "random": at_random(train, count, seconds, seed, progress),
        }
    runs = [results["named"], *results["random"]]
    return results | {"same": all(run["status"] == 0 and run["result"] == whole for run in runs)}


def report(results: dict[str, Any]) -> list[str]:
    """One line per run, and the verdict."""
    runs = [("named points", results["named"]), *((f"random {i}", run) for i, run in enumerate(results["random"]))]
    lines, kills = [], 0
    for name, run in runs:
        began = ", ".join("the end" if kill["began"] is None else str(kill["began"]) for kill in run["kills"])
        differs = [part for part, value in results["whole"].items() if run["result"].get(part) != value]
        verdict = f"differs in {', '.join(differs)}" if differs else "same bits"
        lines.append(f"{name}: {len(run['kills'])} kills, of processes that began at {began or 'none'}: {verdict}")
        kills += len(run["kills"])
    verdict = "the same bits" if results["same"] else "NOT THE SAME"
    return [*lines, f"{kills} kills, {results['whole']['step']} steps: {verdict} as the undisturbed run"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.crash", description="Kills a training run again and again.")
    parser.add_argument("--times", type=int, default=2, help="kills at each named point; default 2")
    parser.add_argument("--random", type=int, default=20, help="kills at random times; default 20")
    parser.add_argument("--seconds", type=float, default=2.0, help="latest random kill of a process; default 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--folder", type=Path, help="new folder, in which the runs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    options = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="jaxprm-crash-") as scratch:
        results = crash(
            options.folder or Path(scratch),
            times=options.times,
            count=options.random,
            seconds=options.seconds,
            seed=options.seed,
        )
    print("\n".join(report(results)))
    if options.json:
        files.write_json(options.json, results)
    return 0 if results["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
