"""Definitions of tools of every API in OpenAI's form, {"type": "function", "function": {"name", "parameters"}}."""

from __future__ import annotations

from typing import Any

from data_pipeline.conversations.kinds import kind_of, plain
from data_pipeline.errors import DataError


def read_tool(raw: Any, where: str) -> dict[str, Any]:
    """A tool of OpenAI's chat or Responses API, Anthropic's or inspect_ai's. Raises DataError if it is no object."""
    raw = plain(raw)
    if not isinstance(raw, dict):
        raise DataError(f"{where} is {kind_of(raw)}, not an object")
    if isinstance(raw.get("function"), dict) or not isinstance(raw.get("name"), str):
        return raw
    function = {key: value for key, value in raw.items() if key not in ("type", "input_schema", "cache_control")}
    if isinstance(raw.get("input_schema"), dict):
        function["parameters"] = raw["input_schema"]
    # Tools of the provider's own, such as a web search, have a type and no parameters.
    is_function = raw.get("type", "function") in ("function", "custom") or "parameters" in function
    return {"type": "function", "function": function} if is_function else raw
