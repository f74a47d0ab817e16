"""A real server under load: right answers, flat memory, and a shutdown that loses no request."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import jaxprm
from benchmarks import serve_load
from benchmarks.serve_load import ACTIONS, CLASSIFY, Case, Outcome, Server
from tests.model import tiny

pytestmark = pytest.mark.slow

TOKEN = "a-token-that-is-never-shown"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
OPTIONS = ("--max-tokens", "480", "--rows", "2")
REQUESTS = 3000
# The server with caches that are full after a few requests: memory that still grows is a leak.
SMALL_CACHES = """
from jaxprm.host_memory import keep_freed
keep_freed()
import jaxprm.model.prefix_bank, jaxprm.serving.server
for module, name, size in (
    (jaxprm.model.prefix_bank, "MAX_DROPPED_PREFIXES", 200),
    (jaxprm.serving.server, "HOST_CACHES", {"scores": 200, "renderings": 1 << 20, "texts": 1 << 20}),
):
    assert hasattr(module, name), name  # a renamed bound would be set in vain
    setattr(module, name, size)
from jaxprm.__main__ import run
run()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tiny.write_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def answered(directory) -> list[Case]:
    return serve_load.with_answers(jaxprm.load(directory, rows=2, max_tokens=480), 40)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment with a compilation cache that all servers of these tests share."""
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def server(directory, environment):
    program = ("-c", SMALL_CACHES)
    with serve_load.serving(directory, *OPTIONS, program=program, JAXPRM_TOKEN=TOKEN, **environment) as server:
        yield server


def right(outcome: Outcome) -> None:
    assert outcome.wrong == [] and outcome.lost == []


def test_many_clients_get_their_own_answers_and_memory_is_flat(server: Server, answered):
    outcome = Outcome()
    with serve_load.nuisances(server.port), serve_load.sampling(server, outcome) as samples:
        serve_load.send(server.port, serve_load.cases(answered, REQUESTS), 16, outcome, token=TOKEN)
    right(outcome)
    assert outcome.done == REQUESTS and outcome.compared > 0.4 * REQUESTS
    assert {200, 400, 404, 413} <= outcome.statuses.keys() <= {200, 400, 404, 413}
    # The scores of different questions are further apart than what is allowed between equal ones.
    assert len({round(promise, 3) for case in answered for promise in case.promises}) > len(answered)
    assert serve_load.slope(samples) < 4.0  # MB a thousand requests
    (early,) = [memory for done, memory in samples if done >= REQUESTS / 5][:1]
    assert samples[-1][1] - early < 64
    together = [server.metric(f"jaxprm_batch_requests_{name}", HEADERS) for name in ("sum", "count")]
    assert together[0] > 1.5 * together[1]


def test_classifications_in_every_form_are_the_score(server: Server, answered, directory):
    encoder, cases = tiny.encoder(), []
    for case in (case for case in answered if case.path == CLASSIFY):
        messages = json.loads(case.body)["messages"]
        tokens, text = encoder.trajectory(messages, row="").tokens.tolist(), encoder.render(messages)
        cases += [case._replace(body=json.dumps({"input": item}).encode()) for item in (text, [text], tokens, [tokens])]
    assert len(cases) > 20
    outcome = Outcome()
    serve_load.send(server.port, iter(cases), 4, outcome, token=TOKEN)
    right(outcome)
    assert outcome.compared == len(cases)


def test_slow_and_silent_clients_do_not_delay_others(server: Server, answered):
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
    try:
        for number, item in enumerate(held):
            head = f"POST {ACTIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            body = "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"
            item.sendall((head + body if number % 3 else head[:20] if number % 2 else "").encode())
        outcome = Outcome()
        serve_load.send(server.port, iter(answered[:10]), 2, outcome, token=TOKEN)
        right(outcome)
        assert outcome.done == 10
    finally:
        for item in held:
            item.close()


def test_requests_without_the_token_are_refused_and_it_is_not_shown(server: Server, answered):
    outcome = Outcome()
    serve_load.send(server.port, iter([answered[0]._replace(status=401, promises=None)]), 1, outcome)
    right(outcome)
    assert server.get("/metrics")[0] == 401 and server.get("/health")[0] == 200
    assert TOKEN not in server.log and TOKEN not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


def test_requests_beyond_the_queue_are_refused_and_the_others_are_right(directory, environment, answered):
    with serve_load.serving(directory, *OPTIONS, "--max-waiting", "2", **environment) as server:
        impatient, patient = Outcome(), Outcome()
        cases = (case._replace(status=429, promises=None) for case in answered * 5)
        other = threading.Thread(
            target=serve_load.send, args=(server.port, cases, 12, impatient), kwargs={"patient": False}
        )
        other.start()
        serve_load.send(server.port, iter(answered * 2), 12, patient)
        other.join()
        right(patient)
        assert patient.done == 2 * len(answered) and patient.retried + impatient.statuses[429] > 0
        assert impatient.lost == [] and impatient.statuses.keys() <= {200, 429}
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0 and "Traceback" not in server.log


def test_several_devices_give_the_same_answers(directory, environment, answered):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with serve_load.serving(directory, *OPTIONS, "--mesh", "tensor=2", **environment, **devices) as server:
        outcome = Outcome()
        serve_load.send(server.port, iter(answered), 4, outcome)
        right(outcome)
        assert outcome.compared == len(answered)


def test_sigterm_under_load_loses_no_accepted_request(server: Server):
    """The last test, as it ends the server. Its requests are slow, so that most are waiting when the signal comes."""
    count, outcome = 24, Outcome()
    inputs = [[index % 300] * 470 for index in range(64)]
    body = json.dumps({"input": inputs}).encode()
    done = 'jaxprm_requests_total{endpoint="/classify",status="200"}'
    before = server.metric(done, HEADERS)
    cases = iter([Case(CLASSIFY, body)] * count)
    asking = threading.Thread(
        target=serve_load.send, args=(server.port, cases, count, outcome), kwargs={"token": TOKEN}
    )
    asking.start()
    deadline = time.monotonic() + 300
    while True:
        waiting = server.metric("jaxprm_unanswered_requests", HEADERS)
        if waiting + server.metric(done, HEADERS) - before >= count:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert waiting > 2
    server.process.send_signal(signal.SIGTERM)
    asking.join()
    right(outcome)
    assert outcome.statuses == {200: count}
    assert server.process.wait(60) == 0 and "Traceback" not in server.log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
