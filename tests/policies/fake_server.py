"""A server of chat completions on the loopback that follows a script, and can misbehave in every way a server can."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "org/small-model"
TEXTS = ("up", "down", "wait", "Got 1 stick")


def answer(body: dict) -> dict:
    """A completion whose text depends on the conversation and the seed alone."""
    digest = hashlib.sha256(json.dumps([body["messages"], body.get("seed")]).encode()).digest()
    return completion(TEXTS[digest[0] % len(TEXTS)], tokens=1 + digest[1] % 5)


def completion(text: str | None = "up", *, tokens: int = 2, finish: str | None = "stop", **message: Any) -> dict:
    return {
        "id": "1",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens},
    }


class Reply:
    """Status, headers and body as they are sent; a dict or list is sent as JSON."""

    def __init__(self, status: int, body: Any = b"", **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers.setdefault("Content-Type", "application/json")

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(self.status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.body)))
        handler.end_headers()
        handler.wfile.write(self.body)


def raw(*chunks: bytes, pause: float = 0.0, times: int = 1) -> Callable:
    """Sends bytes as they are, over and over, and closes the connection."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        for _ in range(times):
            for chunk in chunks:
                handler.wfile.write(chunk)
                time.sleep(pause)

    return send


def hang(handler: BaseHTTPRequestHandler) -> None:
    """Says nothing until the other side goes away."""
    handler.close_connection = True
    handler.connection.settimeout(20)
    assert handler.connection.recv(1) == b""
    handler.server.gone.release()


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Begins an answer and resets the connection."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


class FakeServer:
    """`script` maps a text in the last message to the replies its requests get in turn, the last of them for good;
    all other requests get what `answers` makes of their body, a reply or a completion, one at a time where `serial`.
    `requests` are the bodies, `headers` their headers, `times` when they came."""

    def __init__(self, *, delay: float = 0.0, model: str = MODEL):
        self.model, self.answers, self.serial = model, answer, False
        self._one = threading.Lock()
        self.script: dict[str, list] = {}
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.delay, self.most, self._now = delay, 0, 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append(body | {"path": self.path})
                    fake.headers.append(dict(self.headers))
                    fake.times.append(time.monotonic())
                    fake._now += 1
                    fake.most = max(fake.most, fake._now)
                    reply = fake._scripted(body)
                with fake._one if fake.serial else contextlib.nullcontext():
                    reply = reply or fake._answer(body)
                try:
                    time.sleep(fake.delay)
                    with fake._lock:
                        fake._now -= 1
                    reply(self)
                except OSError:
                    self.close_connection = True  # the other side had enough

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 64

            def handle_error(self, request, client_address):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.gone = self.gone = threading.Semaphore(0)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _scripted(self, body: dict) -> Callable | None:
        for text, replies in self.script.items():
            if text in str(body["messages"][-1]["content"]):
                return replies.pop(0) if len(replies) > 1 else replies[0]
        return None

    def _answer(self, body: dict) -> Callable:
        made = self.answers(body)
        return made if callable(made) else Reply(200, made | {"model": self.model})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
