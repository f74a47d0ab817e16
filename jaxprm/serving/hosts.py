"""Which names of a server clients may use: the defence against DNS rebinding and requests from other web pages.

A web page may give its own name the address 127.0.0.1 after it was loaded. The browser then takes this server for the
page's own and lets the page read its answers. Only the Host header tells: it has the page's name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from jaxprm.errors import UserError

# RFC 6761 reserves localhost and all names below it for the loopback interface.
_LOOPBACK_NAME = re.compile(r"(?:.+\.)?localhost")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def parse_host(text: str) -> str:
    """A name or address of --allow-host in the form of `host_of`. Raises UserError for anything else."""
    name = text.strip().lower().removesuffix(".")
    bare = name.removeprefix("[").removesuffix("]")
    if _address(bare) is not None:
        return str(_address(bare))
    if not _NAME.fullmatch(name):
        raise UserError(f"--allow-host {text!r}: must be a name or an address without scheme and port: prm.example.org")
    return name


def host_of(header: str) -> str | None:
    """The name or address in a Host header: lower case, without the port; None if it has another form."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)\.?(?::\d*)?", header.lower())
    if match is None:
        return None
    name = match[1].strip("[]").removesuffix(".")
    address = _address(name)
    return name if address is None else str(address)


def is_accepted(host: str | None, allowed: Collection[str]) -> bool:
    """Whether a host of `host_of` is this machine's loopback interface, or one of the allowed ones."""
    if host is None:
        return False
    address = _address(host)
    is_loopback = address.is_loopback if address is not None else _LOOPBACK_NAME.fullmatch(host) is not None
    return is_loopback or host in allowed


def origin_host(header: str) -> str | None:
    """The name or address in an Origin header; None for "null" and anything else that names none."""
    try:
        parts = urlsplit(header)
    except ValueError:
        return None
    return host_of(parts.netloc) if parts.scheme in ("http", "https") else None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # ::ffff:127.0.0.1 is 127.0.0.1.
    return getattr(address, "ipv4_mapped", None) or address
