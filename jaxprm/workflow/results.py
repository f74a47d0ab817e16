"""results.json: every number of a run, computed from the files of its stages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.metadata import Metadata
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.evaluation import value_metrics
from jaxprm.evaluation.best_of_n import (
    AGGREGATIONS,
    OF_PROBABILITIES,
    VOTES,
    Cost,
    budget_ratio,
    equal_budget,
    vote_curve,
)
from jaxprm.evaluation.statistics import best_of_n_curve, bootstrap, oracle_curve, paired_difference
from jaxprm.hf.safetensors import weight_files
from jaxprm.search.methods import SEARCHES, SearchSpec, search_specs
from jaxprm.workflow.context import Run, flops_of_log_ratio, flops_of_tokens
from jaxprm.workflow.search_stage import PROGRESS_ADVANTAGE

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "transformers", "textcraft", "numpy")

_REPAIR = "copy it again, or delete it and run the same command"

# Score of a trajectory that ended in an error: below any model's, and finite, because ranking needs finite scores.
WORST = -1e9


def write_results(run: Run) -> Path:
    """Writes WORKDIR/results.json, and the trees that the report shows; returns the path of the first."""
    results = ResultsBuilder(run)
    value = {
        "name": run.experiment.name,
        "policy": results.policy(),
        "oracle": results.oracle(),
        "methods": results.methods(),
        "paired": results.paired(),
        **results.value_quality(),
        "training": results.training(),
        "data": results.data(),
        "compute": results.compute(),
        "budget": results.budget(),
        "seconds": run.work.seconds(),
        "provenance": results.provenance(),
    }
    # Only what the report cannot know by itself: the words for searches from outside the package.
    if custom := results.custom_searches():
        value["searches"] = custom
    files.write_json(run.work / "results.json", files.without_nan(value))
    prefixes = tuple(f"{kind}-" for kind in (*SEARCHES, *custom))
    trees = []
    # Sorted, since the order of a directory listing depends on the file system. Chosen by name, so that the files of
    # pools and values, which have no trees, are not parsed.
    for path in sorted((run.work / "search").glob("*.jsonl")):
        if path.name.startswith(prefixes):
            trees += [line["tree"] for line in files.read_lines(path) if "tree" in line]
    files.write_atomic(run.work / "search/trees.json", json.dumps(trees, ensure_ascii=False))
    return run.work / "results.json"


class ResultsBuilder:
    """Computes the parts of results.json, a method for each, from a finished work directory.

    Attributes:
        pool: lines of the pool by task: the trajectories that best-of-N chooses from.
        outcomes: their outcomes in [0, 1], [tasks, pool].
        labels: those of the reward models.
        scored: `labels`, and the progress-advantage baseline if the run has it.
        guides: `scored` and "random", the control.
    """

    def __init__(self, run: Run):
        self.run = run
        self.experiment: config_lib.Experiment = run.experiment
        self.settings = self.experiment.search
        self.seeds = self.experiment.reward_seeds
        self.specs = search_specs(self.settings)
        self.folder: Path = run.work / "search"
        self.pool = self._by_task(self.folder / "pool.jsonl", self.settings.pool)
        self.outcomes = np.array([[_outcome(line) for line in lines] for lines in self.pool.values()])
        self.labels = [model.label for model in self.experiment.reward_models]
        self.scored = [*self.labels]
        if self.settings.progress_advantage is not None:
            self.scored.append(PROGRESS_ADVANTAGE)
        self.guides = [*self.scored, "random"]

    # Success on the held-out tasks.

    def policy(self) -> dict:
        """Success of the plain policy, sampled and greedy."""
        greedy = [_outcome(lines[0]) for lines in self._by_task(self.folder / "greedy.jsonl", 1).values()]
        return {"sampled": self._estimate(self.outcomes.mean(1)), "greedy": self._estimate(greedy)}

    def oracle(self) -> dict:
        """Success of choosing the best outcome of N, by N."""
        sizes = self.settings.best_of_n
        return self._by_size(oracle_curve(self.outcomes, sizes), sizes)

    def methods(self) -> dict:
        """Success by label, search and size."""
        settings, table = self.settings, {}
        for label in self.guides:
            curves = self._curves(label)
            table[label] = {
                "best_of_n": self._by_size(curves["best_of_n"], settings.best_of_n),
                "prefix_best_of_n": self._by_size(curves["prefix_best_of_n"], settings.prefix_best_of_n),
                "beam": {},
                "stepwise": {},
            }
            for spec in self.specs:
                outcomes = self._searched_outcomes(spec, label)
                table[label].setdefault(spec.kind, {})[spec.size] = self._estimate(outcomes)
            for how in self._aggregations(label):
                table[label][f"best_of_n_{how}"] = self._by_size(self._aggregated(label, how), settings.best_of_n)
        return table

    def paired(self) -> list[dict]:
        """Differences by task: each label against the plain policy, random scores and the labels after it."""
        outcomes: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for label in self.guides:
            for spec in self.specs:
                outcomes[spec.at][label] = self._searched_outcomes(spec, label)
            curves = self._curves(label)
            for name in ("prefix_best_of_n", "best_of_n"):
                largest = getattr(self.settings, name)[-1]
                outcomes[f"{name} {largest}"][label] = curves[name][..., -1]
        rows = []
        for at, by_label in outcomes.items():
            # A single row: the plain policy has no reward model, so it is the same for all of their seeds.
            by_label["policy"] = self.outcomes.mean(1)[None]
            for index, a in enumerate(self.scored):
                for b in ["policy", "random", *self.scored[index + 1 :]]:
                    difference = paired_difference(by_label[a], by_label[b], **self._bootstrap_options)
                    rows.append({"a": a, "b": b, "at": at} | difference)
            # This row uses the default seed, not the experiment's: with another, existing results would change.
            samples = self.experiment.bootstrap_samples
            difference = paired_difference(by_label["random"], by_label["policy"], samples=samples)
            rows.append({"a": "random", "b": "policy", "at": at} | difference)
        return rows

    # Quality of the step values.

    def value_quality(self) -> dict[str, dict]:
        """Metrics of step values on the validation trajectories with an outcome, by label, over the seeds.

        Pairs, and rows with step labels alone, have none. A label without any such trajectory is left out.
        """
        lines = {line["id"]: line for line in files.read_lines(self.run.work / "trajectories/validation.jsonl")}
        quality: dict[str, dict] = {"value_by_depth": {}, "calibration": {}, "validation": {}}
        options = {"samples": min(500, self.experiment.bootstrap_samples), "seed": self.experiment.seed}
        for label in self.labels:
            records = [self._step_records(label, seed, lines) for seed in self.seeds]
            if not any(len(record.values) for record in records):
                continue
            quality["value_by_depth"][label] = value_metrics.value_by_depth(records, **options)
            quality["calibration"][label] = value_metrics.calibration(records, **options)
            quality["validation"][label] = value_metrics.validation(records, **options)
        return quality

    # What was spent.

    def compute(self) -> dict:
        """Tokens, environment steps and FLOPs per task: means over tasks and seeds, and FLOPs computed from them."""
        policy_flops, reward_flops = flops_of_tokens(self.run)
        sampled = [line for lines in self.pool.values() for line in lines]
        tokens = np.mean([line["meta"]["tokens"] for line in sampled])
        steps = np.mean([sum(m["role"] == "assistant" for m in line["messages"]) for line in sampled])
        table: dict[str, Any] = {"unit": "per task", "flops_per_token": reward_flops, "methods": {}}
        table["methods"]["policy"] = {"1": _cost(tokens, 0, steps, policy_flops, reward_flops)}
        for label in self.guides:
            table["methods"][label] = {
                spec.cost_key: self._search_cost(spec, label, policy_flops, self._read_flops(label, reward_flops))
                for spec in self.specs
            }
        return table

    def _read_flops(self, label: str, reward_flops: float) -> float:
        """Forward FLOPs of a token that the guide of this label reads."""
        return flops_of_log_ratio(self.run) if label == PROGRESS_ADVANTAGE else reward_flops

    def budget(self) -> dict:
        """Searches of reward models against best-of-N at equal cost ("equal"), and the budget at which best-of-N by one
        label reaches the score of another ("needed").

        Labels whose pool values do not record token counts, as those of old runs, are left out of "equal".
        """
        sizes = self.settings.best_of_n
        curves = {label: self._curves(label)["best_of_n"] for label in self.labels}
        needed = [
            {"a": a, "b": b, "at": sizes[-1]}
            | budget_ratio(curves[a], curves[b][..., -1], sizes, sizes[-1], **self._bootstrap_options)
            for a in self.labels
            for b in self.labels
            if a != b
        ]
        equal = []
        for label in self.labels:
            if (tokens := self._pool_tokens(label)) is None:
                continue
            finals = [[[steps[-1] for steps in task] for task in self._pool_values(label, seed)] for seed in self.seeds]
            for unit, (policy, reward) in {"tokens": (1.0, 1.0), "flops": flops_of_tokens(self.run)}.items():
                # The policy's size is unknown, and so are its FLOPs.
                if not np.isfinite(policy):
                    continue
                cost = Cost(reward * tokens["once"], policy * tokens["sampled"] + reward * tokens["each"])
                for spec in self.specs:
                    lines = self._all_lines(spec, label)
                    spent = np.mean([policy * line["policy_tokens"] + reward * line["reward_tokens"] for line in lines])
                    outcomes = self._searched_outcomes(spec, label)
                    comparison = equal_budget(
                        outcomes, finals, self.outcomes, budget=spent, cost=cost, **self._bootstrap_options
                    )
                    equal.append({"label": label, "at": spec.at, "unit": unit, "budget": float(spent)} | comparison)
        return {"equal": equal, "needed": needed}

    # Where the numbers come from.

    def training(self) -> dict:
        """Training metrics, by label and seed."""
        curves: dict[str, dict] = {}
        for model, seed in self.run.trained():
            path = self.run.model_directory(model.label, seed) / "metrics.jsonl"
            lines = list(files.read_lines(path))
            if not lines:
                raise UserError(f"{path}: is empty; copy it again, or delete {path.parent} to train again")
            curves.setdefault(model.label, {})[str(seed)] = lines
        return curves

    def data(self) -> dict:
        """Counts of trajectories and tasks."""
        train, validation = self._trajectories("train"), self._trajectories("validation")
        pool = [line for lines in self.pool.values() for line in lines]
        splits = {"train": train, "validation": validation, self.settings.split: pool}
        return {
            "trajectories": len(train),
            "unique": len({(line["task"], files.line(line["messages"])) for line in train}),
            "success_rate": float(np.mean([_outcome(line) for line in train])),
            "errors": sum(line.get("ended") == "error" for line in train),
            "tasks": {name: len({line["task"] for line in lines}) for name, lines in splits.items()},
        }

    def provenance(self) -> dict:
        """The config, the versions of packages, and fingerprints of policy, trajectories and reward models."""
        prints = {
            "policy": self.run.policy_identity,
            "config": config_lib.fingerprint(config_lib.to_dict(self.experiment)),
            "trajectories": files.sha256(self.run.work / "trajectories/train.jsonl"),
        }
        for model, seed in self.run.trained():
            directory = self.run.model_directory(model.label, seed) / "model"
            hashes = [files.sha256(directory / name) for name in weight_files(directory)]
            prints[f"{model.label}/{seed}"] = hashes[0] if len(hashes) == 1 else config_lib.fingerprint(hashes)
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {
            "config": config_lib.to_dict(self.experiment),
            "seeds": list(self.seeds),
            "versions": {"python": platform.python_version()} | versions,
            "fingerprints": prints,
        }

    def custom_searches(self) -> dict[str, dict]:
        """Words for the run's searches from outside the package, by kind."""
        methods = [spec.method for spec in self.specs if spec.method.config_field is None]
        return {method.kind: {"label": method.label, "card": method.card} for method in methods}

    # Files of the search stage as arrays.

    def _seeds(self, label: str) -> Sequence[int]:
        """Seeds that a guide was searched with: nothing of the progress-advantage baseline depends on one."""
        return self.seeds[:1] if label == PROGRESS_ADVANTAGE else self.seeds

    # Records of earlier versions have no digests of these files, so what is counted on is checked here.

    def _by_task(self, path: Path, count: int) -> dict[str, list[dict]]:
        """Lines by task. Raises UserError unless every task has `count`."""
        grouped: dict[str, list[dict]] = defaultdict(list)
        for line in files.read_lines(path):
            grouped[line["task"]].append(line)
        for task, lines in grouped.items():
            if len(lines) != count:
                raise UserError(f"{path}: task {task} has {len(lines)} trajectories, not {count}; {_REPAIR}")
        if not grouped:
            raise UserError(f"{path}: is empty; {_REPAIR}")
        return dict(grouped)

    def _trajectories(self, split: str) -> list[dict]:
        """The trajectories that the shards were built from. Raises UserError if their number is another."""
        path, metadata = self.run.work / f"trajectories/{split}.jsonl", Metadata.load(self.run.work / "shards")
        lines, rows = list(files.read_lines(path)), metadata.splits[split].rows
        # Rows that were left out as bad are not counted by split.
        if not metadata.skipped and len(lines) != rows:
            raise UserError(f"{path}: has {len(lines)} trajectories, the shards were built from {rows}; {_REPAIR}")
        return lines

    def _searched(self, spec: SearchSpec, label: str) -> list[list[dict]]:
        """Lines of a guided search, [seeds][tasks]."""
        paths = [self.folder / f"{spec.file_name(label, seed)}.jsonl" for seed in self._seeds(label)]
        searched = [list(files.read_lines(path)) for path in paths]
        for path, lines in zip(paths, searched, strict=True):
            if [line["task"] for line in lines] != list(self.pool):
                raise UserError(f"{path}: has {len(lines)} tasks, not the {len(self.pool)} of pool.jsonl; {_REPAIR}")
        return searched

    def _all_lines(self, spec: SearchSpec, label: str) -> list[dict]:
        return [line for lines in self._searched(spec, label) for line in lines]

    def _searched_outcomes(self, spec: SearchSpec, label: str) -> np.ndarray:
        """Outcomes of a guided search, [seeds, tasks]."""
        return np.array([[line["outcome"] for line in lines] for lines in self._searched(spec, label)])

    def _pool_values(self, label: str, seed: int) -> list[list[list[float]]]:
        """Step values of the pool, [tasks][pool][steps]; [WORST] for a trajectory that failed or cannot be scored."""
        path = self.folder / f"values-pool-{label}-{seed}.jsonl"
        scored = {line["id"]: [WORST] if "error" in line else line["values"] for line in files.read_lines(path)}

        def of(line: dict) -> list[float]:
            if line.get("ended") == "error":
                return [WORST]
            if not scored.get(line["id"]):
                raise UserError(f"{path}: has no values of {line['id']}; {_REPAIR}")
            return scored[line["id"]]

        return [[of(line) for line in lines] for lines in self.pool.values()]

    def _pool_tokens(self, label: str) -> dict[str, float] | None:
        """Mean tokens of best-of-N: read "once" for a task's prompt, read for "each" candidate, and "sampled"."""
        path = self.folder / f"values-pool-{label}-{self.seeds[0]}.jsonl"
        lines = [line for line in files.read_lines(path) if "error" not in line]
        if not lines or any("tokens" not in line for line in lines):
            return None
        sampled = [line["meta"]["tokens"] for task_lines in self.pool.values() for line in task_lines]
        return {
            "once": float(np.mean([line["prompt_tokens"] for line in lines])),
            "each": float(np.mean([line["tokens"] - line["prompt_tokens"] for line in lines])),
            "sampled": float(np.mean(sampled)),
        }

    def _step_records(self, label: str, seed: int, lines: dict[str, dict]) -> value_metrics.StepRecords:
        columns: dict[str, list] = {field.name: [] for field in dataclasses.fields(value_metrics.StepRecords)}
        for scored in files.read_lines(self.folder / f"values-validation-{label}-{seed}.jsonl"):
            if "error" in scored:
                continue
            line, values = lines[scored["id"]], scored["values"]
            if line.get("success") is None or (line.get("outcome") is None and not line.get("rewards")):
                continue
            columns["values"] += values
            columns["targets"] += _returns(line, len(values))
            columns["depths"] += range(1, len(values) + 1)
            columns["tasks"] += [line["task"]] * len(values)
            columns["weights"] += [1.0] * len(values)
            columns["success"] += [line["success"]] * len(values)
        return value_metrics.StepRecords(**{name: np.array(column) for name, column in columns.items()})

    # Estimates from those arrays.

    @property
    def _bootstrap_options(self) -> dict[str, int]:
        return {"samples": self.experiment.bootstrap_samples, "seed": self.experiment.seed}

    def _estimate(self, values) -> dict:
        """Mean with its 95 % interval over tasks."""
        return bootstrap(values, **self._bootstrap_options)

    def _by_size(self, curve: np.ndarray, sizes: Sequence[int]) -> dict:
        return {str(n): self._estimate(curve[..., index]) for index, n in enumerate(sizes)}

    def _curves(self, label: str) -> dict[str, np.ndarray]:
        """Expected outcome of best-of-N, [seeds, tasks, sizes]: by the value of the final step, and by that of the last
        of the first `prefix_steps` steps.
        """
        finals, prefixes = [], []
        for seed in self._seeds(label):
            if label == "random":
                # Equal scores are a uniform choice, computed exactly; drawn scores would add noise.
                final = prefix = np.zeros(self.outcomes.shape)
            else:
                values, cut = self._pool_values(label, seed), self.settings.prefix_steps
                final = np.array([[steps[-1] for steps in task] for task in values])
                prefix = np.array([[steps[:cut][-1] for steps in task] for task in values])
            finals.append(best_of_n_curve(final, self.outcomes, self.settings.best_of_n))
            prefixes.append(best_of_n_curve(prefix, self.outcomes, self.settings.prefix_best_of_n))
        return {"best_of_n": np.array(finals), "prefix_best_of_n": np.array(prefixes)}

    def _aggregations(self, label: str) -> list[str]:
        """The aggregations of `search.aggregations` that mean something for the scores of a label."""
        if label == "random":
            return []
        left_out = OF_PROBABILITIES if label == PROGRESS_ADVANTAGE else frozenset()
        return [how for how in self.settings.aggregations if how not in left_out]

    def _aggregated(self, label: str, how: str) -> np.ndarray:
        """Expected outcome of best-of-N by a vote or by another score than the final step's, [seeds, tasks, sizes]."""
        tables = [self._pool_values(label, seed) for seed in self._seeds(label)]
        sizes = self.settings.best_of_n
        if how in VOTES:
            answers = [[line["meta"].get("answer") for line in lines] for lines in self.pool.values()]
            finals = ([[steps[-1] for steps in task] for task in table] for table in tables)
            options = {"sizes": sizes, "seed": self.experiment.seed}
            return np.array([vote_curve(VOTES[how](final), answers, self.outcomes, **options) for final in finals])
        # Not aggregated: WORST as a factor of a product would count as 0, which is not worse than others.
        score = lambda steps: WORST if steps == [WORST] else AGGREGATIONS[how](steps)
        scores = np.array([[[score(steps) for steps in task] for task in table] for table in tables])
        return np.array([best_of_n_curve(table, self.outcomes, sizes) for table in scores])

    def _search_cost(self, spec: SearchSpec, label: str, policy_flops: float, reward_flops: float) -> dict:
        lines = self._all_lines(spec, label)
        mean = lambda name: np.mean([line[name] for line in lines])
        # Random scores read nothing.
        read = 0.0 if label == "random" else mean("reward_tokens")
        cost = _cost(mean("policy_tokens"), read, mean("environment_steps"), policy_flops, reward_flops)
        merged = [line["merged"] / max(1, line["proposed"]) for line in lines]
        cost["duplicates_merged"] = float(np.mean(merged))
        # Searches from before a count was recorded lack it.
        if label != "random" and all("reward_encoded" in line for line in lines):
            cost["reward_encoded_ratio"] = float(mean("reward_encoded") / max(1.0, read))
        if ended := sum("ended" in line for line in lines):
            cost["ended_early"] = ended
        if unscored := sum(line.get("unscored", 0) for line in lines):
            cost["unscored"] = int(unscored)
        cost["failed"] = int(sum(line.get("failed", 0) for line in lines))
        cost["errors"] = int(sum(line["errors"] for line in lines))
        return cost


def _outcome(line: dict) -> float:
    """The outcome of an episode; 0 for one that ended in an error, which has none."""
    return float(line.get("outcome") or 0.0)


def _returns(line: dict, steps: int) -> list[float]:
    """R_t = sum_{k >= t} r_k of every step; with an outcome alone, that outcome at every step."""
    rewards = line.get("rewards")
    return np.cumsum(rewards[::-1])[::-1].tolist() if rewards else [line["outcome"]] * steps


def _cost(policy_tokens: float, reward_tokens: float, steps: float, policy_flops: float, reward_flops: float) -> dict:
    return {
        "policy_tokens": float(policy_tokens),
        "reward_tokens": float(reward_tokens),
        "environment_steps": float(steps),
        "flops": float(policy_tokens * policy_flops + reward_tokens * reward_flops),
    }
