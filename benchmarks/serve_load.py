"""Puts a server under load: many clients, requests of all sizes, garbage, slow and disconnecting clients.

    python -m benchmarks.serve_load --model DIR [--requests 36000] [--clients 16] [--json FILE]

Starts `python -m jaxprm serve` and sends the requests from one thread a client. Half of the answers are compared with
those of the same model in Python. Most of the others are unlike all before, so that a leak of memory shows. A tenth is
garbage. Prints how many were answered, refused, wrong and lost, the largest difference, times, and the memory
of the server. Exits with status 1 if any answer was wrong or lost.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

JSON = {"Content-Type": "application/json"}
ITEMS = ("oak log", "oak planks", "stick", "iron ingot", "lantern", "torch", "coal")
# Time for the server to compile all programs on a busy machine.
START_SECONDS = 1800
ACTIONS, CLASSIFY = "/v1/score_actions", "/classify"


class Case(NamedTuple):
    """A request, the status it must get, and the promises it must get, if they are known."""

    path: str
    body: bytes
    status: int = 200
    promises: list[float] | None = None


class Server:
    """A running `jaxprm serve`. log: its output so far."""

    def __init__(self, process: subprocess.Popen, log: Path, port: int):
        self.process, self._log, self.port = process, log, port

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def rss(self) -> float:
        """Resident memory, MB."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metric(self, line: str, headers: dict[str, str] | None = None) -> float:
        """The value of a line of /metrics, 0 if the line is missing."""
        match = re.search(rf"^{re.escape(line)} (\S+)$", self.get("/metrics", headers)[1], re.MULTILINE)
        return float(match[1]) if match else 0.0


@contextmanager
def serving(
    model: Path, *options: str, program: Sequence[str] = ("-m", "jaxprm"), **environment: str
) -> Iterator[Server]:
    """A server on a free port, ready for requests. It is killed at the end of the block if it still runs.

    program: arguments of Python that run jaxprm.
    """
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="serve-load-") as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *program, "serve", "--model", str(model), "--port", "0", *options],
                env=os.environ | {"PYTHONPATH": str(root)} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        server = Server(process, log, 0)
        try:
            deadline = time.monotonic() + START_SECONDS
            while "ready after" not in server.log:
                assert process.poll() is None and time.monotonic() < deadline, server.log
                time.sleep(0.1)
            server.port = int(re.search(r"http://\S+:(\d+)", server.log)[1])
            yield server
        finally:
            process.kill()
            process.wait()


def conversation(rng: random.Random, name: str, turns: int) -> list[dict[str, str]]:
    """Messages up to the agent's turn. The name makes them differ from all other conversations."""
    messages = [{"role": "user", "content": f"Task {name}. Goal: {rng.choice(ITEMS)}."}]
    for _ in range(turns):
        messages.append({"role": "assistant", "content": f"Action: get {rng.randint(1, 99)} {rng.choice(ITEMS)}"})
        messages.append({"role": "user", "content": f"Got {rng.randint(1, 99)} {rng.choice(ITEMS)}"})
    return messages


