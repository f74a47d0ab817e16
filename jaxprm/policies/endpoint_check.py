"""What an endpoint in a config must be, beyond the types of its fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jaxprm import named

if TYPE_CHECKING:
    from jaxprm.config import Endpoint, Policy

# Set for every request, or for answers of another form than the one that is read.
_OURS = frozenset(
    ("model", "messages", "temperature", "max_tokens", "n", "stream", "stream_options", "logprobs", "top_logprobs")
)
_TOOLS = frozenset(("tools", "tool_choice", "functions", "function_call"))


def wrong(policy: Policy) -> str | None:
    """The first thing that cannot be, with its field and the fix; None where all is well."""
    if policy.endpoint is None:
        if policy.arguments and not is_own(policy.path):
            return f'policy.arguments are for a policy of your own, not for policy.path = "{policy.path}"; drop them'
        return None
    if policy.path != "default" or policy.arguments:
        return "policy.endpoint is given beside policy.path or policy.arguments; keep one of them"
    if found := _wrong_url(policy.endpoint.base_url) or _wrong_field(policy.endpoint):
        return f"policy.endpoint.{found}"
    return None


def is_own(path: str) -> bool:
    """Whether `policy.path` names a user's "module:attribute"; a directory of that name goes first."""
    return named.is_attribute(path) and not Path(path).exists()


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


def _wrong_field(endpoint: Endpoint) -> str | None:
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
