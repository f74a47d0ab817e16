"""Types of JSON values in words, and plain values of SDK objects."""

from __future__ import annotations

from typing import Any


def kind_of(value: Any) -> str:
    """The type of a JSON value in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}")


def plain(value: Any) -> Any:
    """An object of an SDK (pydantic) as a dictionary; any other value as it is."""
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) and not isinstance(value, type) else value
