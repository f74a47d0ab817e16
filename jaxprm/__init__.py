"""Process reward models for LLM agents, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxprm import quiet

if TYPE_CHECKING:
    from jaxprm.api import ActionScore, Model, load

__all__ = ["ActionScore", "Model", "load"]
_MODULES = ("losses", "objectives", "targets")

# Before JAX and TensorFlow start, which read the environment once.
quiet.silence()


def __getattr__(name: str) -> Any:
    """Loaded when first used: importing the package, or asking it for help, loads no JAX."""
    if name in __all__:
        return getattr(importlib.import_module("jaxprm.api"), name)
    if name in _MODULES:
        return importlib.import_module(f"jaxprm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
