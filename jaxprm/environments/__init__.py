"""Where agents act. Nothing here knows a model."""

from jaxprm.environments.protocol import Environment, StepResult, create

__all__ = ["Environment", "StepResult", "create"]
