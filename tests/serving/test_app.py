"""The endpoints, without a socket: what is answered, what is refused and how, and who may ask."""

import asyncio
import logging

import pytest

from jaxprm.serving.app import ServerMetrics
from jaxprm.serving.requests import RequestLimits
from tests.serving import fakes
from tests.serving.fakes import JSON, MESSAGES, error

ACTIONS = {"messages": MESSAGES, "candidates": ["abc", "a"]}
SECRET = "a-long-secret"


def served(
    test, *, limits: RequestLimits = RequestLimits(), token: str | None = None, metrics: ServerMetrics | None = None
):
    """Runs `test(client, model)` against the application."""

    async def run():
        model = fakes.Model()
        batcher = fakes.batcher(model, limits)
        await fakes.ready(batcher)
        try:
            async with fakes.client(batcher, limits, token, metrics) as client:
                await test(client, model)
        finally:
            model.going.set()
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())


def test_questions_are_answered():
    async def test(client, model):
        found = await client.post("/v1/score_actions", json=ACTIONS)
        scores = [{"promise": 3.0, "progress": None}, {"promise": 1.0, "progress": None}]
        assert found.status_code == 200 and found.json() == {"model": "some-model", "scores": scores}
        found = (await client.post("/classify", json={"input": ["abc", "de"]})).json()
        assert [one["probs"] for one in found["data"]] == [[3.0], [2.0]] and found["model"] == "some-model"
        assert (await client.post("/classify", json={"input_ids": [5, 6]})).json()["embedding"] == [2.0]
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "some-model"
        assert (await client.get("/health")).json() == {"status": "ready"}

    served(test)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/score_actions", b"{", JSON, 400),
        ("POST", "/v1/score_actions", b"", JSON, 400),
        ("POST", "/v1/score_actions", b'{"messages": []}', JSON, 400),
        ("POST", "/v1/score_actions", b"[" * 33 + b"]" * 33, JSON, 400),
        ("POST", "/v1/score_actions", b" " * 300, JSON, 413),
        ("POST", "/classify", b'{"input": "a"}', {"Content-Type": "text/plain"}, 415),
        ("POST", "/classify", b'{"input": "a"}', {}, 415),
        ("POST", "/classify", b'{"input": ["a", "b", "c"]}', JSON, 400),
        ("POST", "/nothing%0A%20here", b"", {}, 404),
        ("POST", "/classify/", b"{}", JSON, 404),
        ("GET", "/classify", b"", {}, 405),
        ("DELETE", "/health", b"", {}, 405),
    ],
)
def test_every_refusal_is_a_line_of_json(method, path, body, headers, status):
    async def test(client, model):
        found = await client.request(method, path, content=body, headers=headers)
        assert found.status_code == status and error(found)["message"]
        assert model.batches == []
        assert (await client.post("/classify", json={"input": "abc"})).status_code == 200

    served(test, limits=RequestLimits(body_bytes=200, candidates=2))


def test_a_full_queue_is_a_429_with_the_time_to_come_back():
    async def test(client, model):
        model.going.clear()
        asked = [asyncio.create_task(client.post("/classify", json={"input": "a" * n})) for n in (1, 2)]
        await asyncio.to_thread(model.begun.wait, 10)
        await asyncio.sleep(0.05)
        found = await client.post("/classify", json={"input": "abc"})
        assert found.status_code == 429 and error(found) and int(found.headers["retry-after"]) >= 1
        model.going.set()
        assert [one.json()["data"][0]["probs"] for one in await asyncio.gather(*asked)] == [[1.0], [2.0]]

    served(test, limits=RequestLimits(waiting=2))


def test_only_who_has_the_token_is_answered(caplog):
    async def test(client, model):
        wrong = ("", SECRET, f"Basic {SECRET}", "Bearer", "Bearer \xe9", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}")
        guarded = (("POST", "/classify"), ("POST", "/v1/score_actions"), ("GET", "/metrics"), ("GET", "/v1/models"))
        for given in wrong:
            for method, path in guarded:
                found = await client.request(method, path, headers={"Authorization": given.encode("latin-1")})
                assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
                assert SECRET not in error(found)["message"]
        right = {"Authorization": f"Bearer {SECRET}"}
        assert (await client.post("/classify", json={"input": "abc"}, headers=right)).status_code == 200
        assert (await client.get("/metrics", headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == 200  # probes have no token
        model.fail = RuntimeError("broken")
        assert (await client.post("/classify", json={"input": "abc"}, headers=right)).status_code == 500

    caplog.set_level(logging.DEBUG)
    served(test, token=SECRET)
    assert SECRET not in caplog.text and "broken" in caplog.text


def test_a_failure_of_ours_is_a_500_that_tells_nothing():
    async def test(client, model):
        model.fail = RuntimeError("/secret/path")
        found = await client.post("/classify", json={"input": "abc"})
        assert found.status_code == 500 and "secret" not in error(found)["message"]
        model.fail = None
        assert (await client.post("/classify", json={"input": "abc"})).status_code == 200

    served(test)


def test_metrics_count_what_happened():
    async def test(client, model):
        for body in ({"input": "abc"}, {"input": "ab"}, {"input": 1}):
            await client.post("/classify", json=body)
        metrics.count_batch(2, 0.5, {"encoded": 7, "reused": 3})
        lines = (await client.get("/metrics")).text.splitlines()
        for line in (
            'jaxprm_requests_total{endpoint="/classify",status="200"} 2.0',
            'jaxprm_requests_total{endpoint="/classify",status="400"} 1.0',
            'jaxprm_request_seconds_count{endpoint="/classify"} 2.0',
            "jaxprm_batch_requests_sum 2.0",
            "jaxprm_model_seconds_total 0.5",
            'jaxprm_tokens_total{kind="encoded"} 7.0',
            'jaxprm_tokens_total{kind="reused"} 3.0',
        ):
            assert line in lines
        assert any(line.startswith("process_resident_memory_bytes ") for line in lines)

    metrics = ServerMetrics()
    served(test, metrics=metrics)


def test_before_the_warm_up_health_says_so_and_nobody_is_answered():
    async def run():
        batcher = fakes.batcher(fakes.Model())  # not started
        async with fakes.client(batcher) as client:
            found = await client.get("/health")
            assert (found.status_code, found.json()["status"]) == (503, "warming up")
            found = await client.post("/classify", json={"input": "abc"})
            assert found.status_code == 503 and error(found) and "retry-after" in found.headers

    asyncio.run(run())
