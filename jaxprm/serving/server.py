"""A reward model behind a port: who may connect, start, warm-up, and a shutdown that answers what was accepted."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from jaxprm import config as config_lib
from jaxprm import progress
from jaxprm.api import Model
from jaxprm.artifacts.directory import find_model, read_recipe
from jaxprm.errors import UserError
from jaxprm.scoring import loading

# Checked here, because classes below derive from uvicorn's.
try:
    import uvicorn
    from starlette.applications import Starlette
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from jaxprm.serving import hosts
    from jaxprm.serving.app import ServerMetrics, Service, make_app
    from jaxprm.serving.batcher import SHAPES, Answers, Batcher
    from jaxprm.serving.http1 import Protocol
    from jaxprm.serving.requests import RequestLimits
except ModuleNotFoundError as error:
    packages = "pip install uvicorn starlette prometheus-client"
    raise UserError(f"serve needs {error.name}, which is not installed: {packages}") from None

# Smaller than a search has them: the memory of a server stops growing after some thousand requests.
HOST_CACHES = {"scores": 1 << 14, "renderings": 8 << 20, "texts": 8 << 20}
TOKEN_VARIABLE = "JAXPRM_TOKEN"
# Seconds between checks of the connections, and for which an idle client may delay the shutdown.
_CHECK_SECONDS, _SHUTDOWN_SECONDS = 0.5, 5.0
# Connections that wait to be accepted; uvicorn's number.
_BACKLOG = 2048


def serve_verb(options: argparse.Namespace) -> int:
    """`python -m jaxprm serve`. Raises UserError as `serve`."""
    serve(
        options.model,
        host=options.host,
        port=options.port,
        rows=options.rows,
        dtype=options.dtype,
        add_bos=options.add_bos,
        template=options.chat_template,
        reasoning=options.reasoning,
        special_tokens=options.special_tokens,
        mesh=config_lib.parse_mesh(options.mesh) if options.mesh else loading.all_devices(),
        limits=RequestLimits(
            tokens=options.max_tokens,
            candidates=options.max_candidates,
            body_bytes=options.max_body,
            waiting=options.max_waiting,
        ),
        name=options.served_model_name,
        allowed_hosts=options.allow_host or (),
        private=options.private,
    )
    return 0


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    dtype: str = "float32",
    template: str | None = None,
    reasoning: Literal["keep", "drop"] | None = None,
    special_tokens: Literal["error", "break"] | None = None,
    mesh: config_lib.MeshConfig | None = None,
    limits: RequestLimits = RequestLimits(),
    add_bos: bool = False,
    name: str | None = None,
    allowed_hosts: Sequence[str] = (),
    private: bool = False,
) -> None:
    """Serves a reward model until SIGTERM or SIGINT, then answers the accepted requests and returns.

    Clients must send the token in the environment's JAXPRM_TOKEN, if it is set. Without a token, they must use a name
    of the loopback interface, `host`, or one of `allowed_hosts`; with a token, any name unless `allowed_hosts` is set.

    Args:
      model: as for `jaxprm.load`.
      port: 0 for any free port.
      rows, dtype, template, reasoning, special_tokens: as in scoring.loading.load_scorer.
      add_bos: put the begin-of-text token before texts of /classify that lack it, instead of refusing them.
      mesh: devices of this process that share the work; None is the first device alone.
      name: of the model, for clients; None: its name on the hub, its label, or the name of its directory.
      private: connections share no caches, see docs/serve.md.

    Raises UserError for a host that other machines can reach without a token, an address that cannot be bound, and a
    model that `jaxprm.load` refuses.
    """
    token = read_token(os.environ)
    names = frozenset(map(hosts.parse_host, allowed_hosts))
    # Before the model is loaded, which may take minutes: a taken port is reported at once.
    listening = bind(host, port, token)
    try:
        directory = find_model(model)
        scorer = loading.load_scorer(
            directory,
            rows=rows,
            max_tokens=limits.tokens,
            dtype=dtype,
            template=template,
            reasoning=reasoning,
            special_tokens=special_tokens,
            mesh=mesh,
            shapes=SHAPES,
        )
        scorer.bound_caches(**HOST_CACHES)
        recipe, metrics = read_recipe(directory), ServerMetrics()
        answers = Answers(scorer, Model(scorer, recipe), limits, add_bos=add_bos)
        batcher = Batcher(
            answers,
            lambda check_open: _warm_up(answers, check_open),
            limits,
            on_batch=lambda count, seconds: metrics.count_batch(count, seconds, answers.usage),
        )
        metrics.watch(unanswered=lambda: batcher.unanswered, ready=lambda: batcher.state == "ready")
        if token is None and (own_name := hosts.host_of(host)):
            names |= {own_name}
        service = Service(
            batcher,
            metrics,
            limits,
            name or public_name(str(model), recipe, directory),
            token,
            hosts=names if names or token is None else None,
            private=private,
        )
        address, bound_port, *_ = listening.getsockname()
        url = f"http://{f'[{address}]' if ':' in address else address}:{bound_port}"
        _print(f"serving {model} on {url}; warming up")
        run(service, listening)
    finally:
        listening.close()
    if isinstance(batcher.error, UserError):
        raise batcher.error
    if batcher.error is not None:
        raise RuntimeError("the warm-up failed") from batcher.error


def read_token(environment: Mapping[str, str]) -> str | None:
    """The token of JAXPRM_TOKEN. Raises UserError, which does not show it, if no header could carry it."""
    token = environment.get(TOKEN_VARIABLE)
    if token is not None and not re.fullmatch(r"[\x21-\x7e]{8,}", token):
        raise UserError(
            f"{TOKEN_VARIABLE}: must be at least 8 printable ASCII characters without spaces; unset it for none"
        )
    return token


def public_name(model: str, recipe: Mapping[str, Any], directory: Path) -> str:
    """The name of a model for clients, which shows no path of this machine."""
    label = recipe.get("label")
    if not Path(model).exists():
        # A name on the hub.
        return model
    return label if isinstance(label, str) and label else directory.resolve().name


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that listens on the host's first address. Connections wait until the server accepts them.

    Raises UserError if other machines could reach it without a token, or the address cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} of {host}: must be 0 to 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"host {host}: {getattr(error, 'strerror', None) or error}") from None
    family, kind, _, _, address = addresses[0]
    # An IPv6 address may end with its interface, "%eth0".
    if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"host {host}: others can reach it; set {TOKEN_VARIABLE} to a secret for clients, or use 127.0.0.1"
        )
    listening = socket.socket(family, kind)
    try:
        # Otherwise a restart fails as long as closed connections of the server before are in TIME_WAIT.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # At once: two sockets may be bound to one port as long as neither listens.
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}, port {port}: {reason}; choose another --port or --host") from None
    return listening


def run(service: Service, listening: socket.socket) -> None:
    """Serves on a socket until a signal. Starts and closes the service's batcher."""
    try:
        make_server(service).run(sockets=[listening])
    finally:
        service.batcher.close()


