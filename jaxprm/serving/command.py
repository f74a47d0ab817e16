"""The `serve` verb: options to limits, and what is missing in one line."""

from __future__ import annotations

import argparse

from jaxprm.errors import UserError


def serve_verb(options: argparse.Namespace) -> int:
    """Serves until it is told to end.

    Raises UserError without the `serve` extra, and as `server.serve`.
    """
    from jaxprm.config import parse_mesh
    from jaxprm.scoring.loading import all_devices

    try:
        from jaxprm.serving import requests, server
    except ModuleNotFoundError as error:
        packages = "pip install uvicorn starlette prometheus-client"
        raise UserError(f"serve needs {error.name}, which is not installed: {packages}") from None
    server.serve(
        options.model,
        host=options.host,
        port=options.port,
        rows=options.rows,
        dtype=options.dtype,
        template=options.chat_template,
        mesh=parse_mesh(options.mesh) if options.mesh else all_devices(),
        limits=requests.RequestLimits(
            tokens=options.max_tokens,
            candidates=options.max_candidates,
            body_bytes=options.max_body,
            waiting=options.max_waiting,
        ),
    )
    return 0
