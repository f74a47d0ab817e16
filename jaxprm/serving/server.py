"""A reward model on a port: who may reach it, start, warm-up, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxprm import config as config_lib
from jaxprm import progress
from jaxprm.api import Model
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.serving.app import ServerMetrics, Service, error_response, make_app
from jaxprm.serving.batcher import SHAPES, Answers, Batcher
from jaxprm.serving.requests import RequestLimits, RequestRefused

TOKEN = "JAXPRM_TOKEN"
# Seconds between looks at the connections, and for which a client may keep a server that is shutting down.
_LOOK, _LAST = 0.5, 5.0


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    dtype: str = "float32",
    template: str | None = None,
    mesh: config_lib.MeshConfig | None = None,
    limits: RequestLimits = RequestLimits(),
) -> None:
    """Serves a reward model until SIGTERM or SIGINT, then answers what was accepted and returns.

    mesh: the devices of this process that share the work; None is the first of them.
    Only who has the token in the environment's JAXPRM_TOKEN is answered, where there is one.

    Raises UserError for a host that others reach without a token, a port that is taken, and as `jaxprm.load`.
    """
    token = read_token(os.environ)
    listening = bind(host, port, token)
    try:
        found = find_model(model)
        scorer = loading.load_scorer(
            found, rows=rows, max_tokens=limits.tokens, dtype=dtype, template=template, mesh=mesh, shapes=SHAPES
        )
        answers, metrics = Answers(scorer, Model(scorer, read_recipe(found)), limits), ServerMetrics()
        batcher = Batcher(
            answers,
            lambda go_on: _warm_up(answers, go_on),
            limits,
            done=lambda count, seconds: metrics.computed(count, seconds, answers.usage),
        )
        metrics.watch(unanswered=lambda: batcher.unanswered, ready=lambda: batcher.state == "ready")
        service = Service(batcher, metrics, limits, str(model), token)
        shown, at, *_ = listening.getsockname()
        _say(f"serving {model} on http://{f'[{shown}]' if ':' in shown else shown}:{at}; warming up")
        run(service, listening)
    finally:
        listening.close()
    if isinstance(batcher.error, UserError):
        raise batcher.error
    if batcher.error is not None:
        raise RuntimeError("the warm-up failed") from batcher.error


def read_token(environment: Mapping[str, str]) -> str | None:
    """The token, never shown. Raises UserError for one that no header could carry."""
    token = environment.get(TOKEN)
    if token is not None and not re.fullmatch(r"[\x21-\x7e]{8,}", token):
        raise UserError(f"{TOKEN}: must be at least 8 printable ASCII characters without spaces; unset it for none")
    return token


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A socket bound to the host's first address; nobody can connect before it listens.

    Raises UserError where others could reach it and need no token, and where the address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} of {host}: must be 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"host {host}: {getattr(error, 'strerror', None) or error}") from None
    family, kind, _, _, address = found[0]
    if token is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise UserError(f"host {host}: others can reach it; set {TOKEN} to a secret for clients, or use 127.0.0.1")
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}, port {port}: {reason}; choose another --port or --host") from None
    return listening


def run(service: Service, listening: socket.socket) -> None:
    """Serves on a bound socket until told to end. The service's batcher is started and closed."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batcher.start()
        watching = asyncio.create_task(_watch(server, service))
        yield
        watching.cancel()

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _Server(
        uvicorn.Config(
            make_app(service, lifespan),
            http=_Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, round(service.limits.idle_seconds)),
        )
    )
    try:
        server.run(sockets=[listening])
    finally:
        service.batcher.close()


class _Server(uvicorn.Server):
    """Ends with status 0 when it is told to: uvicorn's own gives itself the signal once more at its end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class _Protocol(H11Protocol):
    """Refuses what is not HTTP in the form of all other refusals."""

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = error_response(RequestRefused(400, msg, Connection="close"))
            head = h11.Response(status_code=400, headers=refusal.raw_headers, reason=b"Bad Request")
            self.transport.write(self.conn.send(head) + self.conn.send(h11.Data(data=refusal.body)))
        self.transport.close()


async def _watch(server: uvicorn.Server, service: Service) -> None:
    """Says when the model is ready, ends a server without one, and closes connections on which nothing happens.

    Those are the ones that send no request, or do not take their answer: uvicorn waits for both without end.
    """
    began, ready = time.monotonic(), False
    resting: dict[H11Protocol, tuple[object, float]] = {}
    while True:
        await asyncio.sleep(_LOOK)
        if service.batcher.error is not None:
            server.should_exit = True
        if not ready and service.batcher.state == "ready":
            ready = True
            _say(f"ready after {time.monotonic() - began:.0f} s")
        now, bound = time.monotonic(), _LAST if server.should_exit else service.limits.idle_seconds
        before, resting = resting, {}
        for one in server.server_state.connections:
            if one.cycle is None or one.cycle.response_complete:
                cycle, since = before.get(one, (None, now))
                resting[one] = (one.cycle, since if cycle is one.cycle else now)
        for one, (_, since) in resting.items():
            if now - since > bound:
                one.transport.abort()


def _warm_up(answers: Answers, go_on: Callable[[], None]) -> None:
    with progress.bar("warm-up", None, unit="program") as show:

        def each() -> None:
            go_on()
            show.update()

        answers.warm_up(each)


def _say(line: str) -> None:
    print(f"jaxprm: {line}", file=sys.stderr, flush=True)