def make_server(service: Service) -> uvicorn.Server:
    """The server of `run`, which starts the service's batcher."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # In its own thread: the server answers /health and refuses requests while the model warms up.
        service.batcher.start()
        watching = asyncio.create_task(_watch(server, service))
        yield
        watching.cancel()

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _Server(
        uvicorn.Config(
            make_app(service, lifespan),
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            # uvicorn takes whole seconds.
            timeout_keep_alive=max(1, round(service.limits.idle_seconds)),
        )
    )
    return server


class _Server(uvicorn.Server):
    """Exits with status 0 after a signal: uvicorn's own server raises the signal again when it has shut down."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second Ctrl-C does not wait for the answers.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


async def _watch(server: uvicorn.Server, service: Service) -> None:
    """Reports when the model is ready, ends a server whose warm-up failed, and closes idle connections.

    Idle connections send no request, or do not read their response. uvicorn waits for both without a limit.
    """
    began, ready = time.monotonic(), False
    # Connections without a request in progress: their last request, and the time since when.
    idle: dict[H11Protocol, tuple[object, float]] = {}
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        if service.batcher.error is not None:
            server.should_exit = True
        if not ready and service.batcher.state == "ready":
            ready = True
            _print(f"ready after {time.monotonic() - began:.0f} s")
        now = time.monotonic()
        bound = _SHUTDOWN_SECONDS if server.should_exit else service.limits.idle_seconds
        before, idle = idle, {}
        for connection in server.server_state.connections:
            if connection.cycle is None or connection.cycle.response_complete:
                cycle, since = before.get(connection, (None, now))
                # Another request since the last check: the time starts again.
                idle[connection] = (connection.cycle, since if cycle is connection.cycle else now)
        for connection, (_, since) in idle.items():
            if now - since > bound:
                # Not close(), which waits until the client has read what is buffered.
                connection.transport.abort()


def _warm_up(answers: Answers, check_open: Callable[[], None]) -> None:
    with progress.bar("warm-up", None, unit="program") as show:

        def on_program() -> None:
            check_open()
            show.update()

        answers.warm_up(on_program)


def _print(line: str) -> None:
    print(f"jaxprm: {line}", file=sys.stderr, flush=True)