def question(rng: random.Random, name: str) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request: actions to score, or a conversation to classify."""
    messages = conversation(rng, name, rng.choice((0, 0, 1, 1, 2, 3)))
    actions = [f"Action: get {rng.randint(1, 999)} {rng.choice(ITEMS)}" for _ in range(rng.choice((1, 2, 4, 8)))]
    if rng.random() < 0.7:
        return ACTIONS, {"messages": messages, "candidates": actions}
    return CLASSIFY, {"messages": [*messages, {"role": "assistant", "content": actions[0]}]}


def with_answers(model: Any, count: int) -> list[Case]:
    """Requests with the promises of a `jaxprm.Model`."""
    answered, rng = [], random.Random(0)
    for number in range(count):
        path, body = question(rng, f"known {number}")
        if path == ACTIONS:
            promises = [score.promise for score in model.score_actions(body["messages"], body["candidates"])]
        else:
            promises = [model.score([body["messages"]])[0]["score"]]
        answered.append(Case(path, json.dumps(body).encode(), 200, promises))
    return answered


def garbage(rng: random.Random) -> Case:
    """A request that a server must refuse."""
    return rng.choice(
        (
            Case(ACTIONS, bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400))), 400),
            Case(ACTIONS, b"[" * 5000, 400),
            Case(ACTIONS, json.dumps({"messages": [], "candidates": ["a"]}).encode(), 400),
            Case(ACTIONS, json.dumps({"messages": [{"role": "robot"}], "candidates": ["a"]}).encode(), 400),
            Case(ACTIONS, json.dumps({"messages": conversation(rng, "x", 1), "candidates": ["<|end|>"]}).encode(), 400),
            Case(CLASSIFY, json.dumps({"input": [1 << 40]}).encode(), 400),
            Case(CLASSIFY, json.dumps({"input": [-1, 2]}).encode(), 400),
            Case(CLASSIFY, json.dumps({"input": "long " * 20_000}).encode(), 400),
            Case(CLASSIFY, b'{"input": "' + b"x" * (1 << 21) + b'"}', 413),
            Case("/nowhere", b"{}", 404),
        )
    )


def cases(answered: Sequence[Case], count: int) -> Iterator[Case]:
    """`count` requests: half of them from `answered`, a tenth garbage, the others new."""
    for number in range(count):
        rng = random.Random(f"case {number}")
        share = rng.random()
        if share < 0.5:
            yield rng.choice(answered)
        elif share < 0.6:
            yield garbage(rng)
        else:
            path, body = question(rng, f"new {number}")
            yield Case(path, json.dumps(body).encode())


class Outcome:
    """Results of requests.

    statuses: counts by status; wrong, lost: descriptions of requests with a wrong answer or none; seconds: of those
    with status 200; difference: largest, of `compared` answers; retried: repeated after a 429.
    """

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self.seconds: list[float] = []
        self.difference = 0.0
        self.compared = self.retried = 0
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        return sum(self.statuses.values())

    def record(self, case: Case, status: int, body: bytes, seconds: float) -> None:
        try:
            answer = json.loads(body)
            values = _promises(answer) if status == 200 else [answer["error"]["message"]]
            one_line = body.count(b"\n") == 1
        except (ValueError, KeyError, TypeError, IndexError) as error:
            values, one_line = [], False
            answer = f"{error!r}: {body[:200]!r}"
        with self._lock:
            self.statuses[status] += 1
            right = status == case.status and values and one_line
            if right and status == 200:
                self.seconds.append(seconds)
                right = np.isfinite(values).all() and (case.promises is None or len(values) == len(case.promises))
            if right and case.promises is not None:
                self.compared += 1
                difference = max(abs(value - expected) for value, expected in zip(values, case.promises, strict=True))
                self.difference = max(self.difference, difference)
                right = difference <= 1e-5 * max(1.0, *map(abs, case.promises))
            if not right:
                got = f"{status}, expected {case.status}: {str(answer)[:300]}"
                self.wrong.append(f"{case.path} {case.body[:200]!r}: {got}")


def _promises(answer: Any) -> list[float]:
    if "scores" in answer:
        return [score["promise"] for score in answer["scores"]]
    return [answer["data"][0]["probs"][0]]


def send(
    port: int, requests: Iterator[Case], clients: int, outcome: Outcome, *, patient: bool = True, token: str = ""
) -> None:
    """Sends requests from `clients` threads, each over one connection. patient: repeats a request after a 429."""
    headers = JSON | ({"Authorization": f"Bearer {token}"} if token else {})
    lock = threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while True:
            with lock:  # a generator cannot be advanced by two threads at once
                case = next(requests, None)
            if case is None:
                break
            _send_one(connection, case, headers, outcome, patient)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send_one(
    connection: http.client.HTTPConnection, case: Case, headers: dict[str, str], outcome: Outcome, patient: bool
) -> None:
    began, attempts = time.perf_counter(), 0
    while True:
        try:
            connection.request("POST", case.path, case.body, headers)
            response = connection.getresponse()
            status, body = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            # A server that refuses a body unread may close while it is still being sent.
            if case.status == 413 and attempts < 5 and isinstance(error, (BrokenPipeError, ConnectionResetError)):
                attempts += 1
                continue
            outcome.lost.append(f"{case.path} {case.body[:100]!r}: {error!r}")
            return
        if status == 429 and patient:
            assert int(response.headers["Retry-After"]) >= 1
            outcome.retried += 1
            time.sleep(0.05)
            continue
        outcome.record(case, status, body, time.perf_counter() - began)
        return


@contextmanager
def nuisances(port: int) -> Iterator[None]:
    """Runs clients that send headers and no body, disconnect before their answer, or do not speak HTTP."""
    stop = threading.Event()
    kind = "Content-Type: application/json\r\nContent-Length: 1000"
    head = f"POST {ACTIONS} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n".encode()
    body = json.dumps({"messages": conversation(random.Random(0), "gone", 3), "candidates": ["a", "b"]}).encode()
    complete = head.replace(b"1000", str(len(body)).encode()) + body

    def bother() -> None:
        connections: list[socket.socket] = []
        for number in itertools.count():
            if stop.wait(0.05):
                break
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=10)
                connection.sendall((head + b"{", complete, b"\x16\x03\x01 not HTTP\r\n\r\n", head[:20])[number % 4])
            except OSError:
                continue
            connections.append(connection)
            if len(connections) > 20:
                connections.pop(0).close()
        for connection in connections:
            connection.close()

    thread = threading.Thread(target=bother)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def sampling(server: Server, outcome: Outcome, every: float = 0.1) -> Iterator[list[tuple[int, float]]]:
    """A list that fills with (answers so far, resident MB of the server), one entry every `every` seconds."""
    samples: list[tuple[int, float]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(every):
            samples.append((outcome.done, server.rss()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def slope(samples: Sequence[tuple[int, float]], blocks: int = 8) -> float:
    """Growth of memory in MB per thousand requests: the median over blocks of the second half."""
    # Caches fill in the first half. A leak grows in every block; the pool of the allocator, which grows once when many
    # requests come together, in one.
    second_half = [sample for sample in samples if sample[0] >= samples[-1][0] / 2]
    slopes = [np.polyfit(*block.T, 1)[0] for block in np.array_split(np.asarray(second_half), blocks)]
    return float(np.median(slopes) * 1000)


def growth(samples: Sequence[tuple[int, float]]) -> float:
    """Growth of memory over the second half of the requests, as a share of the memory at its beginning."""
    second_half = [memory for done, memory in samples if done >= samples[-1][0] / 2]
    # Medians of a twentieth: single samples may be in the middle of a batch.
    end = max(1, len(second_half) // 20)
    return float(np.median(second_half[-end:]) / np.median(second_half[:end]) - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=36_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--known", type=int, default=100, help="requests whose answers are compared; default 100")
    parser.add_argument("--max-tokens", type=int, default=480)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    import jaxprm

    answered = with_answers(jaxprm.load(options.model, rows=2, max_tokens=options.max_tokens), options.known)
    outcome = Outcome()
    with serving(options.model, "--max-tokens", str(options.max_tokens), "--rows", "2") as server:
        before, began = server.rss(), time.perf_counter()
        with nuisances(server.port), sampling(server, outcome) as samples:
            send(server.port, cases(answered, options.requests), options.clients, outcome)
        seconds, after = time.perf_counter() - began, server.rss()
        batches = server.metric("jaxprm_batch_requests_sum") / server.metric("jaxprm_batch_requests_count")
        server.process.send_signal(signal.SIGTERM)
        ended = server.process.wait(60)
    report = {
        "requests": options.requests,
        "clients": options.clients,
        "statuses": dict(sorted(outcome.statuses.items())),
        "asked_again_after_429": outcome.retried,
        "compared": outcome.compared,
        "largest_difference": outcome.difference,
        "wrong": len(outcome.wrong),
        "lost": len(outcome.lost),
        "requests_a_batch": batches,
        "seconds": seconds,
        "requests_a_second": outcome.done / seconds,
        "latency_seconds": dict(zip(("p50", "p99"), np.percentile(outcome.seconds, (50, 99)).tolist(), strict=True)),
        "rss_mb": {"ready": before, "half": samples[len(samples) // 2][1], "end": after},
        "rss_slope_mb_per_1000": slope(samples),
        "rss_growth_in_second_half": growth(samples),
        "exit_status": ended,
    }
    print(json.dumps(report, indent=2))
    print(*outcome.wrong[:5], *outcome.lost[:5], sep="\n", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report | {"samples": samples}))
    return 1 if outcome.wrong or outcome.lost or ended else 0


if __name__ == "__main__":
    sys.exit(main())
