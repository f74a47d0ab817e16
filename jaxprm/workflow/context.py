"""What every stage of a run needs: the experiment, its work directory, its policy and environments."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxprm import config as config_lib
from jaxprm import environments, files
from jaxprm.environments.worker import Workers
from jaxprm.errors import UserError
from jaxprm.hf import reader
from jaxprm.policies import loading
from jaxprm.training.flops import flops_per_token
from jaxprm.workflow import user_files
from jaxprm.workflow.workdir import WorkDirectory, identity


def flops_of_tokens(state) -> tuple[float, float]:
    """Of a run: a token of the policy's, not a number where its size is not known, and one of the reward models'."""
    settings = state.experiment.policy
    reward = flops_per_token(reader.read_config(state.base_directory)[0])
    if not loading.is_directory(settings):
        return math.nan, reward
    return flops_per_token(reader.read_config(loading.policy_directory(settings))[0]), reward


@dataclass(frozen=True)
class Run:
    """What every stage needs to know; models are loaded when first used."""

    experiment: config_lib.Experiment
    work: WorkDirectory
    profile: tuple[int, int] | None = None

    @functools.cached_property
    def policy(self):
        return loading.load(self.experiment)

    @functools.cached_property
    def base_directory(self) -> Path:
        """What reward models start from, and whose tokenizer they read with."""
        return loading.base_directory(self.experiment)

    @functools.cached_property
    def policy_identity(self) -> str:
        """Of a directory its files; a policy that is none is what it is called."""
        settings = self.experiment.policy
        if loading.is_directory(settings):
            return _model_identity(loading.policy_directory(settings), settings.chat_template)
        return identity(self._policy_inputs)

    def close(self) -> None:
        """Lets go of what the policy holds, and says what could not be had from it, or from environments."""
        if "policy" in vars(self) and hasattr(self.policy, "close"):
            self.policy.close()
            usage = getattr(self.policy, "usage", {})
            if usage.get("retries") or usage.get("failures"):
                counted = ", ".join(f"{value} {name}" for name, value in usage.items())
                print(f"policy: {counted}", file=sys.stderr)
        if ended := getattr(vars(self).get("make_environment"), "ended", None):
            counted = ", ".join(f"{count} {reason}" for reason, count in sorted(ended.items()))
            print(f"environment: processes replaced: {counted}", file=sys.stderr)

    @functools.cached_property
    def make_environment(self) -> Callable[[], environments.Environment]:
        settings = self.experiment.environment
        if not settings.workers:
            return functools.partial(environments.create, settings.name, settings.arguments)
        memory = None if settings.memory_mb is None else settings.memory_mb << 20
        return Workers(
            settings.name, settings.arguments, at_once=settings.workers, timeout=settings.timeout, memory=memory
        )

    def tasks(self, split: str, limit: int | None) -> list[str]:
        """The first tasks of a split, spread evenly over it: a split may be ordered by difficulty."""
        environment = self.make_environment()
        try:
            tasks = list(environment.tasks(split))
        finally:
            environment.close()
        if not tasks:
            raise UserError(f"environment {self.experiment.environment.name}: split {split} has no task")
        if limit is None or limit >= len(tasks):
            return tasks
        return [tasks[index * len(tasks) // limit] for index in range(limit)]

    @functools.cached_property
    def _policy_inputs(self) -> dict[str, Any]:
        """What its draws depend on. How many are in flight, and where a server stands, change the speed alone."""
        given, settings = config_lib.to_dict(self.experiment)["policy"], self.experiment.policy
        found = {name: given[name] for name in ("max_action_tokens", "max_tokens")}
        if loading.is_directory(settings):
            return found | {"path": self.policy_identity}
        if settings.endpoint is not None:
            return found | {"endpoint": {name: given["endpoint"][name] for name in ("model", "extra_body")}}
        return found | {"path": settings.path, "arguments": given["arguments"]}

    @property
    def _environment_inputs(self) -> dict[str, Any]:
        """Where and how many at a time they run changes the speed alone."""
        given = config_lib.to_dict(self.experiment)["environment"]
        return {name: given[name] for name in ("name", "arguments")}

    @property
    def collect_inputs(self) -> dict[str, Any]:
        plain = config_lib.to_dict(self.experiment)
        collection = plain["collection"]
        share = collection.pop("validation_share")
        del collection["files"], collection["skip_bad"]  # what is skipped, nobody could have finished with
        if self.experiment.collection.files:
            return {"files": self._files_identity, "validation_share": share, "seed": plain["seed"]}
        return {
            "environment": self._environment_inputs,
            "policy": self._policy_inputs,
            "collection": collection,
            "seed": plain["seed"],
        }

    @functools.cached_property
    def _files_identity(self) -> list[dict[str, str | None]]:
        return user_files.identity(self.experiment.collection.files)

    @property
    def build_inputs(self) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        return {
            "trajectories": identity(self.collect_inputs),
            "data": {name: data[name] for name in ("shards", "length", "too_long")},
        } | self._base_inputs

    @functools.cached_property
    def _base_inputs(self) -> dict[str, Any]:
        """Sampled trajectories depend on the policy, whose tokenizer may encode them; a user's own do not."""
        directory, template = self.base_directory, self.experiment.policy.chat_template  # or no work is begun
        if self.experiment.base_model is None and not self.experiment.collection.files:
            return {}
        return {"base_model": _model_identity(directory, template)}

    def train_inputs(self, model: config_lib.RewardModelConfig, seed: int) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        del data["skip_bad"]  # what is skipped is part of a training's own identity
        return {
            "shards": identity(self.build_inputs),
            "data": data,
            "reward_model": config_lib.fingerprint_fields(model),
            "seed": seed,
        }

    @property
    def search_inputs(self) -> dict[str, Any]:
        """What every search depends on; each adds its own."""
        plain = config_lib.to_dict(self.experiment)
        return {
            "environment": self._environment_inputs,
            "policy": self._policy_inputs,
            "seed": plain["seed"],
            "search": {name: plain["search"][name] for name in ("split", "tasks", "temperature")},
        }

    def model_directory(self, label: str, seed: int) -> Path:
        return self.work / f"reward_models/{label}/seed-{seed}"

    def trained(self) -> list[tuple[config_lib.RewardModelConfig, int]]:
        return [(model, seed) for model in self.experiment.reward_models for seed in self.experiment.reward_seeds]


def _model_identity(directory: Path, template: str) -> str:
    """Of a model's files, and of a chat template that is not its own."""
    from data_pipeline.chat_template import read_template
    from jaxprm.hf.safetensors import model_files

    text = read_template(template)
    found = [files.sha256(directory / name) for name in model_files(directory)]
    return identity(found if text is None else [*found, text])
