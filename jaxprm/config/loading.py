"""Reads, overrides and checks config files. A wrong name, type or value is an error of one line that names it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import runpy
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from data_pipeline import typed_json
from data_pipeline.errors import cut, shown
from jaxprm import plugins
from jaxprm.config.schema import EndpointConfig, Experiment, MeshConfig, PolicyConfig, Section
from jaxprm.errors import UserError
from jaxprm.objectives import check_settings
from jaxprm.redaction import secret_field

# A wheel contains configs/ as jaxprm/recipes; a clone has it next to the package. Never look next to an installed
# package: site-packages/configs would be another project's.
_PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "configs"

# The policy sets these for every request, or they change the form of the answer.
_OURS = frozenset(
    ("model", "messages", "temperature", "max_tokens", "n", "stream", "stream_options", "logprobs", "top_logprobs")
)
_TOOLS = frozenset(("tools", "tool_choice", "functions", "function_call"))


# Names under which a message shows no value, whatever it is.
_SECRET_NAME = re.compile(r"(?i)(?:key|token|secret|passw(?:or)?d|cookie|credentials?)$")


def load(path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False) -> Experiment:
    """The experiment that a Python file defines, with `section.field=value` overrides (JSON values, or plain text).

    path: a file, or the name of a recipe that ships with the package, such as "textcraft_tiny". `quick` loads the
    file's `quick` instead of its `config`. Raises UserError, naming field, value and bound.
    """
    path = find_config(path)
    name = "quick" if quick else "config"
    try:
        namespace = runpy.run_path(str(path))
    except UserError:
        raise
    # SystemExit is no Exception: a config that calls sys.exit(0) would end the command as if all were done.
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        if isinstance(error, SystemExit):
            fault = f"calls sys.exit; a config only defines `{name}`, remove that call"
            raise UserError(f"config {where}: {fault}") from error
        raise UserError(f"config {where}: {type(error).__name__}: {error}") from error
    if not isinstance(namespace.get(name), Experiment):
        raise UserError(f"config {path}: must define `{name}`, a jaxprm.config.Experiment")
    try:
        # Through plain types, because msgspec checks values where it converts, not where a config file calls a section.
        plain = to_dict(namespace[name])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config {path}: {error}; a config holds only numbers, text, lists and dicts") from None
    # `to_dict` leaves it out when it is empty, but an override may fill it.
    if isinstance(plain["search"], dict):
        plain["search"].setdefault("custom", {})
    for override in overrides:
        _apply(plain, override)
    return from_dict(plain, where=str(path))


def find_config(name: str | Path) -> Path:
    """The file `name`, or the shipped recipe of that name. Raises UserError, listing the recipes, if it is neither."""
    path = Path(name)
    if path.is_file():
        return path
    # A path always means a file: a recipe must not hide a mistyped one.
    is_path = path.suffix == ".py" or "/" in str(name)
    recipe = RECIPES / f"{name}.py"
    if not is_path and recipe.is_file():
        return recipe
    recipes = ", ".join(sorted(file.stem for file in RECIPES.glob("*.py")))
    raise UserError(f"config {name}: no such file{'' if is_path else ' or recipe'}; the recipes are {recipes}")


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of an option such as `--mesh data=-1,fsdp=16`; see `mesh_of_sizes`."""
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, separator, size = (piece.strip() for piece in part.partition("="))
        if not separator:
            raise UserError(f"--mesh {text}: {part.strip()!r} is not AXIS=DEVICES; e.g. tensor=4,fsdp=2")
        if axis in sizes:
            raise UserError(f"--mesh {text}: {axis} is given twice")
        try:
            sizes[axis] = int(size)
        except ValueError:
            sizes[axis] = size
    return mesh_of_sizes(sizes, where=f"--mesh {text}")


