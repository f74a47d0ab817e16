"""A stand-in for the model: answers that identify their requests, and that can be delayed or made to fail."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import httpx2

from jaxprm.api import ActionScore
from jaxprm.serving.app import ServerMetrics, Service, make_app
from jaxprm.serving.batcher import Asked, Batcher
from jaxprm.serving.requests import RequestLimits, ScoreActions, Values
from jaxprm.serving.server import bind, make_server

JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "Goal: torch"}]


class Model:
    """Answers with the lengths of candidates or inputs. It waits while `going` is cleared, and raises `fail` if set."""

    def __init__(self) -> None:
        self.going, self.begun = threading.Event(), threading.Event()
        self.going.set()
        self.batches: list[int] = []
        self.fail: Exception | None = None
        self.owners: list[int] = []

    def __call__(self, requests: Sequence[Asked]) -> list:
        self.batches.append(len(requests))
        # Tests of the batcher alone ask with anything.
        asked = [request if isinstance(request, Asked) else Asked(request) for request in requests]
        self.owners += [owner for _, owner in asked]
        self.begun.set()
        assert self.going.wait(30)
        if self.fail:
            raise self.fail
        return [self._answer(request) for request, _ in asked]

    def _answer(self, request):
        if isinstance(request, ScoreActions):
            return [ActionScore(float(len(candidate)), None) for candidate in request.candidates]
        inputs = request.inputs or [request.messages]
        return Values([float(len(each)) for each in inputs], [len(each) for each in inputs])


def batcher(model, limits: RequestLimits = RequestLimits(), warm_up=lambda go_on: None) -> Batcher:
    return Batcher(model, warm_up, limits)


async def ready(batcher: Batcher) -> None:
    """Starts a batcher and waits for the end of its warm-up."""
    batcher.start()
    async with asyncio.timeout(10):
        while batcher.state != "ready":
            await asyncio.sleep(0.001)


def client(
    batcher: Batcher,
    limits: RequestLimits = RequestLimits(),
    token: str | None = None,
    metrics: ServerMetrics | None = None,
    **settings,
):
    """An HTTP client of the application itself, without a socket."""
    service = Service(batcher, metrics or ServerMetrics(), limits, "some-model", token, **settings)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(make_app(service)), base_url="http://test")


def error(response) -> dict:
    """The error of a response, checked to be one line of JSON."""
    assert response.text.endswith("\n") and response.text.count("\n") == 1
    assert response.headers["content-type"] == "application/json"
    details = response.json()["error"]
    assert details["code"] == response.status_code
    return details


@contextlib.contextmanager
def listening(**settings) -> Iterator[tuple[int, Model]]:
    """(port, model) of a server with real sockets on the loopback interface."""
    model = Model()
    service = Service(batcher(model), ServerMetrics(), RequestLimits(), "some-model", **settings)
    server, sock = make_server(service), bind("127.0.0.1", 0, None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while service.batcher.state != "ready":
            time.sleep(0.01)
        yield sock.getsockname()[1], model
    finally:
        server.should_exit = True
        thread.join()
        service.batcher.close()
        sock.close()
