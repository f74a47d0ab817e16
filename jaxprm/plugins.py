"""Objects that a config names as "module:attribute": a user's own classes and functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxprm.errors import UserError


def is_attribute(name: str) -> bool:
    """Whether a name has the form "module:attribute"; whether there is such a thing is `make`'s to say."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def make(kind: str, name: str, path: str, arguments: Mapping[str, Any], *, known: str) -> Any:
    """Calls what `path` ("module:attribute") names with the arguments.

    Args:
      kind: what it is to be, for the messages ("environment").
      name: what the config calls it; `known` says which other names there are.

    Raises UserError where the module or attribute does not exist, or the arguments are refused.
    """
    factory = _locate(kind, name, path, known)
    try:
        return factory(**arguments)
    except TypeError as error:
        # Only the call itself is the config's fault: a TypeError from within the class keeps its traceback.
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        raise UserError(f"{kind} {name!r}: {error}; mend the config's {kind} arguments") from error


def missing_methods(made: Any, methods: tuple[str, ...]) -> list[str]:
    """Those of the methods that an object does not have."""
    return [method for method in methods if not callable(getattr(made, method, None))]


def _locate(kind: str, name: str, path: str, known: str) -> Callable[..., Any]:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{kind} {name!r}: no such name; use {known}, or your own as 'module:attribute'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module was found, and misses something of its own
        raise UserError(
            f"{kind} {name!r}: no module {error.name!r}; install it or put its folder on PYTHONPATH"
        ) from error
    if not callable(factory := getattr(module, attribute, None)):
        state = "is not callable" if hasattr(module, attribute) else "does not exist"
        raise UserError(f"{kind} {name!r}: {attribute!r} {state} in {module.__file__}; name a class of that module")
    return factory
