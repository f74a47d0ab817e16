"""Raw bytes on a connection: what proxies and servers read differently is refused, and the connection closed."""

import json
import socket

import pytest

from tests.serving import fakes

BODY = b'{"input": "abc"}'
HEAD = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LAST = b"Connection: close\r\n"
# A second request that an attacker hides behind the first.
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    with fakes.listening(hosts=frozenset()) as (port, model):
        yield port


def exchange(port: int, *pieces: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while data := connection.recv(65536):
                received += data
        except ConnectionError:
            pass  # a reset: the server closed while bytes of the client were unread
        return received


AMBIGUOUS = {
    "length and chunks": HEAD + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunks and length": HEAD + CHUNKED + LENGTH + b"\r\n" + CHUNKS,
    "two lengths": HEAD + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "a length with a sign": HEAD + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
    "an encoding in disguise": HEAD + LENGTH + b"Transfer-Encoding: xchunked\r\n\r\n" + BODY,
    "a space before the colon": HEAD + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY,
    "bare line feeds": (HEAD + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "one bare line feed": HEAD + LENGTH.replace(b"\r", b"") + b"\r\n" + BODY,
    "a bare line feed at the end": HEAD + LENGTH + b"\n" + BODY,
    "a bare carriage return": HEAD + b"X: a\rb\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded header": HEAD + b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded encoding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS,
    "a header folded by a tab": HEAD + b"X: a\r\n\tb\r\n" + LENGTH + b"\r\n" + BODY,
    "two hosts": HEAD + b"Host: evil.example\r\n" + LENGTH + b"\r\n" + BODY,
    "no host": HEAD.replace(b"Host: localhost\r\n", b"") + LENGTH + b"\r\n" + BODY,
    "a nul": HEAD + b"X: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "a head without an end": HEAD + b"X: " + b"a" * 20_000,
}


@pytest.mark.parametrize("request_bytes", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_an_ambiguous_request_gets_a_400_and_the_connection_is_closed(server, request_bytes):
    answer = exchange(server, request_bytes + HIDDEN)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == 400
    # One answer: nothing that follows is read as a request.
    assert answer.count(b"HTTP/1.1") == 1


def test_a_request_that_arrives_byte_by_byte_is_read_the_same(server):
    plain = HEAD + LENGTH + LAST + b"\r\n" + BODY
    assert exchange(server, *(bytes([byte]) for byte in plain)).startswith(b"HTTP/1.1 200")
    folded = AMBIGUOUS["a folded header"]
    assert exchange(server, *(bytes([byte]) for byte in folded)).startswith(b"HTTP/1.1 400")


def test_plain_requests_share_a_connection(server):
    plain = HEAD + LENGTH + b"\r\n" + BODY
    answer = exchange(server, plain * 3 + HIDDEN.replace(b"\r\n\r\n", b"\r\n" + LAST + b"\r\n"))
    assert answer.count(b"HTTP/1.1 200") == 4 and b"some-model" in answer


@pytest.mark.parametrize(
    "end", [b"0\r\n\r\n", b"0\r\n\n", b"0\r\nX: a\n\n", b"0\r\nX: a\r\n b\r\n\r\n", b"0;\nx\r\n\r\n"]
)
def test_nothing_follows_a_body_in_chunks(server, end):
    """Its end may be read in two ways, so the connection ends with it."""
    chunks = b"%x\r\n%s\r\n" % (len(BODY), BODY)
    answer = exchange(server, HEAD + CHUNKED + b"\r\n" + chunks + end + HIDDEN)
    assert answer.count(b"HTTP/1.1") <= 1 and b'some-model"' not in answer.partition(b"}")[2]
    if end == b"0\r\n\r\n":
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer.lower()


@pytest.mark.parametrize("path", [b"/nowhere", b"/health", b"/v1/models"])
def test_nothing_follows_a_body_in_chunks_of_any_path(server, path):
    answer = exchange(server, HEAD.replace(b"/classify", path) + CHUNKED + b"\r\n" + CHUNKS + HIDDEN)
    assert answer.count(b"HTTP/1.1 4") == 1 and b"some-model" not in answer


def test_a_host_of_another_name_is_refused(server):
    answer = exchange(server, HIDDEN.replace(b"localhost\r\n", b"evil.example\r\n" + LAST))
    assert answer.startswith(b"HTTP/1.1 421")
