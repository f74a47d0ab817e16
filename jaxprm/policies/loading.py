"""Loads the policy of a config, and finds the language model that reward models start from."""

from __future__ import annotations

from pathlib import Path

from jaxprm import plugins
from jaxprm.artifacts.directory import find_model, is_checkpoint
from jaxprm.config import Experiment, PolicyConfig, is_plugin
from jaxprm.errors import UserError
from jaxprm.hf import hub
from jaxprm.policies import protocol
from jaxprm.policies.checked import CheckedPolicy

_METHODS = ("propose", "count_tokens")


def load(experiment: Experiment) -> protocol.Policy:
    """The policy of an experiment: a model directory, an endpoint, or a user's own "module:attribute".

    Raises UserError if it does not exist, or lacks a method of protocol.Policy, or has a wrong `usage`.
    """
    settings = experiment.policy
    # The imports are here because each kind brings its own: JAX and a model, or an HTTP client.
    if is_directory(settings):
        from jaxprm.policies import language_model

        return language_model.load(str(policy_directory(settings)), seed=experiment.seed, settings=settings)
    if settings.endpoint is not None:
        from data_pipeline.encode import Encoder
        from jaxprm.policies import endpoint

        # Without a base model nothing knows the server's tokenizer, and token counts are estimates.
        encoder = None
        if experiment.base_model is not None:
            encoder = Encoder.load(base_directory(experiment), **settings.encoding)
        return endpoint.load(settings, seed=experiment.seed, encoder=encoder)
    arguments = {"seed": experiment.seed} | settings.arguments
    policy = plugins.make("policy", settings.path, settings.path, arguments, choices="a model directory, default")
    if missing := plugins.missing_methods(policy, _METHODS):
        kind = type(policy).__name__
        raise UserError(f"policy {settings.path!r}: {kind} has no method {', '.join(missing)}; define it")
    return CheckedPolicy(policy, settings.path)


def is_directory(settings: PolicyConfig) -> bool:
    """Whether the policy is a language model on disk, whose weights and tokenizer a reward model can start from."""
    return settings.endpoint is None and not is_plugin(settings.path)


def policy_directory(settings: PolicyConfig) -> Path:
    """The model directory of a policy for which `is_directory` holds. Raises UserError if no model is there."""
    return model_directory("policy", "policy.path", settings.path)


def base_directory(experiment: Experiment) -> Path:
    """The model that reward models start from and whose tokenizer they use: `base_model`, or the policy's directory.

    Raises UserError if there is neither, or no model is there.
    """
    if experiment.base_model is not None:
        return model_directory("base model", "base_model", experiment.base_model)
    if not is_directory(experiment.policy):
        raise UserError(
            "base_model is null, and this policy has no directory that reward models could start from; set base_model "
            "to a model directory, or to default"
        )
    return policy_directory(experiment.policy)


def model_directory(kind: str, field: str, path: str) -> Path:
    """The directory of a model: a directory, a Hub id, "default", or where `find_model` finds a finished one.

    kind, field: for the message.

    Raises UserError if no model is there, and for a checkpoint of a training run, whose arrays are in another format.
    """
    if path == "default":
        from jaxprm.policies import language_model

        return language_model.default_directory()
    directory = hub.resolve(path, what=kind)
    if (directory / "config.json").is_file():
        return directory
    try:
        model = find_model(directory)
    except UserError:
        raise UserError(
            f"{kind} {directory}: no config.json; set {field} to a model directory, or to default"
        ) from None
    if is_checkpoint(model):
        raise UserError(
            f"{kind} {directory}: is a checkpoint of a training run; write it as a model directory with python "
            f"-m jaxprm export --model {directory} --output DIR, and set {field} to that"
        )
    return model
