"""results.json: every number of a run, computed from the files its stages left."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.evaluation import value_metrics
from jaxprm.evaluation.best_of_n import AGGREGATIONS, VOTES, Cost, budget_ratio, equal_budget, vote_curve
from jaxprm.evaluation.statistics import best_of_n_curve, bootstrap, oracle_curve, paired_difference
from jaxprm.hf.safetensors import weight_files
from jaxprm.search.methods import SearchSpec, search_specs
from jaxprm.workflow.context import flops_of_tokens

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "transformers", "textcraft", "numpy")

# The score of a trajectory that ended in an error: below any model's, and finite, as ranking wants it.
WORST = -1e9


class Results:
    """Reads a finished work directory; each property is a part of results.json."""

    def __init__(self, state):
        self.state = state
        self.experiment: config_lib.Experiment = state.experiment
        self.settings = self.experiment.search
        self.seeds = self.experiment.reward_seeds
        self.specs = search_specs(self.settings)
        self.folder: Path = state.work / "search"
        self.pool = self._by_task(self.folder / "pool.jsonl")
        self.tasks = list(self.pool)
        self.outcomes = np.array([[_outcome(line) for line in lines] for lines in self.pool.values()])
        self.labels = [model.label for model in self.experiment.reward_models]

    def _by_task(self, path: Path) -> dict[str, list[dict]]:
        grouped: dict[str, list[dict]] = defaultdict(list)
        for line in files.read_lines(path):
            grouped[line["task"]].append(line)
        return dict(grouped)

    def estimate(self, values) -> dict:
        return bootstrap(values, samples=self.experiment.bootstrap_samples, seed=self.experiment.seed)

    def guided(self, spec: SearchSpec, label: str) -> list[list[dict]]:
        """Lines of a guided search, [seeds][tasks]."""
        names = [spec.file_name(label, seed) for seed in self.seeds]
        return [list(files.read_lines(self.folder / f"{name}.jsonl")) for name in names]

    def outcome_table(self, spec: SearchSpec, label: str) -> np.ndarray:
        """Outcomes of a guided search, [seeds, tasks]."""
        return np.array([[line["outcome"] for line in lines] for lines in self.guided(spec, label)])

    def pool_values(self, label: str, seed: int) -> list[list[list[float]]]:
        """Values of the pool, [tasks][pool][steps]; a trajectory that ended in an error has none."""
        values = {
            line["id"]: line["values"] for line in files.read_lines(self.folder / f"values-pool-{label}-{seed}.jsonl")
        }
        return [[values.get(line["id"], [WORST]) for line in lines] for lines in self.pool.values()]

    def policy(self) -> dict:
        greedy = [_outcome(lines[0]) for lines in self._by_task(self.folder / "greedy.jsonl").values()]
        return {"sampled": self.estimate(self.outcomes.mean(1)), "greedy": self.estimate(greedy)}

    def oracle(self) -> dict:
        sizes = self.settings.best_of_n
        curve = oracle_curve(self.outcomes, sizes)
        return {str(n): self.estimate(curve[:, index]) for index, n in enumerate(sizes)}

    def curves(self, label: str) -> dict[str, np.ndarray]:
        """Expected outcome of the chosen one, [seeds, tasks, sizes]: by final step, and by the first steps alone."""
        finals, prefixes = [], []
        for seed in self.seeds:
            if label == "random":
                # Choosing blindly is choosing with all scores equal: exact, where drawn scores would add noise.
                final = prefix = np.zeros(self.outcomes.shape)
            else:
                values, cut = self.pool_values(label, seed), self.settings.prefix_steps
                final = np.array([[steps[-1] for steps in task] for task in values])
                prefix = np.array([[steps[:cut][-1] for steps in task] for task in values])
            finals.append(best_of_n_curve(final, self.outcomes, self.settings.best_of_n))
            prefixes.append(best_of_n_curve(prefix, self.outcomes, self.settings.prefix_best_of_n))
        return {"best_of_n": np.array(finals), "prefix_best_of_n": np.array(prefixes)}

    def methods(self) -> dict:
        found = {}
        for label in [*self.labels, "random"]:
            curves, settings = self.curves(label), self.settings
            found[label] = {
                "best_of_n": self._sized(curves["best_of_n"], settings.best_of_n),
                "prefix_best_of_n": self._sized(curves["prefix_best_of_n"], settings.prefix_best_of_n),
                "beam": {},
                "stepwise": {},
            }
            for spec in self.specs:
                found[label].setdefault(spec.kind, {})[spec.size] = self.estimate(self.outcome_table(spec, label))
            for how in settings.aggregations if label != "random" else ():
                found[label][f"best_of_n_{how}"] = self._sized(self.aggregated(label, how), settings.best_of_n)
        return found

    def aggregated(self, label: str, how: str) -> np.ndarray:
        """Expected outcome of best-of-N by another score than the final step's, [seeds, tasks, sizes]."""
        tables = [self.pool_values(label, seed) for seed in self.seeds]
        if how in VOTES:
            answers = [[line["meta"].get("answer") for line in lines] for lines in self.pool.values()]
            finals = ([[steps[-1] for steps in task] for task in table] for table in tables)
            options = {"sizes": self.settings.best_of_n, "seed": self.experiment.seed}
            return np.array([vote_curve(VOTES[how](one), answers, self.outcomes, **options) for one in finals])
        score = lambda steps: WORST if steps == [WORST] else AGGREGATIONS[how](steps)
        scores = np.array([[[score(steps) for steps in task] for task in table] for table in tables])
        return np.array([best_of_n_curve(one, self.outcomes, self.settings.best_of_n) for one in scores])

    def _sized(self, curve: np.ndarray, sizes) -> dict:
        return {str(n): self.estimate(curve[..., index]) for index, n in enumerate(sizes)}

    def paired(self) -> list[dict]:
        """Differences by task: every method against the plain policy, random guidance and the other methods."""
        columns: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for label in [*self.labels, "random"]:
            for spec in self.specs:
                columns[spec.at][label] = self.outcome_table(spec, label)
            curves = self.curves(label)
            columns[f"prefix_best_of_n {self.settings.prefix_best_of_n[-1]}"][label] = curves["prefix_best_of_n"][
                ..., -1
            ]
            columns[f"best_of_n {self.settings.best_of_n[-1]}"][label] = curves["best_of_n"][..., -1]
        rows = []
        for at, by_label in columns.items():
            by_label["policy"] = self.outcomes.mean(1)[None]
            for a in self.labels:
                others = ["policy", "random", *self.labels[self.labels.index(a) + 1 :]]
                for b in others:
                    difference = paired_difference(
                        by_label[a], by_label[b], samples=self.experiment.bootstrap_samples, seed=self.experiment.seed
                    )
                    rows.append({"a": a, "b": b, "at": at} | difference)
            difference = paired_difference(
                by_label["random"], by_label["policy"], samples=self.experiment.bootstrap_samples
            )
            rows.append({"a": "random", "b": "policy", "at": at} | difference)
        return rows

    def value_quality(self) -> dict[str, dict]:
        """Step values on the validation trajectories, per reward model over its seeds."""
        lines = {line["id"]: line for line in files.read_lines(self.state.work / "trajectories/validation.jsonl")}
        quality: dict[str, dict] = {"value_by_depth": {}, "calibration": {}, "validation": {}}
        options = {"samples": min(500, self.experiment.bootstrap_samples), "seed": self.experiment.seed}
        for label in self.labels:
            records = [self._records(label, seed, lines) for seed in self.seeds]
            quality["value_by_depth"][label] = value_metrics.value_by_depth(records, **options)
            quality["calibration"][label] = value_metrics.calibration(records, **options)
            quality["validation"][label] = value_metrics.validation(records, **options)
        return quality

    def _records(self, label: str, seed: int, lines: dict[str, dict]) -> value_metrics.StepRecords:
        columns: dict[str, list] = defaultdict(list)
        for scored in files.read_lines(self.folder / f"values-validation-{label}-{seed}.jsonl"):
            line, values = lines[scored["id"]], scored["values"]
            columns["values"] += values
            columns["targets"] += _returns(line, len(values))
            columns["depths"] += range(1, len(values) + 1)
            columns["tasks"] += [line["task"]] * len(values)
            columns["weights"] += [1.0] * len(values)
            columns["success"] += [line["success"]] * len(values)
        return value_metrics.StepRecords(**{name: np.array(column) for name, column in columns.items()})

    def training(self) -> dict:
        curves: dict[str, dict] = {}
        for model, seed in self.state.trained():
            path = self.state.model_directory(model.label, seed) / "metrics.jsonl"
            curves.setdefault(model.label, {})[str(seed)] = list(files.read_lines(path))
        return curves

    def budget(self) -> dict:
        """Searches against best-of-N at equal tokens and FLOPs, and the budget that a label needs for another's score.

        Only where the values of the pool tell how long its trajectories are.
        """
        sizes = self.settings.best_of_n
        options = {"samples": self.experiment.bootstrap_samples, "seed": self.experiment.seed}
        curves = {label: self.curves(label)["best_of_n"] for label in self.labels}
        needed = [
            {"a": a, "b": b, "at": sizes[-1]} | budget_ratio(curves[a], curves[b][..., -1], sizes, sizes[-1], **options)
            for a in self.labels
            for b in self.labels
            if a != b
        ]
        equal = []
        for label in self.labels:
            if (tokens := self._pool_tokens(label)) is None:
                continue
            finals = [[[steps[-1] for steps in task] for task in self.pool_values(label, seed)] for seed in self.seeds]
            for unit, (policy, reward) in {"tokens": (1.0, 1.0), "flops": flops_of_tokens(self.state)}.items():
                if not np.isfinite(policy):
                    continue
                cost = Cost(reward * tokens["once"], policy * tokens["sampled"] + reward * tokens["each"])
                for spec in self.specs:
                    lines = [line for seed in self.guided(spec, label) for line in seed]
                    spent = np.mean([policy * line["policy_tokens"] + reward * line["reward_tokens"] for line in lines])
                    found = equal_budget(
                        self.outcome_table(spec, label), finals, self.outcomes, budget=spent, cost=cost, **options
                    )
                    equal.append({"label": label, "at": spec.at, "unit": unit, "budget": float(spent)} | found)
        return {"equal": equal, "needed": needed}

    def _pool_tokens(self, label: str) -> dict[str, float] | None:
        """Mean tokens of best-of-N on a task: the prompt, read once; read and sampled for each candidate."""
        lines = list(files.read_lines(self.folder / f"values-pool-{label}-{self.seeds[0]}.jsonl"))
        if not lines or any("tokens" not in line for line in lines):
            return None
        sampled = [line["meta"]["tokens"] for some in self.pool.values() for line in some]
        return {
            "once": float(np.mean([line["prompt_tokens"] for line in lines])),
            "each": float(np.mean([line["tokens"] - line["prompt_tokens"] for line in lines])),
            "sampled": float(np.mean(sampled)),
        }

    def compute(self) -> dict:
        """Counted per task, means over tasks and seeds; FLOPs by formula from the counts."""
        policy, per_token = flops_of_tokens(self.state)
        sampled = [line for lines in self.pool.values() for line in lines]
        mean = np.mean([line["meta"]["tokens"] for line in sampled])
        steps = np.mean([sum(m["role"] == "assistant" for m in line["messages"]) for line in sampled])
        table: dict[str, Any] = {"unit": "per task", "flops_per_token": per_token, "methods": {}}
        table["methods"]["policy"] = {"1": _cost(mean, 0, steps, policy, per_token)}
        for label in [*self.labels, "random"]:
            sizes = {}
            for spec in self.specs:
                lines, key = [line for seed in self.guided(spec, label) for line in seed], spec.cost_key
                reward = 0.0 if label == "random" else np.mean([line["reward_tokens"] for line in lines])
                generated = np.mean([line["policy_tokens"] for line in lines])
                acted = np.mean([line["environment_steps"] for line in lines])
                sizes[key] = _cost(generated, reward, acted, policy, per_token)
                sizes[key]["duplicates_merged"] = float(
                    np.mean([line["merged"] / max(1, line["proposed"]) for line in lines])
                )
                if label != "random" and all("reward_encoded" in line for line in lines):
                    encoded = np.mean([line["reward_encoded"] for line in lines])
                    sizes[key]["reward_encoded_ratio"] = float(encoded / max(1.0, reward))
                if ended := sum("ended" in line for line in lines):
                    sizes[key]["ended_early"] = ended
                sizes[key]["failed"] = int(sum(line.get("failed", 0) for line in lines))
                sizes[key]["errors"] = int(sum(line["errors"] for line in lines))
            table["methods"][label] = sizes
        return table

    def data(self) -> dict:
        train = list(files.read_lines(self.state.work / "trajectories/train.jsonl"))
        validation = list(files.read_lines(self.state.work / "trajectories/validation.jsonl"))
        unique = len({(line["task"], files.line(line["messages"])) for line in train})
        splits = {
            "train": train,
            "validation": validation,
            self.settings.split: [x for v in self.pool.values() for x in v],
        }
        return {
            "trajectories": len(train),
            "unique": unique,
            "success_rate": float(np.mean([_outcome(line) for line in train])),
            "errors": sum(line.get("ended") == "error" for line in train),
            "tasks": {name: len({line["task"] for line in lines}) for name, lines in splits.items()},
        }

    def provenance(self) -> dict:
        prints = {
            "policy": self.state.policy_identity,
            "config": config_lib.fingerprint(config_lib.to_dict(self.experiment)),
        }
        prints["trajectories"] = files.sha256(self.state.work / "trajectories/train.jsonl")
        for model, seed in self.state.trained():
            directory = self.state.model_directory(model.label, seed) / "model"
            hashes = [files.sha256(directory / name) for name in weight_files(directory)]
            prints[f"{model.label}/{seed}"] = hashes[0] if len(hashes) == 1 else config_lib.fingerprint(hashes)
        return {
            "config": config_lib.to_dict(self.experiment),
            "seeds": list(self.seeds),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
            "fingerprints": prints,
        }


