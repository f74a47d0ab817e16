"""Compares TextCraft searches scored by the engine and by plain scoring: equal decisions, and the cost of each.

    python -m benchmarks.decisions --model runs/demo/reward_models/agentprm/seed-0 --tasks 24 --json decisions.json

Plain scoring reads the whole conversation of every candidate again, in padded batches. Both searches draw the same
actions, so their trees differ only if two scores are closer than rounding. Searches that differ are counted, those
within rounding and others.
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

# Difference of two scores that padding, packing and a cache may cause; times their root mean square if above 1.
BOUND = 1e-5
TEXTCRAFT = {"distractors": 4, "max_rounds": 12}


class PlainScorer:
    """Scores every candidate with its whole conversation, without a cache."""

    def __init__(self, scorer: Scorer):
        self._scorer, self.usage = scorer, scorer.usage

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        conversations = [
            [*state, {"role": "assistant", "content": text}]
            for state, texts in zip(states, candidates, strict=True)
            for text in texts
        ]
        encoded = [self._scorer.encoder.trajectory(messages, row="candidate") for messages in conversations]
        values = self._scorer.engine.score_full(
            [conversation.tokens for conversation in encoded], ["candidate"] * len(encoded)
        )
        last = [
            of_tokens[conversation.read_positions[-1]] for conversation, of_tokens in zip(encoded, values, strict=True)
        ]
        return np.split(np.asarray(last), np.cumsum([len(texts) for texts in candidates])[:-1])


class TimedScorer:
    """Measures the seconds that a scorer takes."""

    def __init__(self, scorer: ActionScorer):
        self._scorer, self.usage = scorer, scorer.usage
        self.seconds = 0.0

    def score_actions(self, states: Sequence[list[dict]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        began = time.perf_counter()
        scores = self._scorer.score_actions(states, candidates)
        self.seconds += time.perf_counter() - began
        return scores


def compare(model: Path, *, tasks: int, width: int, actions: int, seed: int = 0) -> dict[str, Any]:
    """{"nodes", "bound", "largest_difference", "parted_within_bound", "parted", "outcomes", "engine", "plain"}."""
    policy = policies.load(Experiment(name="decisions", seed=seed, policy=PolicyConfig(in_flight=64)))
    make = lambda: environments.create("textcraft", TEXTCRAFT)
    names = make().tasks("test")
    names = [names[index * len(names) // tasks] for index in range(tasks)]
    costs, trees = {}, {}
    # Twice: the first search of each compiles, and fills the memory of the policy. Only the second counts.
    for name in ("engine", "plain") * 2:
        scorer = load_scorer(model, rows=32, max_tokens=960)
        timed = TimedScorer(scorer if name == "engine" else PlainScorer(scorer))
        runner = BranchRunner(make)
        trees[name] = beam_search(
            names,
            runner,
            policy,
            timed,
            width=width,
            actions=actions,
            temperature=0.7,
            max_rounds=runner.environment.max_rounds,
        )
        runner.close()
        usage = scorer.usage
        costs[name] = {"seconds": timed.seconds, "tokens_encoded": usage["encoded"], "slots_computed": usage["slots"]}
    comparisons = [_parting(*pair) for pair in zip(trees["engine"], trees["plain"], strict=True)]
    promises = np.array([node.promise for tree in trees["plain"] for node in tree.nodes])
    bound = BOUND * max(1.0, float(np.sqrt(np.mean(promises**2))))
    return {
        "model": str(model),
        "tasks": tasks,
        "beam": f"{width}x{actions}",
        "nodes": sum(len(tree.nodes) for tree in trees["engine"]),
        "bound": bound,
        "largest_difference": max(difference for difference, _ in comparisons),
        "parted_within_bound": sum(gap is not None and gap <= bound for _, gap in comparisons),
        "parted": sum(gap is not None and gap > bound for _, gap in comparisons),
        "outcomes": {
            name: [tree.best.branch.outcome or 0.0 for tree in of_scorer] for name, of_scorer in trees.items()
        },
        **costs,
    }


def _parting(ours: Tree, plain: Tree) -> tuple[float, float | None]:
    """(largest difference of scores of common nodes, gap of the scores where the trees part or None if they do not)."""
    largest = 0.0
    # Nodes are in order of their draws, so both trees are equal up to the first round that keeps other nodes.
    for node, other in zip(ours.nodes, plain.nodes, strict=False):
        if _action(node) != _action(other):
            break
        largest = max(largest, abs(node.promise - other.promise))
        if node.kept != other.kept:
            rivals = [rival.promise for rival in plain.nodes if rival.kept != other.kept and rival.id != other.id]
            return largest, min(abs(other.promise - rival) for rival in rivals)
    return largest, None


def _action(node: Node) -> str:
    return next(message["content"] for message in reversed(node.messages) if message["role"] == "assistant")


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
    report = compare(find_model(options.model), tasks=options.tasks, width=width, actions=actions, seed=options.seed)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    engine, plain = report["engine"], report["plain"]
    print(f"{report['nodes']} actions scored, largest difference {report['largest_difference']:.1e}")
    within, beyond = report["parted_within_bound"], report["parted"]
    print(f"searches that parted: {within} within {report['bound']:.1e}, {beyond} beyond it")
    for name, run in (("engine", engine), ("plain", plain)):
        padding = run["slots_computed"] / run["tokens_encoded"]
        print(f"{name}: {run['seconds']:.2f} s, {run['tokens_encoded']} tokens, {padding:.2f} x that with padding")
    print(f"plain takes {plain['seconds'] / engine['seconds']:.1f} x the time of the engine")
    return 1 if report["parted"] else 0


if __name__ == "__main__":
    sys.exit(main())
