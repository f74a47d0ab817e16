"""Import of OpenAI's chat format, as APIs, SDKs and fine-tuning files write it.

An assistant message is one step, so its text parts are joined. Fields that are left out are counted in `notes`. If the
conversation would change without them (images, audio, arguments that are not JSON), an error names the message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from data_pipeline.errors import DataError
from data_pipeline.importers.fields import Path
from data_pipeline.source import kind_of

Notes = Counter  # Changes and omissions, by description.
# `developer` is what newer APIs call `system`, `function` what older ones called `tool`.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FIELDS = {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "weight", "step"}
_TEXT_TYPES = {"text", "input_text", "output_text"}
_MEDIA = {"audio", "image", "images", "image_url", "video", "videos", "file", "files", "attachments"}
_MAX_NOTES = 100


class Parsed(NamedTuple):
    """A row's messages in our format, other trajectory fields from it, and the names of the row's used fields."""

    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    used: set[str]


def parse(row: dict[str, Any], where: Path, notes: Notes) -> Parsed:
    """Parses a row with a list of chat messages at `where`, and `tools` or `functions`."""
    raw = full_list(where.find(row), where.text)
    messages = [message(entry, index, notes) for index, entry in enumerate(raw)]
    row_tools = tools(row)
    return Parsed(messages, {"tools": row_tools} if row_tools else {}, {where.key, "tools", "functions"} - {None})


def message(raw: Any, index: int, notes: Notes) -> dict[str, Any]:
    """A chat message in our format. Raises DataError that names it."""
    if not isinstance(raw, dict):
        raise DataError(f"message {index} is {kind_of(raw)}, not an object")
    hint = "; this looks like ShareGPT, use --format sharegpt" if "from" in raw else ""
    role = role_of(raw, "role", _ROLES, f"message {index}", hint)
    where = f"message {index} ({raw['role']})"
    converted: dict[str, Any] = {"role": role}
    calls = _calls(raw, role, where, notes)
    content = _text(raw.get("content"), where, notes)
    if content is None and not calls:
        if role != "tool":
            refusal = "; it has a refusal, which is no action" if raw.get("refusal") else ""
            raise DataError(f"{where} has neither content nor tool_calls{refusal}")
        note(notes, "tool results without content, taken as empty")
        content = ""
    converted["content"] = content
    if calls:
        converted["tool_calls"] = calls
    # Fine-tuning files mark an assistant message that is not trained on with `"weight": 0`, ours with `"step": false`.
    if role == "assistant" and not (flag(raw, "weight", where) and flag(raw, "step", where)):
        converted["step"] = False
    converted |= {key: raw[key] for key in ("name", "tool_call_id") if raw.get(key) is not None}
    for key, value in raw.items():
        # SDKs write all fields, the unused ones (`refusal`, `annotations`, `audio`) as null.
        if key not in _FIELDS and value not in (None, [], "", {}):
            if key in _MEDIA:
                raise DataError(f"{where} has `{key}`; only text can be trained on and scored")
            note(notes, f"message field `{key:.40}`, left out")
    return converted


def role_of(raw: dict[str, Any], key: str, roles: Mapping[str, str], where: str, hint: str) -> str:
    """Our name for the role at `key`. Raises DataError, with `hint`, for an unknown one."""
    value = raw.get(key)
    role = roles.get(value) if isinstance(value, str) else None
    if role is None:
        raise DataError(f"{where}: {key} {value!r:.40} is none of {', '.join(roles)}{hint}")
    return role


def flag(raw: dict[str, Any], key: str, where: str) -> bool:
    """The value of a flag: true, false, 1 or 0; true if it is missing. Raises DataError for anything else."""
    value = raw.get(key)
    if value is not None and (not isinstance(value, (int, float)) or value not in (0, 1)):
        raise DataError(f"{where}: {key} is {value!r:.40}, not true or false, or 1 or 0")
    return value is None or bool(value)


def tools(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools of a row, from a list or its JSON; the older `functions` are wrapped as tools."""
    for key in ("tools", "functions"):
        value = row.get(key)
        if not value:
            continue
        if isinstance(value, str):
            value = json_value(value, key)
        entries = full_list(value, key) if value else []
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataError(f"{key}[{index}] is {kind_of(entry)}, not an object")
        return entries if key == "tools" else [{"type": "function", "function": entry} for entry in entries]
    return []


def tool_call(name: Any, arguments: Any, where: str, notes: Notes) -> dict[str, str]:
    """A call in our format: the function's name, and its arguments as the JSON of an object."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the function's name is {'empty' if name == '' else kind_of(name)}")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        note(notes, "tool calls without arguments, taken as {}")
        arguments = "{}"
    value = json_value(arguments, f"{where}: the arguments of {name}") if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise DataError(f"{where}: the arguments of {name} are {kind_of(value)}, not an object")
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return {"name": name, "arguments": text}


def json_value(text: str, name: str) -> Any:
    """The value of JSON in a text. Raises DataError that begins with `name`."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise DataError(f"{name} are not JSON: {error}: {text[:40]!r}") from None


def note(notes: Notes, description: str, count: int = 1) -> None:
    """Adds to the count of a change or omission."""
    # Bounded, because descriptions contain field names and a file may have endlessly many.
    notes[description if description in notes or len(notes) < _MAX_NOTES else "other fields, left out"] += count


def full_list(value: Any, name: str) -> list[Any]:
    """A list that is not empty, from a list or its JSON. Raises DataError for anything else."""
    if isinstance(value, str) and value:
        value = json_value(value, name)
    if not isinstance(value, list) or not value:
        problem = "missing" if value is None else "empty" if value in ([], "") else f"{kind_of(value)}, not a list"
        raise DataError(f"{name} is {problem}")
    return value


def _text(content: Any, where: str, notes: Notes) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: content is {kind_of(content)}, not a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
        if not isinstance(kind, str) or kind not in _TEXT_TYPES:
            raise DataError(f"{where}: content part {index} is {kind!r:.40}; only text can be trained on and scored")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}: content part {index} has no text")
        texts.append(part["text"])
    if len(texts) > 1:
        note(notes, "messages in several parts, joined to one text")
    return "".join(texts) if texts else None


def _calls(raw: dict[str, Any], role: str, where: str, notes: Notes) -> list[dict[str, Any]]:
    calls, older_call = raw.get("tool_calls") or [], raw.get("function_call")
    if not calls and not older_call:
        return []
    if role != "assistant":
        raise DataError(f"{where} has tool_calls; only an assistant calls tools")
    if calls and older_call:
        raise DataError(f"{where} has both tool_calls and function_call; keep one")
    if older_call:
        calls = [{"type": "function", "function": older_call}]
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {kind_of(calls)}, not a list")
    return [_call(call, f"{where}: tool call {index}", notes) for index, call in enumerate(calls)]


def _call(raw: Any, where: str, notes: Notes) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or raw.get("type") not in (None, "function"):
        raise DataError(f'{where} is not {{"type": "function", "function": {{"name", "arguments"}}}}')
    # `index` is the number of a call in a streamed response.
    for key in {*raw} - {"id", "type", "function", "index"}:
        if raw[key] is not None:
            note(notes, f"tool call field `{key:.40}`, left out")
    call_id = {"id": raw["id"]} if raw.get("id") is not None else {}
    called = tool_call(function.get("name"), function.get("arguments"), where, notes)
    return call_id | {"type": "function", "function": called}
