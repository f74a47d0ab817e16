"""Tool calls of every API as {"id", "type": "function", "function": {"name", "arguments"}}.

Arguments are JSON text, as in OpenAI's API. Arguments that are not the JSON of an object are kept as the text they are:
a weak agent writes them, and they are part of what it did.
"""

from __future__ import annotations

from typing import Any

import msgspec

from data_pipeline.conversations.kinds import kind_of, plain
from data_pipeline.conversations.leftovers import Leftovers, is_nothing
from data_pipeline.errors import DataError

# `index` is the number of a call in a streamed response; the others repeat what a call or its result says.
_IGNORED = {
    "id",
    "type",
    "tool_call_id",
    "call_id",
    "index",
    "call_type",
    "parse_error",
    "view",
    "caller",
    "status",
    "namespace",
    "thought_signature",
}


def read_calls(value: Any, where: str, leftovers: Leftovers, index: int) -> list[dict[str, Any]]:
    """The calls of a message. Raises DataError that names a malformed one."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: tool_calls is {kind_of(value)}, not a list")
    return [read_call(plain(call), f"{where}: tool call {n}", leftovers, index) for n, call in enumerate(value)]


def read_call(raw: Any, where: str, leftovers: Leftovers, index: int) -> dict[str, Any]:
    """One call, in the form of OpenAI (functions and custom tools), Anthropic, LangChain or inspect_ai."""
    if not isinstance(raw, dict):
        raise DataError(f"{where} is {kind_of(raw)}, not an object with a function's name and arguments")
    function = raw.get("function")
    if isinstance(function, dict):
        name, arguments, used = function.get("name"), function.get("arguments"), {"function"}
    elif isinstance(raw.get("custom"), dict):
        name, arguments, used = raw["custom"].get("name"), raw["custom"].get("input"), {"custom"}
    else:
        name_key = next((key for key in ("function", "name", "function_name", "tool_name") if raw.get(key)), "name")
        keys = ("arguments", "args", "input", "parameters")
        key = next((key for key in keys if raw.get(key) is not None), "arguments")
        name, arguments, used = raw.get(name_key), raw.get(key), {name_key, key}
    ignored = used | _IGNORED
    for key, value in raw.items():
        if key not in ignored and not is_nothing(value):
            leftovers.unknown(index, where, key, value)
    identifier = next((raw[key] for key in ("call_id", "id", "tool_call_id") if raw.get(key)), None)
    called = {"id": str(identifier)} if identifier is not None else {}
    return called | {"type": "function", "function": function_call(name, arguments, where, leftovers)}


def function_call(name: Any, arguments: Any, where: str, leftovers: Leftovers) -> dict[str, str]:
    """{"name", "arguments"}, the arguments as text. Raises DataError for a name that is none."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the function's name is {'empty' if name == '' else kind_of(name)}")
    if arguments is None:
        leftovers.note("tool calls without arguments, taken as {}")
        arguments = {}
    if not isinstance(arguments, str):
        try:
            return {"name": name, "arguments": msgspec.json.encode(arguments).decode()}
        except (TypeError, OverflowError, UnicodeError) as error:
            raise DataError(f"{where}: the arguments of {name} cannot be written as JSON: {error}") from None
    if arguments_object(arguments) is None:
        leftovers.note("tool calls whose arguments are not a JSON object, kept as text")
    return {"name": name, "arguments": arguments}


def arguments_object(text: str) -> dict[str, Any] | None:
    """The object that the arguments of a call are the JSON of; None if they are not."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
