"""A scripted server of chat completions on the loopback interface, which can misbehave in many ways."""

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
    """A completion whose text is a function of the conversation and the seed."""
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
    """Sends a status, headers and a body; a dict or list is sent as JSON."""

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
    """A reply that sends the bytes `times` times, pausing after each chunk, and closes the connection."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        for _ in range(times):
            for chunk in chunks:
                handler.wfile.write(chunk)
                time.sleep(pause)

    return send


def hang(handler: BaseHTTPRequestHandler) -> None:
    """A reply that sends nothing until the client disconnects."""
    handler.close_connection = True
    handler.connection.settimeout(20)
    assert handler.connection.recv(1) == b""
    handler.server.gone.release()


def reset(handler: BaseHTTPRequestHandler) -> None:
    """A reply that starts a response and resets the connection."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


class FakeServer:
    """A chat-completions server in a thread.

    script: maps a text to the replies to requests whose last message contains it, in turn; the last reply repeats.
    answers: maps the body of any other request to a reply or a completion; serial: one such request at a time.
    requests, headers, times: bodies, headers and arrival times of the requests; max_in_flight: most at once.
    """

    def __init__(self, *, delay: float = 0.0, model: str = MODEL):
        self.model, self.answers, self.serial = model, answer, False
        self._serial_lock = threading.Lock()
        self.script: dict[str, list] = {}
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.delay, self.max_in_flight, self._in_flight = delay, 0, 0
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
                    fake._in_flight += 1
                    fake.max_in_flight = max(fake.max_in_flight, fake._in_flight)
                    reply = fake._scripted(body)
                with fake._serial_lock if fake.serial else contextlib.nullcontext():
                    reply = reply or fake._answer(body)
                try:
                    time.sleep(fake.delay)
                    with fake._lock:
                        fake._in_flight -= 1
                    reply(self)
                except OSError:
                    self.close_connection = True  # the client has disconnected

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
        reply = self.answers(body)
        return reply if callable(reply) else Reply(200, reply | {"model": self.model})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
