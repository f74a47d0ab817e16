"""Kills a training over and over, and compares what it ends with to one that was left alone.

    python -m benchmarks.crash [--times 2] [--random 20] [--seconds 2] [--folder DIR] [--json FILE]

One run is killed (SIGKILL) at every named point of tests/training/killed_training.py, `--times` each, and runs to its
end. Others are killed at random moments of their steady state, up to `--seconds` after the second step of a process,
`--random` times in all; each goes on from where the last process died. Parameters, optimizer, target network, exported
weights and metrics.jsonl must have the same sha256 as the undisturbed run's. Exit status 1 where any differs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxprm import files
from jaxprm.progress import bar
from tests.training.crashes import KILLED, Trainer, result
from tests.training.killed_training import NAMED
from tests.training.toy import make_toy

EPOCHS = 6  # long enough for several random kills a run


def named(train: Trainer, times: int, progress: Any) -> dict[str, Any]:
    """One run, killed at one point after the other."""
    kills = []
    for point in (point for point in NAMED for _ in range(times)):
        killed = train("named", kill_at=point)
        if killed.status != KILLED:
            raise RuntimeError(f"kill point {point} was not reached: status {killed.status}\n{killed.said[-2000:]}")
        kills.append({"point": point, "began": killed.began})
        progress.update()
    ended = train("named")
    progress.update()
    return {"kills": kills, "status": ended.status, "result": result(ended.output)}


def at_random(train: Trainer, count: int, seconds: float, seed: int, progress: Any) -> list[dict[str, Any]]:
    """As many runs as `count` kills take; a process that ends before its moment comes was not killed."""
    rng, runs, left = random.Random(seed), [], count
    while left:
        output, kills = f"random-{len(runs)}", []
        while True:
            after = rng.uniform(0, seconds) if left else None
            ended = train(output, kill_after=after)
            if ended.status != KILLED:
                break
            left -= 1
            kills.append({"after": after, "began": ended.began})
            progress.update()
        runs.append({"kills": kills, "status": ended.status, "result": result(ended.output)})
    return runs


def crash(folder: Path, *, times: int, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """{"whole": its result, "named", "random": [{"kills", "status", "result"}], "same": whether all are alike}."""
    (folder / "toy").mkdir(parents=True)
    train = Trainer(folder, make_toy(folder / "toy"), epochs=EPOCHS)
    with bar("crash test", 2 + len(NAMED) * times + count, unit="process") as progress:
        whole = result(train("whole").output)
        progress.update()
        found = {
            "whole": whole,
            "named": named(train, times, progress),
            "random": at_random(train, count, seconds, seed, progress),
        }
    ended = [found["named"], *found["random"]]
    return found | {"same": all(one["status"] == 0 and one["result"] == whole for one in ended)}


def report(found: dict[str, Any]) -> list[str]:
    """A line for every run, and the verdict."""
    runs = [("named points", found["named"]), *((f"random {i}", one) for i, one in enumerate(found["random"]))]
    lines, kills = [], 0
    for name, one in runs:
        begun = ", ".join("the end" if kill["began"] is None else str(kill["began"]) for kill in one["kills"])
        differs = [part for part, value in found["whole"].items() if one["result"].get(part) != value]
        verdict = f"differs in {', '.join(differs)}" if differs else "same bits"
        lines.append(f"{name}: {len(one['kills'])} kills, of processes that began at {begun or 'none'}: {verdict}")
        kills += len(one["kills"])
    verdict = "the same bits" if found["same"] else "NOT THE SAME"
    return [*lines, f"{kills} kills, {found['whole']['step']} steps: {verdict} as the undisturbed run"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.crash", description="Kills a training over and over.")
    parser.add_argument("--times", type=int, default=2, help="at every named point; default 2")
    parser.add_argument("--random", type=int, default=20, help="kills at random moments; default 20")
    parser.add_argument("--seconds", type=float, default=2.0, help="the latest of them; default 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="a new one, whose runs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="jaxprm-crash-") as scratch:
        found = crash(
            options.folder or Path(scratch),
            times=options.times,
            count=options.random,
            seconds=options.seconds,
            seed=options.seed,
        )
    print("\n".join(report(found)))
    if options.json:
        files.write_json(options.json, found)
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
