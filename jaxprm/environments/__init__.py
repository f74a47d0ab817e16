"""Environments in which agents act. No module here imports a model."""

from jaxprm.environments.protocol import Environment, StepResult, create

__all__ = ["Environment", "StepResult", "create"]
