"""Objects that a config names as "module:attribute": a user's own classes and functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
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
    factory = load_attribute(kind, name, path, known=known)
    if not callable(factory):
        module, _, attribute = path.partition(":")
        file = sys.modules[module].__file__
        raise UserError(f"{kind} {name!r}: {attribute!r} is not callable in {file}; name a class of that module")
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


def load_attribute(kind: str, name: str, path: str, *, known: str) -> Any:
    """The object that `path` ("module:attribute") names; arguments as in `make`.

    Raises UserError where the module or attribute does not exist.
    """
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
    if not hasattr(module, attribute):
        raise UserError(
            f"{kind} {name!r}: {attribute!r} does not exist in {module.__file__}; name a class of that module"
        )
    return getattr(module, attribute)