def mesh_of_sizes(sizes: Mapping[str, Any], *, where: str) -> MeshConfig:
    """The mesh of {axis: devices}. Other axes are 1, and `data` takes the remaining devices unless another axis does.

    Raises UserError, naming the axis, for an unknown axis and for a size that is neither positive nor -1.
    """
    axes = MeshConfig.__struct_fields__
    for axis, size in sizes.items():
        if axis not in axes:
            raise UserError(f"{where}: no axis {axis!r}; axes are {', '.join(axes)}")
        # Not isinstance, for which True is an int.
        if type(size) is not int or size < -1 or size == 0:
            raise UserError(f"{where}: {axis} = {size!r} must be at least 1, or -1 for all remaining devices")
    data = {} if "data" in sizes else {"data": 1 if -1 in sizes.values() else -1}
    return MeshConfig(**data, **sizes)


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment in plain JSON types, as in config.json."""
    # Through JSON, so that tuples are lists as in a config.json that is read back.
    plain: dict[str, Any] = json.loads(json.dumps(msgspec.to_builtins(experiment, str_keys=True)))
    # Left out when empty, so that fingerprints of configs from before this field existed stay the same.
    # A config file may have put anything in place of a section.
    if isinstance(plain["search"], dict) and not plain["search"]["custom"]:
        del plain["search"]["custom"]
    return plain


def from_dict(plain: dict[str, Any], *, where: str) -> Experiment:
    """The experiment of a plain dict, checked. Raises UserError with field, value and bound, but never a secret."""
    try:
        typed_json.check(plain)
    except ValueError as error:
        raise UserError(f"config {where}: {error}") from None
    # First, because the messages of the other checks show values.
    if secret := secret_field(plain):
        raise UserError(
            f"config {where}: {secret} looks like a key or a password, and configs are written to the work directory; "
            "take it out, and name an environment variable in policy.endpoint.api_key_env"
        )
    try:
        experiment = msgspec.convert(plain, Experiment)
    except msgspec.ValidationError as error:
        raise UserError(f"config {where}: {_with_value(plain, str(error))}") from None
    # Bounds such as >= 0 let infinity through, and fields without bounds NaN; Python's JSON reads both.
    for field, value in _floats(plain, ""):
        if not math.isfinite(value):
            raise UserError(f"config {where}: {field} = {value}: expected a finite number")
    if fault := validate_endpoint(experiment.policy):
        raise UserError(f"config {where}: {fault}")
    labels = [model.label for model in experiment.reward_models]
    if len(set(labels)) != len(labels):
        raise UserError(f"config {where}: reward_models: labels must differ, got {labels}")
    if reserved := {"random", "policy", "oracle", "progress_advantage"} & set(labels):
        raise UserError(f"config {where}: reward_models: label {min(reserved)!r} is a control's; choose another")
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


def _apply(plain: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"override {_without_secret(override)}: write it as section.field=value")
    *path, last = name.split(".")
    node: Any = plain
    for part in path:
        node = _child(node, part)
        if node is None:
            raise UserError(f"override {_without_secret(override)}: the config has no section {shown(part)}")
    # Bytes of the command line that are not UTF-8 arrive as surrogates.
    if not override.isascii() and any("\ud800" <= character <= "\udfff" for character in override):
        raise UserError(f"override {_without_secret(override)}: not UTF-8; write it in UTF-8")
    try:
        value = typed_json.parse(text)
    except typed_json.NotJSON:
        value = text
    except ValueError as error:
        raise UserError(f"override {_without_secret(override)}: {error}") from None
    if isinstance(node, dict):
        # An unknown field is refused later, by `from_dict`, which lists the fields.
        node[last] = value
    elif _child(node, last) is not None:
        node[int(last)] = value
    else:
        have = f"items 0 to {len(node) - 1}" if isinstance(node, list) and node else "no fields"
        raise UserError(f"override {_without_secret(override)}: {'.'.join(path)} has {have}, not {last!r}")


def _without_secret(override: str) -> str:
    """The override for a message; a value that is like a secret is left out."""
    name, _, text = override.partition("=")
    nested: Any = text
    for part in reversed(name.split(".")):
        nested = {part: nested}
    is_secret = _SECRET_NAME.search(name) or secret_field(nested)
    return f"{shown(name)} (its value is like a secret)" if is_secret else shown(override)


def _child(node: Any, name: str) -> Any:
    """A dict's field or a list's item, or None."""
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and len(name) < 10 and int(name) < len(node) else None
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


def _with_value(plain: dict[str, Any], message: str) -> str:
    """msgspec's message, which says what and where, with the value and the allowed names or choices added."""
    # msgspec gives the field only within the text of the message.
    problem, _, path = message.partition(" - at `$.")
    node: Any = plain
    kind: Any = Experiment
    where = ""
    for part in re.findall(r"[^.\[\]]+|\[\.\.\.\]", path.rstrip("`")):
        if part == "[...]":
            # msgspec does not name the key of a dictionary: it is the first one whose value cannot be converted.
            kind = get_args(kind)[1]
            key, node = next((key, value) for key, value in node.items() if not _converts(value, kind))
            where += f"[{json.dumps(key)}]"
            continue
        node, kind = _child(node, part), _type_of(kind, part)
        where += f"[{part}]" if part.isdecimal() else f".{part}" if where else part
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem):
        fields = ", ".join(field.name for field in msgspec.structs.fields(kind))
        return f"{where}{where and '.'}{unknown[1]}: no such field; {where or 'an experiment'} has {fields}"
    if problem.startswith("Invalid enum value"):
        problem = f"must be one of {', '.join(map(str, get_args(kind)))}"
    if problem.startswith("Expected `array`, got"):
        problem += next((f"; write {json.dumps(fix)}" for fix in ([node], [[node]]) if _converts(fix, kind)), "")
    value = f"{where} = {cut(json.dumps(node))}: " if where else ""
    return f"{value}{problem[0].lower()}{problem[1:]}"


