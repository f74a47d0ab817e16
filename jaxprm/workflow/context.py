"""What all stages of a run share: the experiment, its work directory, policy and environments, and recorded inputs."""

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
from jaxprm.hf.config import is_reward_model
from jaxprm.policies import loading
from jaxprm.training.flops import flops_per_token
from jaxprm.workflow import user_files
from jaxprm.workflow.workdir import WorkDirectory, identity


@dataclass(frozen=True)
class Run:
    """An experiment in a work directory. Models and environments are loaded when they are first used.

    The `*_inputs` are what a stage's result depends on, as plain JSON. They are recorded in the work directory and
    compared when it is used again, so settings that change only the speed are left out.

    Attributes:
        profile: first and last training step to profile, or None.
    """

    experiment: config_lib.Experiment
    work: WorkDirectory
    profile: tuple[int, int] | None = None

    # Policy, environments and models.

    @functools.cached_property
    def policy(self):
        return loading.load(self.experiment)

    @functools.cached_property
    def base_directory(self) -> Path:
        """Directory of the model whose weights and tokenizer the reward models start from."""
        return loading.base_directory(self.experiment)

    @property
    def progress_advantage(self) -> tuple[Path, Path] | None:
        """Directories of the policy and the reference of the baseline, or None if the config has none.

        Raises UserError if one is missing.
        """
        settings = self.experiment.search.progress_advantage
        if settings is None:
            return None
        reference = loading.model_directory("reference", "search.progress_advantage.reference", settings.reference)
        if settings.policy is not None:
            field = "search.progress_advantage.policy"
            return loading.model_directory("policy", field, settings.policy), reference
        if not loading.is_directory(self.experiment.policy):
            raise UserError(
                "search.progress_advantage: the run's policy has no directory with weights; set "
                "search.progress_advantage.policy to one"
            )
        return loading.policy_directory(self.experiment.policy), reference

    @property
    def environment_arguments(self) -> dict[str, Any]:
        """What the environment's constructor gets: the config's arguments, and instructions for a served policy."""
        return self._default_arguments | self.experiment.environment.arguments

    @property
    def _default_arguments(self) -> dict[str, Any]:
        # A served policy was not trained on the environment: only the prompt tells it what an action looks like.
        served = self.experiment.policy.endpoint is not None
        return {"instructions": True} if served and self.experiment.environment.name in environments.INSTRUCTED else {}

    @functools.cached_property
    def make_environment(self) -> Callable[[], environments.Environment]:
        settings = self.experiment.environment
        if not settings.workers:
            return functools.partial(environments.create, settings.name, self.environment_arguments)
        memory = None if settings.memory_mb is None else settings.memory_mb << 20
        return Workers(
            settings.name, self.environment_arguments, at_once=settings.workers, timeout=settings.timeout, memory=memory
        )

    def close(self) -> None:
        """Closes the policy and prints its retries and failures, and how many environment workers were replaced."""
        # vars() holds the cached properties that were used: nothing is loaded here in order to be closed.
        if "policy" in vars(self) and hasattr(self.policy, "close"):
            self.policy.close()
            usage = getattr(self.policy, "usage", {})
            if usage.get("retries") or usage.get("failures"):
                counts = ", ".join(f"{value} {name}" for name, value in usage.items())
                print(f"policy: {counts}", file=sys.stderr)
        if ended := getattr(vars(self).get("make_environment"), "ended", None):
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(ended.items()))
            print(f"environment: workers replaced: {counts}", file=sys.stderr)

    def tasks(self, split: str, limit: int | None) -> list[str]:
        """Tasks of a split: all of them, or `limit` spread evenly over it, since a split may be ordered by difficulty.

        Raises UserError if the split is empty.
        """
        environment = self.make_environment()
        try:
            tasks = list(environment.tasks(split))
        finally:
            environment.close()
        if not tasks:
            raise UserError(f"environment {self.experiment.environment.name}: split {split} has no tasks; add some")
        if limit is None or limit >= len(tasks):
            return tasks
        return [tasks[index * len(tasks) // limit] for index in range(limit)]

    def model_directory(self, label: str, seed: int) -> Path:
        return self.work / f"reward_models/{label}/seed-{seed}"

    def trained(self) -> list[tuple[config_lib.RewardModelConfig, int]]:
        """Every reward model with every seed, in training order."""
        return [(model, seed) for model in self.experiment.reward_models for seed in self.experiment.reward_seeds]

    # Recorded inputs, stage by stage.

    @property
    def collect_inputs(self) -> dict[str, Any]:
        plain = config_lib.to_dict(self.experiment)
        collection = plain["collection"]
        # Only a user's own files are split by share: environments have their own splits.
        share = collection.pop("validation_share")
        # These cannot change a finished stage: a bad row would have raised, and min_success stops training.
        del collection["files"], collection["skip_bad"], collection["min_success"]
        if self.experiment.collection.files:
            return {"files": self._files_identity, "validation_share": share, "seed": plain["seed"]}
        return {
            "environment": self._environment_inputs,
            "policy": self._policy_inputs,
            "collection": collection,
            "seed": plain["seed"],
        }

    @property
    def build_inputs(self) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        return {
            "trajectories": identity(self.collect_inputs),
            # The other fields of `data` only matter when batches are made from the shards.
            "data": {name: data[name] for name in ("shards", "length", "too_long")},
        } | self._base_inputs

    def train_inputs(self, model: config_lib.RewardModelConfig, seed: int) -> dict[str, Any]:
        data = config_lib.to_dict(self.experiment)["data"]
        # The identity of a training run says by itself which shards were skipped.
        del data["skip_bad"]
        return {
            "shards": identity(self.build_inputs),
            "data": data,
            # Without fields that cannot change the result, so that they may differ when a run resumes.
            "reward_model": config_lib.fingerprint_fields(model, base_has_head=self._base_has_head),
            "seed": seed,
        }

    @property
    def search_inputs(self) -> dict[str, Any]:
        """What every search depends on; SearchSpec.inputs has the rest."""
        plain = config_lib.to_dict(self.experiment)
        return {
            "environment": self._environment_inputs,
            "policy": self._policy_inputs,
            "seed": plain["seed"],
            # Sizes of best-of-N and aggregations are computed from the pool's scores: changing them repeats no search.
            "search": {name: plain["search"][name] for name in ("split", "tasks", "temperature")},
        }

    @functools.cached_property
    def policy_identity(self) -> str:
        """Fingerprint of the policy: hash of its model files, or of its settings if it has no local model."""
        settings = self.experiment.policy
        if loading.is_directory(settings):
            return _model_identity(loading.policy_directory(settings), settings.chat_template)
        return identity(self._policy_inputs)

    @functools.cached_property
    def _policy_inputs(self) -> dict[str, Any]:
        # Left out: how many requests are in flight, and the address of a server.
        plain, settings = config_lib.to_dict(self.experiment)["policy"], self.experiment.policy
        inputs = {name: plain[name] for name in ("max_action_tokens", "max_tokens")}
        if loading.is_directory(settings):
            # Its conversations have no reasoning to drop.
            special = {name: value for name, value in self.encoding_choices.items() if name == "special_tokens"}
            return inputs | {"path": self.policy_identity} | special
        if settings.endpoint is not None:
            # Without a base model nothing is encoded.
            if self.experiment.base_model is not None:
                inputs |= self.encoding_choices
            endpoint = {name: plain["endpoint"][name] for name in ("model", "extra_body")}
            # Left out if false, as in runs from before the field.
            sends = {"send_reasoning": True} if settings.endpoint.send_reasoning else {}
            return inputs | {"endpoint": endpoint | sends}
        return inputs | {"path": settings.path, "arguments": plain["arguments"]}

    @property
    def encoding_choices(self) -> dict[str, Any]:
        """What the encoder does to messages, as recorded: without the defaults, as earlier runs did not record them."""
        settings, defaults = self.experiment.policy, config_lib.PolicyConfig()
        names = ("reasoning", "special_tokens")
        return {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(defaults, name)}

    @property
    def _environment_inputs(self) -> dict[str, Any]:
        # Left out: in which process environments run, and how many at a time.
        plain = config_lib.to_dict(self.experiment)["environment"]
        return {"name": plain["name"], "arguments": self._default_arguments | plain["arguments"]}

    @functools.cached_property
    def _files_identity(self) -> list[dict[str, str | None]]:
        return user_files.identity(self.experiment.collection.files)

    @functools.cached_property
    def _base_has_head(self) -> bool:
        return is_reward_model(reader.read_config(self.base_directory)[1])

    @functools.cached_property
    def _base_inputs(self) -> dict[str, Any]:
        # Looked up in any case, so that a missing base model is reported before any work is spent.
        directory, settings, choices = self.base_directory, self.experiment.policy, self.encoding_choices
        # Sampled trajectories already depend on the policy, and without a base_model its tokenizer encodes them.
        if self.experiment.base_model is None and not self.experiment.collection.files:
            return choices
        return {"base_model": _model_identity(directory, settings.chat_template)} | choices


def flops_of_log_ratio(run: Run) -> float:
    """Forward FLOPs of one token of the two models of the progress-advantage baseline."""
    return sum(flops_per_token(reader.read_config(directory)[0]) for directory in run.progress_advantage or ())


def flops_of_tokens(run: Run) -> tuple[float, float]:
    """Forward FLOPs of one token of the policy (nan if its size is unknown) and of the reward models."""
    settings = run.experiment.policy
    reward = flops_per_token(reader.read_config(run.base_directory)[0])
    if not loading.is_directory(settings):
        return math.nan, reward
    return flops_per_token(reader.read_config(loading.policy_directory(settings))[0]), reward


def log_ratio_inputs(run: Run) -> dict[str, Any]:
    """What the scores of the progress-advantage baseline depend on."""
    template = run.experiment.policy.chat_template
    models = [_model_identity(directory, template) for directory in run.progress_advantage or ()]
    return {"progress_advantage": models} | run.encoding_choices


def _model_identity(directory: Path, template: str) -> str:
    """Hash of a model's files, and of its chat template if the config names another one than its own."""
    from data_pipeline.chat_template import fingerprint_text, read_template
    from jaxprm.hf.safetensors import model_files

    text = read_template(template)
    hashes = [files.sha256(directory / name) for name in model_files(directory)]
    return identity(hashes if text is None else [*hashes, fingerprint_text(text)])