def write_results(state) -> Path:
    """Computes and writes WORKDIR/results.json, and the trees that the report shows."""
    results = Results(state)
    value = {
        "name": state.experiment.name,
        "policy": results.policy(),
        "oracle": results.oracle(),
        "methods": results.methods(),
        "paired": results.paired(),
        **results.value_quality(),
        "training": results.training(),
        "data": results.data(),
        "compute": results.compute(),
        "budget": results.budget(),
        "seconds": state.work.seconds(),
        "provenance": results.provenance(),
    }
    files.write_json(state.work / "results.json", files.without_nan(value))
    trees = []
    for path in sorted((state.work / "search").glob("*.jsonl")):
        if path.name.startswith(("beam-", "stepwise-", "diverse-", "lookahead-", "mcts-")):
            trees += [line["tree"] for line in files.read_lines(path) if "tree" in line]
    files.write_atomic(state.work / "search/trees.json", json.dumps(trees, ensure_ascii=False))
    return state.work / "results.json"


def _outcome(line: dict) -> float:
    """An episode that ended in an error did not succeed, whoever searched for it."""
    return float(line.get("outcome") or 0.0)


def _returns(line: dict, steps: int) -> list[float]:
    rewards = line.get("rewards")
    return np.cumsum(rewards[::-1])[::-1].tolist() if rewards else [line["outcome"]] * steps


def _cost(policy_tokens: float, reward_tokens: float, steps: float, policy_flops: float, reward_flops: float) -> dict:
    return {
        "policy_tokens": float(policy_tokens),
        "reward_tokens": float(reward_tokens),
        "environment_steps": float(steps),
        "flops": float(policy_tokens * policy_flops + reward_tokens * reward_flops),
    }
