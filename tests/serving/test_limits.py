"""Request bodies: bounds on size, time, depth and total memory."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from jaxprm.serving.requests import MAX_MESSAGE, Intake, RequestLimits, RequestRefused, parse_json

SMALL = RequestLimits(body_bytes=10, held_bytes=15, body_seconds=0.05)


def request(*chunks: bytes, headers: tuple = (), ends: bool = True) -> Request:
    """A request whose body arrives in chunks. ends: False for a client that stops sending."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages += [{"type": "http.request", "body": b"", "more_body": False}] if ends else []

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)

    return Request({"type": "http", "method": "POST", "path": "/", "headers": list(headers)}, receive)


def refusal(intake: Intake, http_request: Request) -> RequestRefused:
    async def read():
        with intake.holding() as body:
            await intake.read(http_request, body)

    with pytest.raises(RequestRefused) as caught:
        asyncio.run(read())
    assert intake.bytes == 0
    return caught.value


def test_a_body_counts_until_the_end_of_its_block():
    async def read() -> bytes:
        with intake.holding() as body:
            await intake.read(request(b"0123", b"456789"), body)
            assert intake.bytes == 10
            return bytes(body)

    intake = Intake(SMALL)
    assert asyncio.run(read()) == b"0123456789" and intake.bytes == 0


@pytest.mark.parametrize("chunks", [(b"0123456789a",), (b"012345", b"6789", b"a")])
def test_one_byte_too_many_is_refused(chunks):
    assert refusal(Intake(SMALL), request(*chunks)).status == 413


def test_a_body_with_a_declared_length_that_is_too_large_is_not_read():
    assert refusal(Intake(SMALL), request(headers=((b"content-length", b"11"),), ends=False)).status == 413
    assert refusal(Intake(SMALL), request(b"x" * 11, headers=((b"content-length", b"\xb2"),))).status == 413


def test_a_body_that_does_not_arrive_times_out():
    refused = refusal(Intake(SMALL), request(b"01", ends=False))
    assert (refused.status, refused.headers) == (408, {"Connection": "close"})


def test_bodies_together_are_bounded():
    async def both():
        with intake.holding() as first, intake.holding() as second:
            await intake.read(request(b"0123456789"), first)
            await intake.read(request(b"01234"), second)
            assert intake.bytes == 15
            with intake.holding() as third, pytest.raises(RequestRefused) as caught:
                await intake.read(request(b"0"), third)
            return caught.value

    intake = Intake(SMALL)
    refused = asyncio.run(both())
    assert (refused.status, refused.headers) == (429, {"Retry-After": "1"}) and intake.bytes == 0


@pytest.mark.parametrize("depth", [1, 2, 31, 32])
def test_json_up_to_the_depth_is_accepted(depth):
    body = b"[" * depth + b"]" * depth
    assert json.dumps(parse_json(body, depth)).encode() == body
    with pytest.raises(RequestRefused, match=f"nested more than {depth} deep"):
        parse_json(b"[" + body + b"]", depth)


def test_depth_is_that_of_the_deepest_object_or_list():
    assert parse_json(b'{"a": [{"b": 1}], "c": 2}', 3) == {"a": [{"b": 1}], "c": 2}
    with pytest.raises(RequestRefused, match="nested more than 2 deep"):
        parse_json(b'{"a": [{"b": 1}], "c": 2}', 2)


DEEP = b"[" * 9000


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"NaN", b'"\\ud800"', b"1" * 5000, b'{"a":1} x', DEEP, DEEP + b"]" * 9000]
)
def test_what_is_not_json_is_refused(body):
    with pytest.raises(RequestRefused) as caught:
        parse_json(body, 32)
    assert caught.value.status == 400


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(body):
    try:
        expected = parse_json(body, 5)
    except RequestRefused as refused:
        assert refused.status == 400 and "\n" not in refused.message
    else:
        assert json.loads(body) == expected


@given(st.text(max_size=2000))
def test_a_refusal_is_one_line_of_bounded_length(text):
    message = RequestRefused(400, text).message
    assert len(message) <= MAX_MESSAGE and len(message.splitlines()) <= 1
