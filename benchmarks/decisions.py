"""The same TextCraft searches through the engine and through plain scoring: equal decisions, and what each takes.

    python -m benchmarks.decisions --model runs/demo/reward_models/agentprm/seed-0 --tasks 24 --json decisions.json

Plain scoring reads every candidate's whole conversation again, in padded batches. Both searches draw the same actions,
so their trees part only where two scores are closer than rounding; such places are counted, and so is any other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprm import environments
from jaxprm.artifacts.directory import find_model
from jaxprm.config import Experiment, PolicyConfig
from jaxprm.host_memory import keep_freed
from jaxprm.policies import loading as policies
from jaxprm.scoring.loading import load_scorer
from jaxprm.scoring.scorer import Scorer
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.tree import ActionScorer, Node, Tree

# Of two scores: what padding, packing and a cache may change; times their root mean square where that is above 1.
BOUND = 1e-5
TEXTCRAFT = {"distractors": 4, "max_rounds": 12}


class Plain:
    """Every candidate after its whole conversation, nothing kept."""

    def __init__(self, scorer: Scorer):
        self._scorer, self.usage = scorer, scorer.usage

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        whole = [
            [*state, {"role": "assistant", "content": text}]
            for state, texts in zip(states, candidates, strict=True)
            for text in texts
        ]
        encoded = [self._scorer.encoder.trajectory(messages, row="candidate") for messages in whole]
        values = self._scorer.engine.score_full([one.tokens for one in encoded], ["candidate"] * len(encoded))
        last = [found[one.read_positions[-1]] for one, found in zip(encoded, values, strict=True)]
        return np.split(np.asarray(last), np.cumsum([len(texts) for texts in candidates])[:-1])


class Timed:
    """A scorer, with the seconds it takes."""

    def __init__(self, scorer: ActionScorer):
        self._scorer, self.usage = scorer, scorer.usage
        self.seconds = 0.0

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        begin = time.perf_counter()
        found = self._scorer.score_actions(states, candidates)
        self.seconds += time.perf_counter() - begin
        return found


def compare(model: Path, *, tasks: int, width: int, actions: int, seed: int = 0) -> dict[str, Any]:
    """{"nodes", "bound", "largest_difference", "parted_within_bound", "parted", "outcomes", "engine", "plain"}."""
    policy = policies.load(Experiment(name="decisions", seed=seed, policy=PolicyConfig(in_flight=64)))
    make = lambda: environments.create("textcraft", TEXTCRAFT)
    names = make().tasks("test")
    names = [names[index * len(names) // tasks] for index in range(tasks)]
    found, trees = {}, {}
    # The first of each compiles, and draws what all will draw: only the second is timed.
    for name in ("engine", "plain") * 2:
        scorer = load_scorer(model, rows=32, max_tokens=960)
        judge, runner = Timed(scorer if name == "engine" else Plain(scorer)), BranchRunner(make)
        trees[name] = beam_search(
            names,
            runner,
            policy,
            judge,
            width=width,
            actions=actions,
            temperature=0.7,
            max_rounds=runner.environment.max_rounds,
        )
        runner.close()
        usage = scorer.usage
        found[name] = {"seconds": judge.seconds, "tokens_encoded": usage["encoded"], "slots_computed": usage["slots"]}
    parts = [_parting(*pair) for pair in zip(trees["engine"], trees["plain"], strict=True)]
    promises = np.array([node.promise for tree in trees["plain"] for node in tree.nodes])
    bound = BOUND * max(1.0, float(np.sqrt(np.mean(promises**2))))
    return {
        "model": str(model),
        "tasks": tasks,
        "beam": f"{width}x{actions}",
        "nodes": sum(len(tree.nodes) for tree in trees["engine"]),
        "bound": bound,
        "largest_difference": max(difference for difference, _ in parts),
        "parted_within_bound": sum(gap is not None and gap <= bound for _, gap in parts),
        "parted": sum(gap is not None and gap > bound for _, gap in parts),
        "outcomes": {name: [tree.best.branch.outcome or 0.0 for tree in some] for name, some in trees.items()},
        **found,
    }


def _parting(ours: Tree, plain: Tree) -> tuple[float, float | None]:
    """The largest difference of scores of what both trees have, and the gap of scores where they part, if they do.

    Nodes are numbered as they are drawn: up to the first round in which the kept ones differ, both trees are one.
    """
    largest = 0.0
    for a, b in zip(ours.nodes, plain.nodes, strict=False):
        if _action(a) != _action(b):
            break
        largest = max(largest, abs(a.promise - b.promise))
        if a.kept != b.kept:
            rivals = [n.promise for n in plain.nodes if n.kept != b.kept and n.id != b.id]
            return largest, min(abs(b.promise - rival) for rival in rivals)
    return largest, None


def _action(node: Node) -> str:
    return next(one["content"] for one in reversed(node.messages) if one["role"] == "assistant")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--beam", default="4x4", help="paths x actions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    keep_freed()
    width, actions = map(int, options.beam.split("x"))
    found = compare(find_model(options.model), tasks=options.tasks, width=width, actions=actions, seed=options.seed)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    engine, plain = found["engine"], found["plain"]
    print(f"{found['nodes']} actions scored, largest difference {found['largest_difference']:.1e}")
    within, beyond = found["parted_within_bound"], found["parted"]
    print(f"searches that parted: {within} within {found['bound']:.1e}, {beyond} beyond it")
    for name, run in (("engine", engine), ("plain", plain)):
        padding = run["slots_computed"] / run["tokens_encoded"]
        print(f"{name}: {run['seconds']:.2f} s, {run['tokens_encoded']} tokens, {padding:.2f} x that with padding")
    print(f"plain takes {plain['seconds'] / engine['seconds']:.1f} x the time of the engine")
    return 1 if found["parted"] else 0


if __name__ == "__main__":
    sys.exit(main())
