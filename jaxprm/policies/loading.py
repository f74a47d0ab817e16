"""From a config to its policy, and to the language model that reward models start from."""

from __future__ import annotations

from pathlib import Path

from jaxprm import plugins
from jaxprm.config import Experiment, PolicyConfig, is_plugin
from jaxprm.errors import UserError
from jaxprm.hf import hub
from jaxprm.policies import protocol

_METHODS = ("propose", "count_tokens")


def load(experiment: Experiment) -> protocol.Policy:
    """The policy of an endpoint, of a user's own "module:attribute", or of a model directory.

    Raises UserError where there is no such thing, or it is not what a policy must be.
    """
    settings = experiment.policy
    if is_directory(settings):
        from jaxprm.policies import language_model

        return language_model.load(str(policy_directory(settings)), seed=experiment.seed, settings=settings)
    if settings.endpoint is not None:
        from data_pipeline.encode import Encoder
        from jaxprm.policies import openai

        encoder = None
        if experiment.base_model is not None:
            encoder = Encoder.load(base_directory(experiment), settings.chat_template)
        return openai.load(settings, seed=experiment.seed, encoder=encoder)
    arguments = {"seed": experiment.seed} | settings.arguments
    policy = plugins.make("policy", settings.path, settings.path, arguments, choices="a model directory, default")
    if missing := plugins.missing_methods(policy, _METHODS):
        kind = type(policy).__name__
        raise UserError(f"policy {settings.path!r}: {kind} has no method {', '.join(missing)}; define it")
    return policy


def is_directory(settings: PolicyConfig) -> bool:
    """Whether the policy is a language model on disk, with weights and a tokenizer that others can start from."""
    return settings.endpoint is None and not is_plugin(settings.path)


def policy_directory(settings: PolicyConfig) -> Path:
    """The directory of a policy that is one. Raises UserError where it holds no model."""
    return _directory("policy", "policy.path", settings.path)


def base_directory(experiment: Experiment) -> Path:
    """What reward models start from and whose tokenizer they read with: `base_model`, or the policy's directory.

    Raises UserError where there is none.
    """
    if experiment.base_model is not None:
        return _directory("base model", "base_model", experiment.base_model)
    if not is_directory(experiment.policy):
        raise UserError(
            "base_model is null, and this policy has no directory that reward models could start from; set base_model "
            "to a model directory, or to default"
        )
    return policy_directory(experiment.policy)


def _directory(what: str, field: str, path: str) -> Path:
    if path == "default":
        from jaxprm.policies import language_model

        return language_model.default_directory()
    directory = hub.resolve(path, what=what)
    if not (directory / "config.json").is_file():
        raise UserError(f"{what} {directory}: no config.json; set {field} to a model directory, or to default")
    return directory
