"""HTTP/1.1 on a connection: h11, without the leniency that lets a proxy and this server see different requests."""

from __future__ import annotations

import re
import secrets
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxprm.serving.app import error_response
from jaxprm.serving.requests import RequestRefused

# Bytes of a request line with its headers.
MAX_HEAD_BYTES = 16 << 10
_END_OF_HEAD = re.compile(rb"\n\r?\n")
# A line that ends without a carriage return, and a header that continues on the next line (RFC 9112, 2.2 and 5.2).
_AMBIGUOUS = re.compile(rb"(?<!\r)\n|\n[ \t]")


class StrictConnection(h11.Connection):
    """Refuses what h11 accepts and RFC 9112 allows to refuse, because proxies disagree on what it means.

    Refused are lines that end with a bare line feed, folded headers, and Content-Length with Transfer-Encoding. After a
    body in chunks, whose end h11 reads as leniently, the connection is closed: nothing can be hidden behind it.
    """

    _in_chunks = False

    def next_event(self) -> Any:
        """As h11.Connection. Raises RemoteProtocolError, after which the connection must be closed."""
        if self.their_state is h11.IDLE:
            head, _ = self.trailing_data
            end = _END_OF_HEAD.search(head)
            if _AMBIGUOUS.search(head, 0, end.end() if end else len(head)):
                raise h11.RemoteProtocolError("a bare line feed or a folded header")
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding together")
            self._in_chunks = b"transfer-encoding" in names
        return event

    def send(self, event: Any) -> bytes | None:
        """As h11.Connection."""
        if self._in_chunks and isinstance(event, h11.Response):
            headers = [*event.headers.raw_items(), (b"Connection", b"close")]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


class Protocol(H11Protocol):
    """A connection. What is not HTTP is refused with JSON, as everything else, where uvicorn sends plain text.

    A request's scope has the connection's number in `state`. It is random, so that nobody can name another's.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        self.app_state = {**self.app_state, "connection": secrets.randbits(128)}

    def send_400_response(self, msg: str) -> None:
        # In other states a response has begun already, and h11 would raise.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = error_response(RequestRefused(400, msg, Connection="close"))
            head = h11.Response(status_code=400, headers=refusal.raw_headers, reason=b"Bad Request")
            self.transport.write((self.conn.send(head) or b"") + (self.conn.send(h11.Data(data=refusal.body)) or b""))
        self.transport.close()
