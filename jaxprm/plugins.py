"""Objects that a config names as "module:attribute": a user's own classes, functions and search methods."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from jaxprm.errors import UserError


def is_attribute(name: str) -> bool:
    """Whether a name has the form "module:attribute". The module is not imported."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def make(kind: str, name: str, path: str, arguments: Mapping[str, Any], *, choices: str) -> Any:
    """Calls the object at `path` ("module:attribute") with `arguments`, and returns the result.

    Args:
        kind: what is made, for error messages ("environment").
        name: the name in the config.
        choices: the other names that the config may use, for error messages.

    Raises UserError if the module or the attribute does not exist, or the call does not accept the arguments.
    """
    factory = locate(kind, name, path, choices=choices)
    if not callable(factory):
        raise UserError(f"{kind} {name!r}: {path} is not callable; name a class or a function of that module")
    try:
        return factory(**arguments)
    except TypeError as error:
        # A traceback that ends here is the call's own: wrong arguments. One from within the user's code is a bug there.
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        raise UserError(f"{kind} {name!r}: {error}; fix the config's {kind} arguments") from error


def locate(kind: str, name: str, path: str, *, choices: str) -> Any:
    """The object at `path` ("module:attribute"); arguments as in `make`.

    Raises UserError if the module or the attribute does not exist.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{kind} {name!r}: no such name; use {choices}, or your own as 'module:attribute'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # The module exists, and one of its own imports is missing.
        raise UserError(
            f"{kind} {name!r}: no module {error.name!r}; install it or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{kind} {name!r}: {attribute!r} does not exist in {module.__file__}; fix the name")
    return getattr(module, attribute)


def missing_methods(plugin: Any, methods: tuple[str, ...]) -> list[str]:
    """Those of the methods that an object does not have."""
    return [method for method in methods if not callable(getattr(plugin, method, None))]
