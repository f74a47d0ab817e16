"""The HTTP endpoints and their metrics: valid requests go to the batcher, others get one line of JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxprm.serving import hosts, requests
from jaxprm.serving.batcher import Asked, Batcher
from jaxprm.serving.requests import INTERNAL_ERROR, Intake, RequestLimits, RequestRefused

# Buckets of the histograms.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUESTS = (1, 2, 4, 8, 16, 32)


class ServerMetrics:
    """Metrics of one server, see docs/serve.md. The kinds of `jaxprm_tokens_total` are the keys of Scorer.usage."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        # A registry of its own: the default one is global, and two servers in a process would share it.
        registry = {"registry": self._registry}
        self._answers = Counter("jaxprm_requests", "Requests by status", ["endpoint", "status"], **registry)
        self._seconds = Histogram(
            "jaxprm_request_seconds",
            "From the end of a request's headers to its answer, of those with status 200",
            ["endpoint"],
            buckets=_SECONDS,
            **registry,
        )
        self._batches = Histogram("jaxprm_batch_requests", "Requests computed together", buckets=_REQUESTS, **registry)
        self._busy = Counter("jaxprm_model_seconds", "Time spent encoding and computing", **registry)
        self._unanswered = Gauge("jaxprm_unanswered_requests", "Requests accepted and not answered yet", **registry)
        self._ready = Gauge("jaxprm_ready", "1 when the model is warmed up and takes requests", **registry)
        self._usage: dict[str, int] = {}
        self._registry.register(self)

    def watch(self, *, unanswered: Callable[[], int], ready: Callable[[], bool]) -> None:
        """Sets the functions that give the two gauges their values."""
        self._unanswered.set_function(unanswered)
        self._ready.set_function(ready)

    def count_answer(self, endpoint: str, status: int, seconds: float) -> None:
        self._answers.labels(endpoint, str(status)).inc()
        if status == 200:
            self._seconds.labels(endpoint).observe(seconds)

    def count_batch(self, requests: int, seconds: float, usage: dict[str, int]) -> None:
        """Counts a batch. usage: tokens so far. Called by the thread that computes."""
        self._batches.observe(requests)
        self._busy.inc(seconds)
        self._usage = usage

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters of tokens, for the registry: the scorer counts them, so there is nothing to increment."""
        family = CounterMetricFamily("jaxprm_tokens", "Tokens of the model so far", labels=["kind"])
        for kind, count in self._usage.items():
            family.add_metric([kind], count)
        yield family

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


Handler = Callable[[Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class Service:
    """What the endpoints need.

    Args:
      name: of the model, for clients.
      token: required of clients, None if it is not.
      hosts: names of the server that clients may use, besides those of the loopback interface. None: any name.
      private: connections share no caches.
    """

    batcher: Batcher
    metrics: ServerMetrics
    limits: RequestLimits
    name: str
    token: str | None = dataclasses.field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    private: bool = False


def make_app(
    service: Service, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None
) -> Starlette:
    """The ASGI application of a service. The caller starts and closes the batcher."""
    endpoints = _Endpoints(service)
    routes = [
        Route("/health", endpoints.health, methods=["GET"]),
        *(
            Route(path, endpoints.guarded(path, endpoint), methods=[method])
            for path, method, endpoint in (
                ("/metrics", "GET", endpoints.metrics),
                ("/v1/models", "GET", endpoints.models),
                ("/v1/score_actions", "POST", endpoints.score_actions),
                ("/classify", "POST", endpoints.classify),
            )
        ),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_such_endpoint})
    # Around all routes: a page of another name must not even learn that this server exists.
    app.add_middleware(_OwnNames, service=service)
    # A wrong path gets the JSON of every refusal, not a redirect.
    app.router.redirect_slashes = False
    return app


class _OwnNames:
    """Refuses requests for names that are not the server's, and requests of web pages from elsewhere."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._allowed, self._metrics = app, service.hosts, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._refusal(Request(scope)) if scope["type"] == "http" else None
        if answer is not None:
            self._metrics.count_answer("other", answer.status_code, 0.0)
        await (answer or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if self._allowed is None:
            return None
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not hosts.is_accepted(hosts.host_of(host), self._allowed):
            message = f"Host {host!r} is not a name of this server; start it with --allow-host NAME"
            return error_response(RequestRefused(421, message))
        if origin is not None and not hosts.is_accepted(hosts.origin_host(origin), self._allowed):
            return error_response(RequestRefused(403, f"requests of web pages from {origin!r} are not accepted"))
        return None


class _Endpoints:
    def __init__(self, service: Service):
        self._service = service
        self._intake = Intake(service.limits)
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 while requests are accepted, 503 before and after. Needs no token, so that probes can use it."""
        state = self._service.batcher.state
        return _json({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The model's name, in OpenAI's form: many clients look it up first."""
        model = {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "jaxprm"}
        return _json({"object": "list", "data": [model]})

    async def score_actions(self, request: Request) -> Response:
        limits = self._service.limits
        _, scores = await self._answer(request, lambda value: requests.parse_score_actions(value, limits))
        return _json(requests.score_actions_response(scores, self._service.name))

    async def classify(self, request: Request) -> Response:
        limits, began = self._service.limits, time.perf_counter()
        parsed, values = await self._answer(request, lambda value: requests.parse_classify(value, limits))
        return _json(requests.classify_response(parsed, values, self._service.name, time.perf_counter() - began))

    async def _answer(self, request: Request, parse: Callable[[Any], Any]) -> tuple[Any, Any]:
        """(parsed request, answer of the model)."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Also keeps web pages out: browsers send this type to another site only after asking it (CORS preflight).
        if media_type != "application/json":
            raise RequestRefused(415, "send JSON, with the header Content-Type: application/json")
        with self._intake.holding() as body:
            await self._intake.read(request, body)
            parsed = parse(requests.parse_json(body, self._service.limits.depth))
            asked = Asked(parsed, self._owner(request, parsed.cache_salt))
            return parsed, await self._while_connected(request, self._service.batcher(asked))

    def _owner(self, request: Request, salt: str | None) -> int:
        """Whose caches a request uses: 0 for those that all clients share."""
        if salt is not None:
            return int.from_bytes(_digest(salt)[:16])
        if not self._service.private:
            return 0
        # Without a connection (in tests) the caches of a request are its own.
        return getattr(request.state, "connection", None) or secrets.randbits(128)

    async def _while_connected(self, request: Request, answer: Awaitable[Any]) -> Any:
        """The answer, cancelled if the client disconnects first."""
        # The body has been read, so all that the connection can still bring is its end.
        computing, disconnected = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({computing, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not computing.done():
                raise RequestRefused(400, "the connection was closed before the answer was ready")
            return computing.result()
        finally:
            # Cancelling `computing` cancels the future in the batcher's queue, and the batcher skips it.
            for task in (computing, disconnected):
                task.cancel()

    def guarded(self, path: str, endpoint: Handler) -> Handler:
        """An endpoint that checks the token, counts requests, and turns every exception into an error response."""

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            try:
                self._check_token(request)
                response = await endpoint(request)
            except RequestRefused as refused:
                response = error_response(refused)
            # Any failure is answered in the form of the refusals, and its details stay in the log.
            except Exception:
                logging.getLogger(__name__).exception("a request to %s failed", path)
                response = error_response(RequestRefused(500, INTERNAL_ERROR))
            self._service.metrics.count_answer(path, response.status_code, time.perf_counter() - began)
            return response

        return answer

    def _check_token(self, request: Request) -> None:
        if self._service.token is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # In constant time, and of digests, whose length is constant too: timing reveals nothing of the token.
        matches = hmac.compare_digest(_digest(token.strip()), _digest(self._service.token))
        if scheme.lower() != "bearer" or not matches:
            message = "send the server's token, with the header Authorization: Bearer ..."
            raise RequestRefused(401, message, WWW_Authenticate="Bearer")


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", status, headers, media_type="application/json")


def error_response(refused: RequestRefused) -> Response:
    """{"error": {"message", "type", "code"}}, as OpenAI, vLLM and SGLang have it."""
    error = {"message": refused.message, "type": refused.status.phrase, "code": refused.status.value}
    return _json({"error": error}, refused.status, refused.headers)


async def _no_such_endpoint(request: Request, error: HTTPException) -> Response:
    status = HTTPStatus(error.status_code)
    message = f"{request.method} {request.url.path}: {status.phrase}"
    return error_response(RequestRefused(status, message, **(error.headers or {})))