def _converts(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _type_of(kind: Any, part: str) -> Any:
    """The type of a struct's field, or of a tuple's items."""
    if part.isdecimal():
        kind = get_args(kind)[0]
    else:
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == part)
    if get_origin(kind) is Annotated:
        return get_args(kind)[0]
    if get_origin(kind) is not types.UnionType:
        return kind
    # `EndpointConfig | None`: an error below it is about the section.
    sections = [option for option in get_args(kind) if isinstance(option, type) and issubclass(option, Section)]
    return sections[0] if sections else kind


def validate_endpoint(policy: PolicyConfig) -> str | None:
    """The first invalid policy setting, with its field and the fix; None if there is none."""
    if policy.endpoint is None:
        if policy.arguments and not is_plugin(policy.path):
            return f'policy.arguments need a policy `module:attribute`, not policy.path = "{policy.path}"; drop them'
        return None
    if policy.path != "default" or policy.arguments:
        return "policy.endpoint replaces policy.path and policy.arguments, but both are set; keep one of them"
    if problem := _wrong_url(policy.endpoint.base_url) or _wrong_field(policy.endpoint):
        return f"policy.endpoint.{problem}"
    return None


def is_plugin(path: str) -> bool:
    """Whether `policy.path` names a user's "module:attribute"; a directory of the same name has precedence."""
    return plugins.is_attribute(path) and not Path(path).exists()


def _wrong_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        # `port` raises for one that is not a number.
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"base_url is no URL ({error}); write it as http://host:port/v1"
    # The URL is not shown: these parts may hold a password.
    if parts.query or parts.fragment or parts.username is not None:
        return "base_url has a user, a query or a fragment; write it as http://host:port/v1"
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f]", url):
        return f'base_url = "{cut(url)}": write it as http://host:port/v1'
    if parts.path.rstrip("/").endswith("/completions"):
        return f'base_url = "{url}": leave out /chat/completions, which is added'
    return None


def _wrong_field(endpoint: EndpointConfig) -> str | None:
    name = endpoint.api_key_env
    # The value is not shown: a user who misunderstands the field puts the key there.
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        return "api_key_env names the environment variable that holds the key (A-Z, 0-9, _), and is not the key"
    for field, value in endpoint.extra_body.items():
        if field in _TOOLS:
            return f"extra_body.{field}: environments take text, so there are no tools to call; describe them in text"
        if field in _OURS:
            return f"extra_body.{field} is set for every request; use the config's own field, or leave it out"
        if field == "seed" and value is not None:
            return f"extra_body.seed = {value}: every sample needs its own seed; null sends none"
    return None
