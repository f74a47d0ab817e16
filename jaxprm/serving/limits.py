"""What a request may cost, and the refusal of one that would cost more."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

LONGEST_MESSAGE = 500


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server; beyond them a request is refused with the bound in the message.

    body_bytes, depth: of a request's JSON; candidates: of a request, or inputs of a classification; tokens: of a
    conversation with a candidate; waiting: requests that are accepted and not answered; held_bytes: bodies of all
    requests together; batch: requests computed at once; body_seconds: to send a body in; idle_seconds: until a
    connection without a request is closed.
    """

    body_bytes: int = 1 << 20
    depth: int = 32
    candidates: int = 64
    tokens: int = 2048
    waiting: int = 256
    held_bytes: int = 256 << 20
    batch: int = 32
    body_seconds: float = 30.0
    idle_seconds: float = 60.0


class Refused(Exception):
    """A request that is not answered: its status, one line that says why, and headers for the response."""

    def __init__(self, status: int, message: str, **headers: str):
        line = " ".join(message.split())
        self.status = HTTPStatus(status)
        self.message = line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(self.message)


class Intake:
    """Reads bodies of requests, and knows how much is held of all of them."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self.bytes = 0

    @contextmanager
    def holding(self) -> Iterator[bytearray]:
        """A buffer for a body; what is in it counts until the end of the block."""
        body = bytearray()
        try:
            yield body
        finally:
            self.bytes -= len(body)

    async def read(self, request: Request, body: bytearray) -> None:
        """Fills the buffer. Raises Refused for a body that is too large, too slow, cut off, or one too many."""
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self._limits.body_bytes:
                        raise self._too_large()
                    if self.bytes + len(chunk) > self._limits.held_bytes:
                        raise Refused(429, "too many requests at once for their size; try again", Retry_After="1")
                    body += chunk
                    self.bytes += len(chunk)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise Refused(408, f"the body did not arrive within {seconds:g} seconds", Connection="close") from None
        except ClientDisconnect:
            raise Refused(400, "the connection was closed before the body had arrived") from None

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self._limits.body_bytes} bytes; send fewer candidates at once")


def decoded(body: bytes | bytearray, depth: int) -> Any:
    """A body's JSON. Raises Refused where it is none, or nested more than `depth` deep."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Refused(400, f"the body is nested more than {depth} deep") from None
    layer = [value]
    for _ in range(depth):
        layer = [inner for one in layer for inner in _inside(one)]
        if not layer:
            return value
    raise Refused(400, f"the body is nested more than {depth} deep")


def _inside(value: Any) -> list:
    """The lists and objects directly inside of one."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in items if isinstance(one, (dict, list))]
