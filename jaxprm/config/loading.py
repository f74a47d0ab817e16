"""A config file read, overridden and checked: a wrong name, type or value is one line that says which."""

from __future__ import annotations

import hashlib
import json
import math
import re
import runpy
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from jaxprm import plugins
from jaxprm.config.schema import EndpointConfig, Experiment, PolicyConfig, Section
from jaxprm.errors import UserError, secret_field
from jaxprm.objectives import check_settings

# Set for every request, or for answers of another form than the one that is read.
_OURS = frozenset(
    ("model", "messages", "temperature", "max_tokens", "n", "stream", "stream_options", "logprobs", "top_logprobs")
)
_TOOLS = frozenset(("tools", "tool_choice", "functions", "function_call"))


def load(path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False) -> Experiment:
    """The experiment in a Python file, with `section.field=value` overrides (values in JSON, or plain text).

    `quick` takes the file's `quick` instead of its `config`. Raises UserError, naming field, value and bound.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file; configs/ holds the recipes that ship")
    name = "quick" if quick else "config"
    try:
        found = runpy.run_path(str(path))
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise UserError(f"config {where}: {type(error).__name__}: {error}") from error
    if not isinstance(found.get(name), Experiment):
        raise UserError(f"config {path}: must define `{name}`, a jaxprm.config.Experiment")
    try:
        plain = to_dict(found[name])
    except TypeError as error:
        raise UserError(f"config {path}: {error}; a config holds numbers, text, lists and dicts alone") from None
    for override in overrides:
        _apply(plain, override)
    return from_dict(plain, where=str(path))


def to_dict(experiment: Experiment) -> dict:
    """Plain JSON types: what comes back from a config.json."""
    return json.loads(json.dumps(msgspec.to_builtins(experiment, str_keys=True)))


def from_dict(plain: dict, *, where: str) -> Experiment:
    """Validates and converts. Raises UserError, naming field, value and bound, but never the value of a secret."""
    if secret := secret_field(plain):
        raise UserError(
            f"config {where}: {secret} looks like a key or a password, and configs are written to the work directory; "
            "take it out, and name an environment variable in policy.endpoint.api_key_env"
        )
    try:
        experiment = msgspec.convert(plain, Experiment)
    except msgspec.ValidationError as error:
        raise UserError(f"config {where}: {_with_value(plain, str(error))}") from None
    for field, value in _floats(plain, ""):
        if not math.isfinite(value):
            raise UserError(f"config {where}: {field} = {value}: expected a finite number")
    if fault := validate_endpoint(experiment.policy):
        raise UserError(f"config {where}: {fault}")
    labels = [model.label for model in experiment.reward_models]
    if len(set(labels)) != len(labels):
        raise UserError(f"config {where}: reward_models: labels must differ, got {labels}")
    if taken := {"random", "policy", "oracle"} & set(labels):
        raise UserError(f"config {where}: reward_models: label {min(taken)!r} is a control's; choose another")
    for index, model in enumerate(experiment.reward_models):
        if len(set(model.lora.targets)) != len(model.lora.targets):
            raise UserError(f"config {where}: reward_models[{index}].lora.targets must differ: {model.lora.targets}")
    if len(set(experiment.reward_seeds)) != len(experiment.reward_seeds):
        raise UserError(f"config {where}: reward_seeds must differ, got {list(experiment.reward_seeds)}")
    for index, model in enumerate(experiment.reward_models):
        if plugins.is_attribute(model.objective):
            continue  # checked when it is trained: importing the user's module may need JAX
        try:
            check_settings(model)
        except UserError as error:
            raise UserError(f"config {where}: reward_models[{index}].{error}") from None
    if experiment.search.pool < max(experiment.search.best_of_n + experiment.search.prefix_best_of_n):
        raise UserError(
            f"config {where}: search.pool = {experiment.search.pool} is smaller than the largest best-of-N; "
            "raise the pool or drop that N"
        )
    return experiment


def fingerprint(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _apply(plain: dict, override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"override {override!r}: write it as section.field=value")
    *path, last = name.split(".")
    node: Any = plain
    for part in path:
        node = _child(node, part)
        if node is None:
            raise UserError(f"override {override!r}: the config has no section {part!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(node, dict):
        node[last] = value
    elif _child(node, last) is not None:
        node[int(last)] = value
    else:
        have = f"items 0 to {len(node) - 1}" if isinstance(node, list) and node else "no fields"
        raise UserError(f"override {override!r}: {'.'.join(path)} has {have}, not {last!r}")


def _child(node: Any, name: str) -> Any:
    """A dict's field or a list's item; None where there is none."""
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and int(name) < len(node) else None
    return node.get(name) if isinstance(node, dict) else None


def _floats(node: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, float):
        yield where, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _floats(value, f"{where}.{name}" if where else name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _floats(value, f"{where}[{index}]")


def _with_value(plain: dict, message: str) -> str:
    """msgspec says what and where; a reader also wants the value and what would do."""
    what, _, where = message.partition(" - at `$.")
    where = where.rstrip("`")
    parts = where.replace("[", ".").replace("]", "").split(".") if where else []
    node, kind = plain, Experiment
    for part in parts:
        node, kind = _child(node, part), _kind_of(kind, part)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        fields = ", ".join(field.name for field in msgspec.structs.fields(kind))
        return f"{where}{where and '.'}{unknown[1]}: no such field; {where or 'an experiment'} has {fields}"
    if what.startswith("Invalid enum value"):
        what = f"must be one of {', '.join(map(str, get_args(kind)))}"
    value = f"{where} = {json.dumps(node)}: " if where else ""
    return f"{value}{what[0].lower()}{what[1:]}"


def _kind_of(kind: Any, part: str) -> Any:
    """The type of a struct's field, or of a tuple's items."""
    found = (
        get_args(kind)[0]
        if part.isdecimal()
        else next(field.type for field in msgspec.structs.fields(kind) if field.name == part)
    )
    if get_origin(found) is Annotated:
        return get_args(found)[0]
    sections = [one for one in get_args(found) if isinstance(one, type) and issubclass(one, Section)]
    return sections[0] if sections and get_origin(found) is types.UnionType else found


def validate_endpoint(policy: PolicyConfig) -> str | None:
    """The first thing that cannot be, with its field and the fix; None where all is well."""
    if policy.endpoint is None:
        if policy.arguments and not is_plugin(policy.path):
            return f'policy.arguments are for a policy of your own, not for policy.path = "{policy.path}"; drop them'
        return None
    if policy.path != "default" or policy.arguments:
        return "policy.endpoint is given beside policy.path or policy.arguments; keep one of them"
    if found := _wrong_url(policy.endpoint.base_url) or _wrong_field(policy.endpoint):
        return f"policy.endpoint.{found}"
    return None


def is_plugin(path: str) -> bool:
    """Whether `policy.path` names a user's "module:attribute"; a directory of that name goes first."""
    return plugins.is_attribute(path) and not Path(path).exists()


def _wrong_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"base_url is no URL ({error}); write it as http://host:port/v1"
    if parts.query or parts.fragment or parts.username is not None:
        return "base_url has a user, a query or a fragment; write it as http://host:port/v1"
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f]", url):
        return f'base_url = "{url}": write it as http://host:port/v1'
    if parts.path.rstrip("/").endswith("/completions"):
        return f'base_url = "{url}": leave out /chat/completions, which is added'
    return None


def _wrong_field(endpoint: EndpointConfig) -> str | None:
    name = endpoint.api_key_env
    # The value is not shown: whoever misunderstands the field puts the key there.
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        return "api_key_env names the environment variable that holds the key (A-Z, 0-9, _), and is not the key"
    for field, value in endpoint.extra_body.items():
        if field in _TOOLS:
            return f"extra_body.{field}: environments take text, so there are no tools to call; describe them in text"
        if field in _OURS:
            return f"extra_body.{field} is set for every request; use the config's own field, or leave it out"
        if field == "seed" and value is not None:
            return f"extra_body.seed = {value}: every draw has a seed of its own; null sends none"
    return None
