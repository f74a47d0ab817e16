"""Environments in which agents act. No module here imports a model."""

from jaxprm.environments.protocol import INSTRUCTED, Environment, StepResult, create

__all__ = ["INSTRUCTED", "Environment", "StepResult", "create"]
